"""A network in the middle of training, so that measuring leaves no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from robust_flatness.functional import evaluation

Weights = dict[str, Tensor]

# The own weights of modules that hold others at the moment, averaged or early-stopped.
_OWN_WEIGHTS: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()


@contextmanager
def evaluation_context(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode with gradients, after which nothing in training has changed.

    Modes, weights, buffers, `.grad`, `requires_grad` and random states are restored, see
    `functional.evaluation_context`. All processes have rank 0's buffers: after a step their
    BatchNorm statistics differ, and a measure must be that of one network. Forwards are in float32,
    or in float64 if the trainer's precision is 64-true.

    Args:
        trainer: The trainer.
        module: The module.
    """
    with (
        evaluation.evaluation_context(module),
        _default_type_of_training(trainer, module),
        evaluation.full_float32(module.device),
    ):
        if trainer.world_size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)
        yield


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Gives a module in training the averaged weights, and its own back bit for bit.

    Averages are those of a `WeightAveraging` callback, Lightning's or this package's, anywhere
    among the trainer's callbacks. Nothing changes outside of `fit`, before the first update, or if
    the module holds other weights already.

    Args:
        trainer: The trainer.
        module: The module.
    """
    average = None if module in _OWN_WEIGHTS else _average(trainer, module)
    if average is None:
        yield
        return
    with _weights_restored(module):
        copy_weights(average, module)
        yield


@contextmanager
def swapped_weights(module: LightningModule, weights: Weights) -> Iterator[None]:
    """Gives a module other weights and buffers, and its own back bit for bit.

    Args:
        module: The module.
        weights: A state dict of it, on any device.
    """
    with _weights_restored(module):
        module.load_state_dict(weights)
        yield


def own_weights(module: nn.Module) -> Weights | None:
    """Returns a module's own weights and buffers while it holds others, else None."""
    return _OWN_WEIGHTS.get(module)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers into a module of the same structure, on any device."""
    tensors = _tensors(source)
    for name, tensor in _tensors(target).items():
        tensor.copy_(tensors[name])


def is_finite(trainer: Trainer, module: LightningModule) -> bool:
    """Returns whether all weights are finite, on all processes, and no buffer holds NaN."""
    # Masks and minima begin at infinity.
    finite = all(bool(weight.isfinite().all()) for weight in module.parameters())
    finite = finite and not any(bool(buffer.isnan().any()) for buffer in module.buffers())
    # Buffers of the processes differ, and processes must decide alike.
    return bool(trainer.strategy.reduce_boolean_decision(finite))


def _average(trainer: Trainer, module: LightningModule) -> nn.Module | None:
    if trainer.state.fn != TrainerFn.FITTING or trainer.state.status != TrainerStatus.RUNNING:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is None or average.n_averaged == 0:
            continue
        if hasattr(callback, "refresh_average"):
            callback.refresh_average(trainer, module)
        elif trainer.validating:
            # Lightning's callback has exchanged the two, and holds the module's own weights.
            return None
        return average.module
    return None


@contextmanager
def _weights_restored(module: nn.Module) -> Iterator[None]:
    tensors, outer = _tensors(module), _OWN_WEIGHTS.get(module)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    _OWN_WEIGHTS[module] = before
    try:
        yield
    finally:
        if outer is None:
            del _OWN_WEIGHTS[module]
        else:
            _OWN_WEIGHTS[module] = outer
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])


@contextmanager
def _default_type_of_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Has forwards create tensors of the type that they have in training, if that is float64."""
    if trainer.precision != "64-true":
        yield
        return
    default = torch.get_default_dtype()
    hooks = (
        module.register_forward_pre_hook(lambda *_: torch.set_default_dtype(torch.float64)),
        module.register_forward_hook(lambda *_: torch.set_default_dtype(default), always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(module: nn.Module) -> Weights:
    """All parameters and buffers, also those that no state dict has, under all of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}
