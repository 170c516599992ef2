"""Networks that were trained elsewhere, to be measured like our own."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from robust_flatness.lightning_modules.external_weights import load_weights
from robust_flatness.networks import Normalize, UserNetwork


class External(LightningModule):
    """Any network as a module that `test` and all measures take.

    `python cli.py test --model External --model.network pkg.Network --model.weights file.pt`.

    Args:
        network: A module; the path of a class, function or module, such as `package.Network` (on
            the command line with its arguments behind it); or the name of a model of RobustBench's
            zoo, which RobustBench downloads. `None` if `weights` is a TorchScript file.
        weights: File of a state dict, anywhere in it (`state_dict`, `model`, …) and with any prefix
            (`module.`, `_orig_mod.`, …); or a TorchScript file.
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
            path = "." in network
            network = (
                UserNetwork(path=network) if path else _from_zoo(network, dataset, threat_model)
            )
        if network is None:
            network = _from_script(weights)
        elif not isinstance(network, nn.Module):
            raise ValueError(
                "Expected `network` to be a torch.nn.Module, a path or a name but got "
                f"{getattr(network, '__name__', type(network).__name__)}."
            )
        elif weights is not None:
            tensors = _tensors_of(_content(weights, trusted=trust_weights))
            load_weights(network, tensors, weights, normalized=input_mean is not None)
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
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            "Expected `network` to be a path such as package.Network, or RobustBench to be "
            f"installed for the name {name}, but importing it raises {type(error).__name__}: "
            f"{reason}; `pip install robustbench 'setuptools<82'`, as it needs pkg_resources, "
            "which setuptools 82 lacks."
        ) from error
    try:
        model: nn.Module = load_model(name, dataset=dataset, threat_model=threat_model)
    except KeyError as error:
        raise ValueError(
            f"Expected `network` to be in RobustBench's zoo of {dataset} and {threat_model} but "
            f"got {name}."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"Expected `dataset` and `threat_model` to be RobustBench's but got {dataset} and "
            f"{threat_model}: {error}."
        ) from error
    except Exception as error:
        raise ValueError(
            f"Expected `network` {name} to be downloaded by RobustBench, once, into "
            f"models/{dataset}/{threat_model} but got a {type(error).__name__}: "
            f"{shorten(str(error), 200)}; is there a network?"
        ) from error
    return model


def _from_script(weights: str | None) -> nn.Module:
    if weights is None:
        raise ValueError("Expected `network`, or a TorchScript file as `weights`, but got neither.")
    try:
        script: nn.Module = torch.jit.load(_file(weights), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"Expected `weights` to be a TorchScript file where there is no `network` but got "
            f"{weights}."
        ) from error
    return script


def _content(weights: str, *, trusted: bool) -> Any:
    path = _file(weights)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:
        advice = (
            ""
            if trusted
            else ("; `trust_weights=True` loads files that can run code, from makers you trust")
        )
        raise ValueError(
            f"Expected `weights` to be a file of tensors but got {weights}{advice}."
        ) from error


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """All tensors of a file by the path to each."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Expected `weights` to hold a state dict but got {type(content).__name__}."
        )
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif isinstance(value, (Mapping, nn.Module)):
            inner = _tensors_of(value)
            tensors |= {f"{name}.{key}": tensor for key, tensor in inner.items()}
    return tensors


def _file(weights: str) -> str:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"Expected `weights` to be a file but got {weights}.")
    return str(path)
