"""Networks that were trained elsewhere, to be measured like our own."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from robust_flatness.functional.checks import check_archive
from robust_flatness.networks import Normalize


class External(LightningModule):
    """Any network as a module that `test` and all measures take.

    `python cli.py test --model External --model.network pkg.Network --model.weights file.pt`.

    Args:
        network: A module (on the command line its class path, with its arguments behind it), or the
            name of a model of RobustBench's zoo, which RobustBench downloads; `None` where
            `weights` is a TorchScript file.
        weights: File of a state dict, alone or under `state_dict`, `model` or `model_state_dict`,
            from a module in DataParallel or not; or a TorchScript file.
        input_mean: Per-channel mean of a normalisation to put in front of the network, which then
            takes normalised images; `None` where it takes pixels in [0, 1]. The data's own mean is
            not put in: a network trained elsewhere was trained with one of its own.
        input_std: Standard deviation likewise.
        trust_weights: Whether to load a file that is more than tensors. Such a file can run any
            code on your machine, so only ever one whose makers you trust.
        dataset: Of RobustBench: `cifar10`, `cifar100` or `imagenet`.
        threat_model: Of RobustBench: `Linf`, `L2` or `corruptions`.
        fast: Whether measures attack in bfloat16 on GPUs that have it, as those of `AT` do.

    Raises:
        ValueError: If there is no network, the file cannot be read, or does not fit the network.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> External(network, input_mean=[0.5], input_std=[0.25])(torch.rand(2, 1, 2, 2)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module | str | None = None,
        weights: str | None = None,
        *,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        trust_weights: bool = False,
        dataset: str = "cifar10",
        threat_model: str = "Linf",
        fast: bool = True,
    ) -> None:
        super().__init__()
        self.fast = fast
        if (input_mean is None) != (input_std is None):
            raise ValueError(
                "Expected `input_mean` and `input_std` together but got "
                f"{input_mean} and {input_std}."
            )
        if isinstance(network, str):
            network = _from_zoo(network, dataset, threat_model)
        if network is None:
            network = _from_script(weights)
        elif weights is not None:
            _load(network, _state_dict(weights, trusted=trust_weights), weights)
        self.network = network
        self.normalize: nn.Module = nn.Identity()
        if input_mean is not None and input_std is not None:
            self.normalize = Normalize(input_mean, input_std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` of images `(N, C, H, W)` in [0, 1]."""
        logits: Tensor = self.network(self.normalize(images))
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: `trainer.test` is measured by callbacks, on fixed sets of images."""


def _from_zoo(name: str, dataset: str, threat_model: str) -> nn.Module:
    try:
        # RobustBench 1.1 depends on pyautoattack and imports it by its former name.
        if importlib.util.find_spec("autoattack") is None:
            sys.modules["autoattack"] = importlib.import_module("pyautoattack")
        from robustbench.utils import load_model
    except ImportError as error:
        raise ValueError(
            f"Expected `network` to be a module's class path, or RobustBench for the name {name}: "
            f"`pip install 'robust-flatness[robustbench]'`; {error}."
        ) from error
    try:
        model: nn.Module = load_model(name, dataset=dataset, threat_model=threat_model)
    except KeyError as error:
        raise ValueError(
            f"Expected `network` to be in RobustBench's zoo of {dataset} and {threat_model} but "
            f"got {name}."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Expected `network` {name} to be downloaded by RobustBench, once, into "
            f"models/{dataset}/{threat_model} but got a {type(error).__name__}; is there a network?"
        ) from error
    return model


def _from_script(weights: str | None) -> nn.Module:
    if weights is None:
        raise ValueError("Expected `network`, or a TorchScript file as `weights`, but got neither.")
    path = _file(weights)
    check_archive("weights", path)
    try:
        script: nn.Module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"Expected `weights` to be a TorchScript file where there is no `network` but got "
            f"{weights}."
        ) from error
    return script


def _state_dict(weights: str, *, trusted: bool) -> Mapping[str, Tensor]:
    path = _file(weights)
    check_archive("weights", path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:
        advice = (
            ""
            if trusted
            else ("; `trust_weights=True` loads files that can run code, from makers you trust")
        )
        raise ValueError(
            f"Expected `weights` to be a file of tensors but got {weights}{advice}."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Expected `weights` to hold a state dict but got {type(content).__name__}."
        )
    return content


def _load(network: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Loads all weights, without the prefix that DataParallel or a wrapper left."""
    own = network.state_dict()
    for prefix in ("", "module.", "network.", "model.", "module.model."):
        short = {name.removeprefix(prefix): value for name, value in weights.items()}
        if own.keys() <= short.keys():
            break
    else:
        missing = sorted(own.keys() - weights.keys())
        raise ValueError(
            f"Expected `weights` to have all of the network's {len(own)} tensors but {path} lacks "
            f"{len(missing)}, such as {missing[0]}."
        )
    for name, value in own.items():
        if value.shape != short[name].shape:
            raise ValueError(
                f"Expected `weights` to have {name} of shape {tuple(value.shape)} but got "
                f"{tuple(short[name].shape)}."
            )
    network.load_state_dict({name: short[name] for name in own})


def _file(weights: str) -> str:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"Expected `weights` to be a file but got {weights}.")
    return str(path)
