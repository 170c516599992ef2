"""How a network is called for attacks and measures: modes, precision, logits, state."""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from robust_flatness.functional.memory import in_pieces, smaller_batches

Model = Callable[[Tensor], Tensor] | nn.Module
Mode = Literal["eval", "train"]
HALF = (torch.float16, torch.bfloat16)


def to_float32(logits: Tensor) -> Tensor:
    """Converts logits or images of half precision to float32, so that losses are exact."""
    return logits.float() if logits.dtype in HALF else logits


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64: Apple's GPUs do not."""
    return device.type != "mps"


def to_float64(values: Tensor) -> Tensor:
    """Converts values to float64, on the CPU if their device has no such type."""
    return (values if has_float64(values.device) else values.cpu()).double()


def predicted_classes(logits: Tensor) -> Tensor:
    """The predicted class of each example, or -1 if any of its logits is not finite.

    `argmax` of NaN is class 0, so a diverged network would be correct on that class.
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def nan_unless_finite(losses: Tensor, logits: Tensor) -> Tensor:
    """The losses `(N,)`, NaN for an example if any of its logits is not finite.

    A loss may be finite all the same: cross-entropy ignores a logit of minus infinity.
    """
    return torch.where(logits.isfinite().all(1), losses, math.nan)


def _check_logits(output: object, count: int) -> None:
    """Raises if the output of a network for `count` images is not a tensor of logits (N, K)."""
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


# Networks that were checked for probabilities, by their first parameter: wrappers come and go.
_CHECKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def logits_function(model: Model, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the network as a map from images of any floating type to logits, at least float32.

    Images are converted to the type of the network's first weight, or of `images` for a function
    without weights. Warns once for each network whose outputs look like probabilities.
    """
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next((weight for weight in weights if weight.is_floating_point()), None)
    dtype = images.dtype if first is None else first.dtype

    def logits(inputs: Tensor) -> Tensor:
        inputs = inputs.to(dtype)
        # A function may compare its inputs with a batch that it holds.
        output = in_pieces(model, inputs) if first is not None else model(inputs)
        _check_logits(output, len(inputs))
        if first is not None and first not in _CHECKED:
            _CHECKED[first] = None
            rows = output.detach()
            # In float32 at least: not all devices have float64.
            sums = to_float32(rows).sum(1)
            tolerance = 1e-2 if rows.dtype in HALF else 1e-4
            is_share = ((rows >= 0) & (rows <= 1)).all() and ((sums - 1).abs() <= tolerance).all()
            if len(rows) > 0 and is_share:
                warnings.warn(
                    "Expected `model` to return logits but its outputs look like probabilities "
                    "(all in [0, 1], rows that sum to 1): cross-entropy and attacks would take the "
                    "softmax twice. Leave the softmax out of `forward`.",
                    stacklevel=3,
                )
        return to_float32(output)

    return logits


def first_logits(model: Model, images: Tensor) -> Tensor:
    """Logits of the first images that a network gets.

    Raises:
        ValueError: If the network fails on the images, or does not return logits.
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


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that multiplies matrices in bfloat16."""
    if device.type != "cuda":
        return False
    # These capabilities are NVIDIA's; all supported GPUs of AMD have bfloat16.
    return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8


@contextmanager
def bfloat16_autocast(device: torch.device) -> Iterator[None]:
    """Runs the network in bfloat16; weights, their gradients, images and δ stay float32."""
    # Casts of the weights serve every forward inside, so none may stay from outside, nor leave.
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disables autocast and TF32.

    PyTorch's convolutions round their inputs to TF32 on GPUs by default, which is precise enough
    for training, but not for numbers that others are to reproduce.
    """
    tf32 = without_tf32() if device.type == "cuda" else nullcontext()
    with tf32, torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def without_tf32() -> Iterator[None]:
    """Matrix products and convolutions of GPUs in full float32."""
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
def held_scales(model: Model) -> Iterator[None]:
    """Computes `weight_offset + weight` of layers that have `held_scale` once for all forwards.

    Weights get no gradient inside, and must not change. Results are equal bit for bit.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    layers: list[Any] = [module for module in modules if hasattr(module, "held_scale")]
    before = [layer.held_scale for layer in layers]
    try:
        if layers:
            weights = [layer.weight for layer in layers]
            with torch.no_grad():
                scales = torch._foreach_add(weights, [layer.weight_offset for layer in layers])
            for layer, weight, scale in zip(layers, weights, scales):
                layer.held_scale = weight, scale
        yield
    finally:
        for layer, held in zip(layers, before):
            layer.held_scale = held


