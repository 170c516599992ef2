"""Where bfloat16 is good enough, and where float32 is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_FAST: ContextVar[bool] = ContextVar("fast_crafting", default=False)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that multiplies matrices in bfloat16.

    Args:
        device: Where the network is.

    Example:
        >>> has_bfloat16(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def bfloat16_forwards(device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products in bfloat16; weights, images and sums stay float32.

    Args:
        device: Where the network is.
    """
    # Casts of the weights serve every forward inside, so none may be left from outside, nor stay.
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def float32_forwards(device: torch.device) -> Iterator[None]:
    """Everything in float32 as it is written: neither autocast nor TF32.

    PyTorch's convolutions round their inputs to TF32 on GPUs by default, which is near enough to
    train with, but not for figures that others are to find again.

    Args:
        device: Where the network is.

    Example:
        >>> with float32_forwards(torch.device("cpu")):
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    try:
        convolutions.allow_tf32 = products.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


@contextmanager
def fast_crafting(wanted: bool = True) -> Iterator[None]:
    """Attacks inside look for adversarial examples in bfloat16, on GPUs that have it.

    Their losses and predictions are told in float32, at one more forward for each attack. Elsewhere
    nothing changes.

    Args:
        wanted: Whether they do; `False` ends it for what is inside.

    Example:
        >>> with fast_crafting():
        ...     crafts_fast(torch.device("cpu"))
        False
    """
    token = _FAST.set(wanted)
    try:
        yield
    finally:
        _FAST.reset(token)


def crafts_fast(device: torch.device) -> bool:
    """Whether an attack on this device is inside `fast_crafting`, and the device has bfloat16.

    Args:
        device: Where the images are.
    """
    return _FAST.get() and has_bfloat16(device)
