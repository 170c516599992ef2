"""A place to measure a network in the middle of training without training noticing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from robust_flatness.functional.modes import differentiable


@contextmanager
def isolated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """What happens inside leaves no trace in training.

    Modes are saved per module and restored, global random state is forked, gradients are allowed
    even in Lightning's inference mode, and all ranks use rank 0's buffers: BatchNorm statistics
    drift apart in training, and a measure must be that of one network.

    Args:
        trainer: The trainer.
        module: The module, in eval mode inside.
    """
    devices = [module.device] if module.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        differentiable(module, "eval"),
        _buffers_of_rank_zero(trainer, module),
    ):
        yield


@contextmanager
def _buffers_of_rank_zero(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    if trainer.world_size == 1:
        yield
        return
    buffers = list(module.buffers())
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        torch.distributed.broadcast(buffer, src=0)
    try:
        yield
    finally:
        _copy(buffers, own)


@contextmanager
def swapped_weights(module: LightningModule, weights: dict[str, Tensor]) -> Iterator[None]:
    """Gives a module other weights and buffers for a while, and its own back bit for bit.

    Args:
        module: The module.
        weights: A state dict of it, on any device.
    """
    own = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(weights)
    try:
        yield
    finally:
        module.load_state_dict(own)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.copy_(source)
