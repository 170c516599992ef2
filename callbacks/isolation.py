"""A place to measure a network in the middle of training without training noticing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from robust_flatness.functional.evaluation import evaluation_context, fast_crafting, full_float32

Weights = dict[str, Tensor]

# The own weights of modules that hold others at the moment. Whoever put those in has decided what
# is measured: no context further inside replaces them.
_OWN: ContextVar[Mapping[nn.Module, Weights] | None] = ContextVar("own_weights", default=None)


@contextmanager
def isolated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """What happens inside leaves no trace in training.

    The module holds the averaged weights where training averages them, see `averaged_weights`.
    Modes, weights, buffers and random states are restored, and gradients are allowed even in
    Lightning's inference mode, see `evaluation_context`. All ranks use rank 0's buffers: after a
    step their BatchNorm statistics differ, and a measure must be that of one network. Forwards are
    in float32, or in float64 with the trainer's precision 64-true; if the module is `fast`, attacks
    search in bfloat16, see `fast_crafting`.

    Args:
        trainer: The trainer.
        module: The module, in eval mode inside.
    """
    with (
        averaged_weights(trainer, module),
        evaluation_context(module),
        _default_type_of_training(trainer, module),
        full_float32(module.device),
        fast_crafting(bool(getattr(module, "fast", False))),
    ):
        if trainer.world_size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)
        yield


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Gives a module in training the averaged weights, and its own back bit for bit.

    Averages are those of a `WeightAveraging` callback, Lightning's or this package's, anywhere
    among the trainer's callbacks. Nothing is exchanged outside of `fit`, before the first update,
    or where the module holds other weights already, averaged or early-stopped.

    Args:
        trainer: The trainer.
        module: The module.
    """
    average = _average_of(trainer, module) if own_weights(module) is None else None
    if average is None:
        yield
        return
    with _given_back(module):
        copy_weights(average, module)
        yield


@contextmanager
def swapped_weights(module: LightningModule, weights: Weights) -> Iterator[None]:
    """Gives a module other weights and buffers for a while, and its own back bit for bit.

    Args:
        module: The module.
        weights: A state dict of it, on any device.
    """
    with _given_back(module):
        module.load_state_dict(weights)
        yield


def own_weights(module: nn.Module) -> Weights | None:
    """What a module's parameters and buffers were before others were put in for a while.

    Args:
        module: The module.

    Returns:
        Copies by name, or `None` where the module holds its own.
    """
    return (_OWN.get() or {}).get(module)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers into a module of the same structure, on any device."""
    _copy(_tensors(target), _tensors(source))


def _average_of(trainer: Trainer, module: LightningModule) -> nn.Module | None:
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
def _given_back(module: nn.Module) -> Iterator[None]:
    """Whatever is copied into a module inside is undone at the end."""
    tensors, others = _tensors(module), _OWN.get() or {}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    token = _OWN.set({module: before, **others})
    try:
        yield
    finally:
        _OWN.reset(token)
        _copy(tensors, before)


@contextmanager
def _default_type_of_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Has forwards make tensors of the type that they make in training, if that is float64."""
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


@torch.no_grad()
def _copy(targets: Weights, sources: Weights) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
