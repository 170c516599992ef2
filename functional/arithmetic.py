"""Where bfloat16 is good enough, and where float32 is kept."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

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
    if device.type != "cuda":
        return False
    # AMD's have it since long before these numbers.
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


@contextmanager
def bfloat16_forwards(device: torch.device) -> Iterator[None]:
    """Convolutions, matrix products and what lies between them in bfloat16.

    Weights, their gradients, images and perturbations stay float32.

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
        >>> network, images = torch.nn.Linear(4, 2), torch.rand(3, 4)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), float32_forwards(images.device):
        ...     network(images).dtype
        torch.float32
    """
    tf32 = without_tf32() if device.type == "cuda" else nullcontext()
    with tf32, torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products and convolutions of GPUs in full float32, whatever they were set to before."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    # Since PyTorch 2.9 a setting made this way cannot be read the older way, nor the reverse.
    settings: list[tuple[Any, str, Any]] = (
        [(part, "fp32_precision", "ieee") for part in (products, convolutions.conv)]
        if hasattr(convolutions, "conv")
        else [(part, "allow_tf32", False) for part in (products, convolutions)]
    )
    before = [getattr(part, name) for part, name, _ in settings]
    level = None if hasattr(convolutions, "conv") else torch.get_float32_matmul_precision()
    try:
        for part, name, value in settings:
            setattr(part, name, value)
        yield
    finally:
        for (part, name, _), value in zip(settings, before):
            setattr(part, name, value)
        if level is not None:
            torch.set_float32_matmul_precision(level)


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
