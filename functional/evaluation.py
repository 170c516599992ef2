"""How a network is called for attacks and measures: modes, precision, logits, state."""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

HALF = (torch.float16, torch.bfloat16)


def check_logits(output: object, count: int) -> None:
    """Raises if what a network returned is not what losses and errors are computed from.

    Args:
        output: What it returned.
        count: Number N of images.

    Raises:
        ValueError: If it is no floating-point tensor of shape (N, K) with at least two classes.

    Example:
        >>> check_logits((torch.zeros(4, 10), torch.zeros(4, 64)), 4)
        Traceback (most recent call last):
        ...
        ValueError: Expected `model` to return logits of shape (N, K), one row for each of the 4 \
images, but got a tuple of 2; return the logits alone from `forward`.
    """
    if not isinstance(output, Tensor):
        length = f" of {len(output)}" if isinstance(output, Sized) else ""
        came = f"a {type(output).__name__}{length}; return the logits alone from `forward`"
    elif output.ndim != 2 or len(output) != count:
        came = f"a tensor of shape {tuple(output.shape)}"
    elif output.shape[1] < 2:
        came = f"{tuple(output.shape)}; a binary classifier needs a logit for each of its 2 classes"
    elif not output.is_floating_point():
        came = f"a tensor of {output.dtype}"
    else:
        return
    raise ValueError(
        f"Expected `model` to return logits of shape (N, K), one row for each of the {count} "
        f"images, but got {came}."
    )


def are_probabilities(output: Tensor) -> bool:
    """Whether each row is in [0, 1] and sums to 1, as after a softmax.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> are_probabilities(logits), are_probabilities(logits.softmax(1))
        (False, True)
    """
    tolerance = 1e-2 if output.dtype in HALF else 1e-4
    within = (output >= 0) & (output <= 1)
    sums = output.sum(1, dtype=torch.float64)
    return bool(within.all() and ((sums - 1).abs() <= tolerance).all())


def to_float32(logits: Tensor) -> Tensor:
    """Half-precision logits, or images, as float32, so that losses lose nothing to autocast.

    Example:
        >>> to_float32(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return logits.float() if logits.dtype in HALF else logits


def predicted_classes(logits: Tensor) -> Tensor:
    """The predicted class of each example, or -1 if any of its logits is not finite.

    `argmax` of NaN is class 0, so a diverged network would be right on that class.

    Args:
        logits: `(N, K)`.

    Returns:
        Classes `(N,)`, -1 for an example that counts as misclassified whatever its label is.

    Example:
        >>> predicted_classes(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
        tensor([ 1, -1])
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def nan_unless_finite(losses: Tensor, logits: Tensor) -> Tensor:
    """Losses, NaN for an example if any of its logits is not finite.

    A loss may be finite all the same: cross-entropy does not see a logit of minus infinity.

    Args:
        losses: `(N,)`.
        logits: `(N, K)`.

    Example:
        >>> nan_unless_finite(torch.zeros(2), torch.tensor([[0.0, 1.0], [-math.inf, 1.0]]))
        tensor([0., nan])
    """
    return torch.where(logits.isfinite().all(1), losses, math.nan)


Model = Callable[[Tensor], Tensor] | nn.Module

Mode = Literal["eval", "train"]


@contextmanager
def module_modes(model: Model, mode: Mode = "eval") -> Iterator[None]:
    """Puts every module of a network into one mode and gives each its own back.

    A BatchNorm that was frozen in eval mode inside a training network is still frozen afterwards,
    which `model.train()` would not do. Callables that are no `nn.Module` are left alone.

    Args:
        model: The network.
        mode: `eval` or `train`.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with module_modes(network, "eval"):
        ...     [module.training for module in network]
        [False, False]
        >>> [module.training for module in network]
        [True, False]
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = mode == "train"
        yield
    finally:
        for module, training in zip(modules, before):
            module.training = training


@contextmanager
def differentiable(model: Model, mode: Mode = "eval") -> Iterator[None]:
    """Allows input gradients wherever the caller stands, also under `torch.inference_mode`.

    Tensors made in inference mode must be cloned inside before they can take part.

    Args:
        model: The network, put into `mode` meanwhile.
        mode: `eval` or `train`.
    """
    with torch.inference_mode(False), torch.enable_grad(), module_modes(model, mode):
        yield


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
        return to_float32(output)

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
def bfloat16_autocast(device: torch.device) -> Iterator[None]:
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
def full_float32(device: torch.device) -> Iterator[None]:
    """Everything in float32 as it is written: neither autocast nor TF32.

    PyTorch's convolutions round their inputs to TF32 on GPUs by default, which is near enough to
    train with, but not for figures that others are to find again.

    Args:
        device: Where the network is.

    Example:
        >>> network, images = torch.nn.Linear(4, 2), torch.rand(3, 4)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_float32(images.device):
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


# What a forward may register, replace or delete.
REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

# Attributes that hold no more than a value.
PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor)


