"""How several processes train on the batches that a single one would have."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler


@dataclass(frozen=True)
class GlobalBatches:
    """The global batches of a run and the share of one process in each of them.

    Order and noise are drawn for the global batch, from the seed and from where training stands,
    and process r of W takes rows r, r + W, r + 2W, ... of each batch. So the number of processes
    changes nothing, nor does what was drawn in between, nor the device. The last batch of an epoch
    has the images that remain, without the W - 1 at most that cannot be shared evenly.

    Args:
        batch_size: number of images in a global batch.
        world_size: number W of processes.
        rank: number r of this process, from 0.
        seed: seed of the run, the same on each process.

    Example:
        >>> one = GlobalBatches(batch_size=4, world_size=1, rank=0, seed=0)
        >>> two = [GlobalBatches(batch_size=4, world_size=2, rank=r, seed=0) for r in range(2)]
        >>> order = list(one.sampler(range(8), epoch=0))
        >>> order[0::2] == list(two[0].sampler(range(8), epoch=0))
        True
        >>> bool((one.noise(4, 0, 0)[1::2] == two[1].noise(2, 0, 0)).all())
        True
    """

    batch_size: int
    world_size: int
    rank: int
    seed: int

    @property
    def local_size(self) -> int:
        """Number of images that this process takes of each batch."""
        return self.batch_size // self.world_size

    def check(self, num_train: int) -> None:
        """Make sure that batches can be shared evenly and that there is at least one.

        Args:
            num_train: number of training images.

        Raises:
            ValueError: if the batch size is no multiple of the number of processes, or larger than
                the training set.
        """
        if self.batch_size % self.world_size:
            raise ValueError(
                f"Expected `batch_size` to be a multiple of the number of processes"
                f" {self.world_size} but got {self.batch_size}."
            )
        if self.batch_size > num_train:
            raise ValueError(
                f"Expected `batch_size` to be at most the number of training images {num_train}"
                f" but got {self.batch_size}."
            )

    def sampler(self, images: Sized, epoch: int) -> DistributedSampler[Any]:
        """Build the sampler of this process's positions in `images`, at `epoch`.

        It is the stock one, also on a single process, where it shuffles as those of several
        processes do together.
        """
        sampler: DistributedSampler[Any] = DistributedSampler(
            cast(Dataset[Any], images),  # only its length is used
            self.world_size,
            self.rank,
            seed=mix_seed(self.seed),
            drop_last=True,
        )
        sampler.set_epoch(epoch)
        return sampler

    def noise(
        self, local_size: int, epoch: int, batch: int, *, columns: int = 3, shared: int = 0
    ) -> Tensor:
        """Draw the noise that augments a batch.

        Args:
            local_size: number n of images in this process's share.
            epoch: number of the epoch, from 0.
            batch: number of the batch within the epoch, from 0.
            columns: numbers per image, >= 3. The first three are the same whatever it is.
            shared: how many columns, the last ones, have one value for the whole global batch.

        Returns:
            This process's rows `(n, columns)` of the global noise, uniform in [0, 1), on the CPU,
            so that all devices draw the same.
        """
        seed = mix_seed(mix_seed(self.seed) + epoch) + batch
        generator = torch.Generator().manual_seed(seed)
        size = local_size * self.world_size
        parts = [torch.rand(size, n, generator=generator) for n in (3, columns - 3)]
        noise = torch.cat(parts, 1)
        noise[:, columns - shared :] = noise[:1, columns - shared :].clone()
        return noise[self.rank :: self.world_size]


def epochs_trained(trainer: Trainer) -> int:
    """Return the number of epochs trained, also where a resumed trainer has not yet counted on."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def mix_seed(seed: int) -> int:
    """Spread seeds apart, so that epoch 1 of one seed is not epoch 0 of the next.

    Example:
        >>> mix_seed(1) - mix_seed(0)
        1000003
    """
    return (seed * 1_000_003) % 2**62