@contextmanager
def module_modes(model: Model, mode: Mode = "eval") -> Iterator[None]:
    """Puts every module of a network into one mode and restores the mode of each.

    `model.train()` would not leave a BatchNorm in eval mode that was frozen inside a training
    network. A callable that is not an `nn.Module` is not changed.
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
    """Allows gradients, also under `torch.inference_mode`, with the network in `mode`.

    Tensors made in inference mode must be cloned inside before they can take part.
    """
    with torch.inference_mode(False), torch.enable_grad(), module_modes(model, mode):
        yield


@contextmanager
def evaluation_context(model: Model) -> Iterator[None]:
    """Eval mode with gradients, in float32 at least, after which network and random state are back.

    Half-precision weights and buffers are float32 inside: a perturbation of 0.3 % of a weight is
    below the resolution of bfloat16. Weights, buffers (also those that a forward replaces or
    registers), `requires_grad`, `.grad`, and attributes that are tensors, numbers or strings are
    restored, and so are the global states of `random`, NumPy and torch. State that a forward keeps
    elsewhere, such as in a list or in its own generator, cannot be restored. For a callable that is
    not an `nn.Module` only random states are. A measure inside that runs out of memory goes on with
    smaller batches.

    Example:
        >>> network = nn.Linear(2, 2).bfloat16()
        >>> with evaluation_context(network):
        ...     network.weight.dtype, network.training
        (torch.float32, False)
        >>> network.weight.dtype, network.training
        (torch.bfloat16, True)
    """
    modules: list[Any] = list(model.modules()) if isinstance(model, nn.Module) else []
    tensors = [t for m in modules for t in (*m.parameters(False), *m.buffers(False))]
    tensors = [tensor for tensor in tensors if not is_lazy(tensor)]
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        restored = _state_restored(modules, tensors)
        with (
            torch.random.fork_rng(devices),
            restored,
            differentiable(model),
            smaller_batches("The measure"),
        ):
            if half := [tensor for tensor in tensors if tensor.dtype in HALF]:
                # The attribute in which Lightning's modules keep their type.
                for module in (m for m in modules if getattr(m, "_dtype", None) in HALF):
                    module._dtype = torch.float32
            for tensor in half:
                tensor.data = tensor.data.float()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# Registries that a forward may change, and types of attributes that hold no more than a value.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, Tensor)


class NetworkState:
    """A copy of what the logits of a network depend on, which says whether that has changed.

    Parameters, buffers, attributes that are tensors, numbers or strings, classes of modules, and
    which hooks they have. As in `evaluation_context`, state that is kept elsewhere is not seen.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> state = NetworkState(network)
        >>> network.weight.data[0, 0] += 1
        >>> state.is_of(network), NetworkState(network).is_of(network)
        (False, True)
    """

    def __init__(self, network: nn.Module) -> None:
        tensors, self._values = _tensors_and_values(network)
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def is_of(self, network: nn.Module) -> bool:
        """Returns whether a network has this state, bit for bit; never if it holds NaN."""
        tensors, values = _tensors_and_values(network)
        if values != self._values or tensors.keys() != self._tensors.keys():
            return False
        return all(equal(tensor, self._tensors[name]) for name, tensor in tensors.items())


def _tensors_and_values(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        hooks = (getattr(module, name, ()) for name in ("_forward_pre_hooks", "_forward_hooks"))
        # Numbers of hooks are never used twice.
        values[path] = (type(module), *map(tuple, hooks))
        own = {} if isinstance(module, torch.jit.ScriptModule) else vars(module)
        held = {name: value for name, value in own.items() if _is_compared(value)}
        held |= dict(module.named_parameters(recurse=False))
        held |= dict(module.named_buffers(recurse=False))
        for name, value in held.items():
            if isinstance(value, Tensor) and not is_lazy(value):
                tensors[f"{path}.{name}"] = value
            else:
                values[f"{path}.{name}"] = value
    return tensors, values


def _is_compared(value: Any) -> bool:
    """Whether an attribute is a value, a function, or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(_is_compared, value)) and not any(isinstance(v, Tensor) for v in value)
    return isinstance(value, (*_PLAIN, FunctionType, BuiltinFunctionType, MethodType, partial))


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, device, shape and values; NaN equals nothing."""
    alike = one.dtype == other.dtype and one.device == other.device
    # Others have no `torch.equal`.
    dense = one.layout == other.layout == torch.strided
    return alike and dense and torch.equal(one, other)


@contextmanager
def _state_restored(modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Iterator[None]:
    # TorchScript keeps its registries elsewhere, and replaces nothing in them.
    contents = [vars(m) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    registries = [(c[name], c[name].copy()) for c in contents for name in _REGISTRIES]
    attributes = [(c, {n: v for n, v in c.items() if isinstance(v, _PLAIN)}) for c in contents]
    held = [v for _, plain in attributes for v in plain.values() if isinstance(v, Tensor)]
    tensors = list({id(tensor): tensor for tensor in (*tensors, *held)}.values())
    values = [
        (t, t.data, t.detach().clone() if t.layout == torch.strided else None) for t in tensors
    ]
    graphs = [(t, t.requires_grad, t.grad) for t in tensors if t.is_leaf]
    try:
        yield
    finally:
        for registry, copy in registries:
            registry.clear()
            registry.update(copy)
        for content, plain in attributes:
            for name in [n for n, v in content.items() if isinstance(v, _PLAIN) and n not in plain]:
                del content[name]
            content.update(plain)
        for tensor, data, value in values:
            moved = value is not None and tensor.data_ptr() != data.data_ptr()
            if moved or tensor.dtype != data.dtype:
                tensor.data = data
            # Writing counts as a change, which would invalidate the graph of a training step.
            if value is not None and not torch.equal(data, value):
                with torch.no_grad():
                    tensor.copy_(value)
        for tensor, requires_grad, grad in graphs:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad
