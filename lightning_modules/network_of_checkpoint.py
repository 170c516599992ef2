"""Whether a checkpoint was trained with the network that its weights are loaded into."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from torch import nn

LAYERS_KEY = "robust_flatness_layers"


def plain_layers(network: nn.Module) -> list[str]:
    """Class names of layers without weights, of which a state dict says nothing.

    Args:
        network: Any network.

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
        network: The `network` that its weights are to be loaded into.

    Raises:
        ValueError: If the network has other weights, or other layers.

    Example:
        >>> import torch
        >>> checkpoint = {"state_dict": {"network.weight": torch.zeros(2, 3)}}
        >>> check_network_of(checkpoint, nn.Linear(3, 2, bias=False))
    """
    difference = _difference(checkpoint, network)
    if difference is not None:
        raise ValueError(
            f"Expected `network` to be the one of the checkpoint but {type(network).__name__} has "
            f"{difference}; pass `network=` if it was built in Python, or set `--model.network`."
        )


def _difference(checkpoint: Mapping[str, Any], network: nn.Module) -> str | None:
    own = {name: weight.shape for name, weight in network.state_dict(prefix="network.").items()}
    saved = {
        name: weight.shape
        for name, weight in checkpoint.get("state_dict", {}).items()
        if name.startswith("network.")
    }
    for name in sorted({*own, *saved}) if saved else ():
        short = name.removeprefix("network.")
        if name not in own:
            return f"no {short}"
        if name not in saved:
            return f"{short}, which the checkpoint lacks"
        if own[name] != saved[name]:
            return f"{short} of shape {tuple(own[name])} and not {tuple(saved[name])}"
    layers = checkpoint.get(LAYERS_KEY, plain_layers(network))
    for before, now in zip_longest(layers, plain_layers(network), fillvalue="no layer"):
        if before != now:
            return f"{now} in place of {before}"
    return None
