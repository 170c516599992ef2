"""Networks that were trained elsewhere, to be measured like our own."""

import importlib.util
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from robust_flatness.functional.checks import check_archive
from robust_flatness.lightning_modules.checkpoints import warn_of_fast
from robust_flatness.networks import Normalize, UserNetwork

# Names that DataParallel and torch.compile put in between.
WRAPPERS = {"module", "_orig_mod"}
# Where files keep the weights of training, as opposed to averages of them.
PLACES = {"state_dict", "model_state_dict", "model_state", "model", "network", "net"}
AVERAGES = re.compile(r"ema|averag|swa|teacher|shadow|best", re.IGNORECASE)
# A counter of BatchNorm that the usual momentum does not need; files of old versions lack it.
COUNTER = "num_batches_tracked"
STATISTICS = re.compile(r"(^|\.)(new_|_)?(mean|std)$")


class External(LightningModule):
    """Any network as a module that `test` and all measures take.

    `python cli.py test --model External --model.network pkg.Network --model.weights file.pt`.

    Args:
        network: A module; the path of a class, function or module, such as `package.Network` (on
            the command line followed by its arguments); or the name of a model of RobustBench's
            zoo, which RobustBench downloads. `None` if `weights` is a TorchScript file.
        weights: File with a state dict, at any place in it (`state_dict`, `model`, …) and with any
            prefix (`module.`, `_orig_mod.`, …); or a TorchScript file.
        input_mean: Per-channel mean of a normalization in front of the network; `None` if it takes
            pixels in [0, 1]. The data's own mean is not used: the network was trained with its own.
        input_std: Standard deviation likewise.
        trust_weights: Whether to load a file that contains more than tensors. Such a file can run
            any code on your machine: only load those whose makers you trust.
        dataset: Of RobustBench: `cifar10`, `cifar100` or `imagenet`.
        threat_model: Of RobustBench: `Linf`, `L2` or `corruptions`.
        fast: Deprecated, without effect.

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
        fast: bool | Literal["graph"] | None = None,
    ) -> None:
        super().__init__()
        warn_of_fast(fast)
        if (input_mean is None) != (input_std is None):
            raise ValueError(
                "Expected `input_mean` and `input_std` together but got "
                f"{input_mean} and {input_std}."
            )
        if isinstance(network, str):
            if "." in network:
                network = UserNetwork(path=network)
            else:
                network = _from_zoo(network, dataset, threat_model)
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

    def to_torch(self) -> nn.Sequential:
        """A copy in eval mode without Lightning, which maps images in [0, 1] to logits.

        Its parts are `normalize` and `network`; it returns the same bits as this module.
        """
        parts = OrderedDict(normalize=self.normalize, network=self.network)
        return deepcopy(nn.Sequential(parts)).eval()

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
    path = _checked_file(weights)
    try:
        script: nn.Module = torch.jit.load(path, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            "Expected `weights` to be a TorchScript file, as there is no `network`, but got "
            f"{weights}."
        ) from error
    return script


def _content(weights: str, *, trusted: bool) -> Any:
    path = _checked_file(weights)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:
        advice = "; `trust_weights=True` loads files that can run code, from makers you trust"
        raise ValueError(
            f"Expected `weights` to be a file of tensors but got {weights}"
            f"{'' if trusted else advice}."
        ) from error


def _checked_file(weights: str) -> str:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"Expected `weights` to be a file but got {weights}.")
    check_archive("weights", path)
    return str(path)


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


def load_weights(
    network: nn.Module, tensors: Mapping[str, Tensor], path: str, *, normalized: bool
) -> None:
    """Loads all weights of a network from the tensors of a file, which may have no others.

    Names in the file may have any prefix, and names of wrappers in between. If the weights are
    there more than once, those of training are taken before averages, with a warning.

    Args:
        network: Changed in place.
        tensors: By name, which begins with the names of the mappings that a tensor is in.
        path: The file, for messages.
        normalized: Whether a normalization is put in front of the network.

    Raises:
        ValueError: If the file lacks a weight, or has one of another shape, or has weights or a
            normalization that the network lacks.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> file = {"model.module.weight": torch.ones(1, 2), "model.module.bias": torch.zeros(1)}
        >>> load_weights(network, file, "a.pt", normalized=False)
        >>> network(torch.ones(2)).item()
        2.0
    """
    state = network.state_dict().items()
    own = _by_plain_name({name: value for name, value in state if isinstance(value, Tensor)})
    file = _by_plain_name(tensors)
    prefix, *others = _prefixes(own, file)
    pairs = {key: file[prefix + key] for key in own if prefix + key in file}
    missing = [name for key, (name, _) in own.items() if key not in pairs]
    if not all(name.endswith(COUNTER) for name in missing):
        held = f"holds {len(file)}, such as {next(iter(file.values()))[0]}" if file else "is empty"
        raise ValueError(
            f"Expected `weights` to have all of the network's {len(own)} tensors but {path} lacks "
            f"{len(missing)}, such as {missing[0]}; it {held}."
        )
    for key, (saved_name, saved) in pairs.items():
        name, weight = own[key]
        if saved.shape != weight.shape:
            raise ValueError(
                f"Expected `weights` to have {name} of shape {tuple(weight.shape)} but got "
                f"{tuple(saved.shape)} for {saved_name} in {path}."
            )
    left = [name for name in file if not any(suffix in own for suffix in _suffixes(name))]
    statistics = [name for name in left if STATISTICS.search(name)]
    if statistics and not normalized:
        raise ValueError(
            f"Expected `input_mean` and `input_std`, as {path} has a normalization, "
            f"{file[statistics[0]][0]}, that the network lacks, but got None; zeros and ones are "
            "none."
        )
    rest = [n for n in left if n.startswith(prefix) and not n.endswith(COUNTER)]
    rest = [file[name][0] for name in rest if name not in statistics]
    if rest:
        raise ValueError(
            f"Expected `network` to have all weights of {path} but it lacks {len(rest)}, such as "
            f"{rest[0]}."
        )
    for other in others[:1]:
        if any(not torch.equal(file.get(other + k, pair)[1], pair[1]) for k, pair in pairs.items()):
            rank_zero_warn(
                f"{path} holds the weights more than once: those of `{prefix}` are taken, and not "
                f"those of `{other}`."
            )
    network.load_state_dict({own[k][0]: saved for k, (_, saved) in pairs.items()}, strict=False)


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Names and tensors by names without those of wrappers, unless two would be the same."""
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): (name, tensor)
        for name, tensor in tensors.items()
    }
    same = len(plain) == len(tensors)
    return plain if same else {name: (name, tensor) for name, tensor in tensors.items()}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _prefixes(own: Mapping[str, object], file: Mapping[str, object]) -> list[str]:
    """Prefixes of all names of the network in a file, those of training first, or of most names."""
    counts = Counter(
        name.removesuffix(suffix) for name in file for suffix in _suffixes(name) if suffix in own
    )
    needed = [name for name in own if not name.endswith(COUNTER)]
    full = [prefix for prefix in counts if all(prefix + name in file for name in needed)]
    if not full:
        return [prefix for prefix, _ in counts.most_common(1)] or [""]

    def strangeness(prefix: str) -> tuple[bool, int, int]:
        parts = prefix.split(".")[:-1]
        return bool(AVERAGES.search(prefix)), sum(p not in PLACES for p in parts), len(parts)

    return sorted(full, key=strangeness)
