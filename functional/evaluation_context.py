"""What happens while a network is measured leaves no trace in it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robust_flatness.functional.checks import HALF
from robust_flatness.functional.modes import Model, differentiable

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