@contextmanager
def evaluation_context(model: Model) -> Iterator[None]:
    """Eval mode with gradients, in float32 at least, after which network and random state are back.

    Half-precision weights and buffers are float32 inside: a perturbation of 0.3 % of a weight is
    below what bfloat16 resolves. Weights, buffers (also those that a forward replaces or
    registers), `requires_grad`, `.grad`, and attributes that are tensors, numbers or strings are
    restored, and so are the global states of `random`, NumPy and torch. What a forward keeps
    elsewhere, say in a list or in a generator of its own, cannot be restored.

    Args:
        model: The network. Of a callable that is no `nn.Module` only random states are restored.

    Example:
        >>> network = nn.Linear(2, 2).bfloat16()
        >>> with evaluation_context(network):
        ...     network.weight.dtype, network.training
        (torch.float32, False)
        >>> network.weight.dtype, network.training
        (torch.bfloat16, True)
    """
    with _kept_random_states(model), _kept_state(model), _float32(model), differentiable(model):
        yield


@contextmanager
def _kept_random_states(model: Model) -> Iterator[None]:
    tensors = _tensors(model)
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _kept_state(model: Model) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # TorchScript keeps its registries elsewhere, and replaces nothing in them.
    contents = [vars(m) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    registries = [(c[name], c[name].copy()) for c in contents for name in REGISTRIES]
    attributes = [(c, {n: v for n, v in c.items() if isinstance(v, PLAIN)}) for c in contents]
    held = [v for _, plain in attributes for v in plain.values() if isinstance(v, Tensor)]
    tensors = {id(tensor): tensor for tensor in (*_tensors(model), *held)}.values()
    before = [(t, t.data, t.detach().clone()) for t in tensors if t.layout == torch.strided]
    graphs = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
    try:
        yield
    finally:
        for registry, copy in registries:
            registry.clear()
            registry.update(copy)
        for content, plain in attributes:
            for name in [n for n, v in content.items() if isinstance(v, PLAIN) and n not in plain]:
                del content[name]
            content.update(plain)
        for tensor, data, value in before:
            _restore(tensor, data, value)
        for tensor, requires_grad, grad in graphs:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad


@torch.no_grad()
def _restore(tensor: Tensor, data: Tensor, value: Tensor) -> None:
    if tensor.dtype != data.dtype or tensor.data_ptr() != data.data_ptr():
        tensor.data = data
    # Writing counts as a change, which the graph of a training step would not survive.
    if not torch.equal(data, value):
        tensor.copy_(value)


@contextmanager
def _float32(model: Model) -> Iterator[None]:
    half = [tensor for tensor in _tensors(model) if tensor.dtype in HALF]
    modules = model.modules() if half and isinstance(model, nn.Module) else ()
    # What Lightning's modules say of themselves.
    typed: list[Any] = [module for module in modules if getattr(module, "_dtype", None) in HALF]
    before = [(tensor, tensor.data) for tensor in half], [(m, m._dtype) for m in typed]
    try:
        with torch.inference_mode(False):
            for tensor in half:
                tensor.data = tensor.data.float()
        for module in typed:
            module._dtype = torch.float32
        yield
    finally:
        for tensor, data in before[0]:
            tensor.data = data
        for module, dtype in before[1]:
            module._dtype = dtype


def _tensors(model: Model) -> list[Tensor]:
    """Parameters and buffers, each once, without those that have no values yet."""
    if not isinstance(model, nn.Module):
        return []
    return [t for t in chain(model.parameters(), model.buffers()) if not is_lazy(t)]
