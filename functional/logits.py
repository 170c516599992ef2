"""A network as the attacks and measures call it."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from robust_flatness.functional.checks import are_probabilities, check_logits, upcast
from robust_flatness.functional.modes import Model

# Networks whose outputs were looked at, by their first parameter: wrappers come and go.
_LOOKED_AT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def logits_function(model: Model, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The network as a map from images of any floating type to logits in float32 or wider.

    Images enter in the type of the network's first weight; a function without weights gets them in
    that of `images`. Warns once for each network whose outputs look like probabilities.

    Args:
        model: Maps images in [0, 1] to logits.
        images: Gives the type of what a function without weights expects.

    Returns:
        Maps images `(N, C, H, W)` to logits `(N, K)`; raises a ValueError for other outputs.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).bfloat16()
        >>> images = torch.rand(2, 1, 2, 2, dtype=torch.float64)
        >>> logits_function(network, images)(images).dtype
        torch.float32
    """
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next((weight for weight in weights if weight.is_floating_point()), None)
    dtype = images.dtype if first is None else first.dtype

    def logits(inputs: Tensor) -> Tensor:
        output = model(inputs.to(dtype))
        check_logits(output, len(inputs))
        if first is not None and first not in _LOOKED_AT:
            _LOOKED_AT[first] = None
            _warn_of_probabilities(output.detach())
        return upcast(output)

    return logits


def first_logits(model: Model, images: Tensor) -> Tensor:
    """Logits of the first images that a network gets, to see whether it takes such images.

    Args:
        model: Maps images in [0, 1] to logits.
        images: `(N, C, H, W)`.

    Returns:
        `(N, K)`, float32 or wider.

    Raises:
        ValueError: If the network fails on the images, or returns something else.

    Example:
        >>> first_logits(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2)).shape
        torch.Size([2, 3])
    """
    try:
        return logits_function(model, images)(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        if reason.startswith("Expected `"):
            raise
        raise ValueError(
            f"Expected `network` to take images of shape {tuple(images.shape[1:])} but it raises "
            f"{type(error).__name__}: {reason}."
        ) from error


def _warn_of_probabilities(output: Tensor) -> None:
    if len(output) > 0 and are_probabilities(output):
        warnings.warn(
            "Expected `model` to return logits but its outputs look like probabilities (all in "
            "[0, 1], rows that sum to 1): cross-entropy and attacks would take the softmax twice. "
            "Leave the softmax out of `forward`.",
            stacklevel=4,
        )
