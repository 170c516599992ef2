"""Modes of a network that a measure or an attack needs for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

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
