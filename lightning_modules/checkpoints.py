"""Checkpoints of variants: who wrote them, with which network, and how they load."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from robust_flatness.functional.checks import check_archive

if TYPE_CHECKING:
    from robust_flatness.lightning_modules.at import AT

# Keys of what variants add to a checkpoint.
CLASS_KEY, SEED_KEY = "robust_flatness_class", "robust_flatness_seed"
LAYERS_KEY = "robust_flatness_layers"


def read_checkpoint(path: str | Path, argument: str) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: A file.
        argument: The argument that names the file, for the message.

    Raises:
        ValueError: If the file is not a checkpoint, or a checksum in it differs.
    """
    check_archive(argument, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"Expected `{argument}` to be a checkpoint but {path} is something else or broken: "
            f"{type(error).__name__}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected `{argument}` to be a checkpoint but {path} holds a {type(content).__name__}."
        )
    return content


def load_checkpoint(path: str | Path, **kwargs: Any) -> "AT":
    """Loads a checkpoint as the variant that wrote it.

    `AT.load_from_checkpoint` loads checkpoints of `AT` alone; this function reads the class from
    the checkpoint.

    Args:
        path: A checkpoint of a variant of this package.
        kwargs: For `load_from_checkpoint`, say `network=` if it was built in Python.

    Returns:
        The module, on the CPU, in eval mode.

    Raises:
        ValueError: If the file is not a checkpoint of a variant of this package, or is damaged.
    """
    from robust_flatness import lightning_modules
    from robust_flatness.lightning_modules.at import AT

    name = read_checkpoint(path, "path").get(CLASS_KEY)
    members = {member: getattr(lightning_modules, member) for member in lightning_modules.__all__}
    variants = {n: c for n, c in members.items() if isinstance(c, type) and issubclass(c, AT)}
    if name not in variants:
        writer = f"by {name}" if name else "by another module; use its `load_from_checkpoint`"
        raise ValueError(
            f"Expected `path` to be a checkpoint of {', '.join(variants)} but {path} was written "
            f"{writer}."
        )
    module = variants[name].load_from_checkpoint(path, map_location="cpu", **kwargs)
    return module.eval()


def plain_layers(network: nn.Module) -> list[str]:
    """Class names of layers without weights, which a state dict does not contain.

    Example:
        >>> plain_layers(nn.Sequential(nn.Linear(4, 2), nn.SiLU()))
        ['SiLU']
    """
    return [
        type(layer).__name__
        for layer in network.modules()
        if not any(True for _ in (*layer.children(), *layer.parameters(), *layer.buffers()))
    ]


def check_network_of(checkpoint: Mapping[str, Any], network: nn.Module) -> None:
    """Raises if a network is not the one that a checkpoint was trained with.

    Args:
        checkpoint: Content of a checkpoint of a variant.
        network: The variant's `network`, which its weights are to be loaded into.

    Raises:
        ValueError: If the network has other weights, or other layers.

    Example:
        >>> checkpoint = {"state_dict": {"network.weight": torch.zeros(2, 3)}}
        >>> check_network_of(checkpoint, nn.Linear(3, 2, bias=False))
    """
    difference = next(_differences(checkpoint, network), None)
    if difference is not None:
        raise ValueError(
            f"Expected `network` to be the one of the checkpoint but {type(network).__name__} has "
            f"{difference}; pass `network=` if it was built in Python, or set `--model.network`."
        )


def _differences(checkpoint: Mapping[str, Any], network: nn.Module) -> Iterator[str]:
    own = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    saved = {
        name.removeprefix("network."): tuple(weight.shape)
        for name, weight in checkpoint.get("state_dict", {}).items()
        if name.startswith("network.")
    }
    for name in sorted({*own, *saved}) if saved else ():
        if name not in own:
            yield f"no {name}"
        elif name not in saved:
            yield f"{name}, which the checkpoint lacks"
        elif own[name] != saved[name]:
            yield f"{name} of shape {own[name]} and not {saved[name]}"
    layers = plain_layers(network)
    pairs = zip_longest(checkpoint.get(LAYERS_KEY, layers), layers, fillvalue="no layer")
    for before, now in pairs:
        if before != now:
            yield f"{now} in place of {before}"


def warn_of_fast(fast: object) -> None:
    """Warns if `fast`, an argument of earlier versions, is not `None`."""
    if fast is not None:
        rank_zero_warn(
            "`fast` has no effect: training is in bfloat16 with the trainer's `precision` "
            "bf16-mixed, and the optimizer has fused steps with its own `fused=True`.",
            category=FutureWarning,
        )
