"""Random numbers of a training step, the same on any number of processes."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from robust_flatness.functional.attack import PGD, Criterion, example_losses
from robust_flatness.functional.evaluation import Model
from robust_flatness.functional.noise import keyed_generator, keyed_seed


@dataclass(frozen=True)
class BatchNoise:
    """Random numbers of one training step, the same on any number of processes.

    They are drawn for the global batch, from the seed, a purpose and the number of batches before,
    and each process takes every `world_size`-th row, as Lightning's `DistributedSampler` assigns
    examples. So two processes train as one, and a resumed run continues exactly.

    Args:
        seed: The run's seed.
        step: Number of training batches before this one, over all epochs.
        rank: Number of this process.
        world_size: Number of processes.

    Example:
        >>> whole = BatchNoise(seed=0, step=3).uniform("labels", 4, 1)
        >>> half = BatchNoise(seed=0, step=3, rank=1, world_size=2).uniform("labels", 2, 1)
        >>> torch.equal(half, whole[1::2])
        True
    """

    seed: int
    step: int
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, trainer: Any, seed: int) -> "BatchNoise":
        """The noise of a Lightning trainer's current batch; its checkpoints hold the number."""
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        return cls(seed, step, trainer.global_rank, trainer.world_size)

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that gives the same numbers on every process."""
        return keyed_generator(self.seed, purpose, self.step, device=device)

    def uniform(
        self, purpose: str, count: int, columns: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """This process's rows `(count, columns)` of uniform numbers in [0, 1)."""
        shape, generator = (self.world_size * count, columns), self.generator(purpose, device)
        numbers = torch.rand(shape, generator=generator, device=device)
        return numbers[self.rank :: self.world_size]

    def starts(self, pgd: PGD, shape: Sequence[int], purpose: str, device: torch.device) -> Tensor:
        """This process's random starts of an attack, of shape `(N, C, H, W)`."""
        whole = (self.world_size * shape[0], *shape[1:])
        starts = pgd.draw_start(whole, self.generator(purpose, device))
        return starts[self.rank :: self.world_size]

    def craft(
        self,
        pgd: PGD,
        model: Model,
        images: Tensor,
        labels: Tensor,
        criterion: Criterion = example_losses,
        start: Tensor | None = None,
    ) -> Tensor:
        """Adversarial examples for this process's part of the batch.

        Args:
            pgd: The attack.
            model: Maps images in [0, 1] to what `criterion` takes.
            images: `(N, C, H, W)` in [0, 1].
            labels: `(N,)`, or any target with N rows that `criterion` takes.
            criterion: Maps logits and labels to the losses `(N,)` to increase.
            start: Perturbations `(N, C, H, W)` to start from; `None` draws them. A second attack in
                a step needs starts of another purpose, see `starts`.

        Returns:
            `(N, C, H, W)` in [0, 1], without a graph, in the type of `images`.
        """
        if len(images) == 0:
            return images
        if start is None:
            start = self.starts(pgd, images.shape, "start", images.device)
        # The attack is in float32 at least; training may be in half precision.
        return pgd.attack(model, images, labels, start, criterion).images.to(images.dtype)

    @contextmanager
    def dropout(self, network: nn.Module, device: torch.device) -> Iterator[None]:
        """Seeds what Dropout draws inside; without Dropout the random state is not touched."""
        if not any(isinstance(m, _DropoutNd) and m.p > 0 for m in network.modules()):
            yield
            return
        with forked_random_state(device):
            torch.manual_seed(keyed_seed(self.seed, "dropout", self.step, self.rank))
            yield


def agreed_seed(trainer: Any, seed: int | None) -> int:
    """The seed of a Lightning trainer's first process; `None` is that of PyTorch."""
    return int(trainer.strategy.broadcast(torch.initial_seed() if seed is None else seed))


def forked_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random states of the CPU and of one device afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
