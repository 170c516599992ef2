"""The batches of a run, which do not depend on the number of processes that share them."""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from robust_flatness.datamodules.images import LabeledImages
from robust_flatness.functional.noise import keyed_generator, keyed_seed


@dataclass(frozen=True)
class GlobalBatches:
    """The global batches of a run, and the share of one process in each of them.

    Order and noise are drawn for the global batch from seed, epoch and batch, and process r of W
    takes rows r, r + W, r + 2W, ... of each batch. So they depend neither on the number of
    processes nor on other draws nor on the device. The last batch of an epoch has the images that
    remain, without the W - 1 at most that cannot be shared evenly.

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

    def check(self, num_train: int) -> None:
        """Raises an error if batches cannot be shared evenly, or are larger than `num_train`."""
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
        """Returns the sampler of this process's positions in `images`, at `epoch`.

        It is PyTorch's, also on a single process, so that the order is that of several processes.
        """
        sampler: DistributedSampler[Any] = DistributedSampler(
            cast(Dataset[Any], images),  # only its length is used
            self.world_size,
            self.rank,
            # The sampler adds the epoch, so that a seed itself would repeat the next one's orders.
            seed=keyed_seed(self.seed, "order"),
            drop_last=True,
        )
        sampler.set_epoch(epoch)
        return sampler

    def noise(
        self, local_size: int, epoch: int, batch: int, *, columns: int = 3, shared: int = 0
    ) -> Tensor:
        """Draws this process's rows `(local_size, columns)` of the noise that augments a batch.

        The noise is uniform in [0, 1), on the CPU, so that all devices draw the same. The last
        `shared` columns have one value for the global batch; the first three do not depend on the
        number of `columns`.
        """
        generator = keyed_generator(self.seed, "augmentation", epoch, batch)
        size = local_size * self.world_size
        parts = [torch.rand(size, n, generator=generator) for n in (3, columns - 3)]
        noise = torch.cat(parts, 1)
        noise[:, columns - shared :] = noise[:1, columns - shared :].clone()
        return noise[self.rank :: self.world_size]


class MixedImages(Dataset[Any]):
    """Labeled images, followed by pseudo-labeled ones of the same size and on the same device.

    Example:
        >>> from robust_flatness.datamodules.images import ResidentImages
        >>> pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> parts = [ResidentImages(pixels, torch.tensor(labels)) for labels in ([1, 2], [3, 4])]
        >>> images, labels, unlabeled = MixedImages(*parts).__getitems__([3, 0])
        >>> labels.tolist(), unlabeled.tolist()
        ([4, 1], [True, False])
    """

    def __init__(self, labeled: LabeledImages, unlabeled: LabeledImages) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __len__(self) -> int:
        """Returns the number of all images."""
        return len(self.labeled) + len(self.unlabeled)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images `(N, C, H, W)`, labels `(N,)`, and which are pseudo-labels `(N,)`."""
        positions = torch.as_tensor(indices)
        unlabeled = positions >= len(self.labeled)
        parts = [
            source.__getitems__(part.tolist())
            for source, part in (
                (self.labeled, positions[~unlabeled]),
                (self.unlabeled, positions[unlabeled] - len(self.labeled)),
            )
            if len(part)
        ]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        # The parts have the labeled images first; `order` restores the order of `indices`.
        order = unlabeled.int().argsort(stable=True).argsort()
        order, unlabeled = (t.to(images.device, non_blocking=True) for t in (order, unlabeled))
        return images[order], labels[order], unlabeled


class MixedSampler(DistributedSampler[int]):
    """Samples the positions in `MixedImages` of one process's rows of each batch.

    Each global batch of B images has exactly `round(share * B)` pseudo-labeled ones. Both kinds are
    drawn without replacement, one permutation after the other, which continue from epoch to epoch.
    (The code of the paper and of Carmon et al. draws pseudo-labeled images with replacement.) An
    epoch has as many batches as the labeled images alone would have, the last one smaller. Each
    global batch is shuffled before it is shared, so that BatchNorm sees a mixture on each process.

    All of it follows from seed and epoch, so that a resumed run continues exactly. Lightning calls
    `set_epoch`, and does not replace a `DistributedSampler`.

    Example:
        >>> from robust_flatness.datamodules.images import ResidentImages
        >>> part = ResidentImages(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8))
        >>> one = GlobalBatches(batch_size=4, world_size=1, rank=0, seed=0)
        >>> positions = list(MixedSampler(MixedImages(part, part), one, share=0.25))
        >>> (torch.tensor(positions).view(2, 4) >= 8).sum(1)
        tensor([1, 1])
    """

    def __init__(self, images: MixedImages, batches: GlobalBatches, share: float) -> None:
        super().__init__(images, batches.world_size, batches.rank, seed=batches.seed)
        self.images = images
        self.num_samples = len(images.labeled) // batches.world_size
        self.total_size = self.num_samples * batches.world_size
        whole, rest = divmod(len(images.labeled), batches.batch_size)
        sizes = [batches.batch_size] * whole + [rest] * (rest > 0)
        self.num_unlabeled = [round(share * size) for size in sizes]
        self.num_labeled = [size - num for size, num in zip(sizes, self.num_unlabeled)]

    def __iter__(self) -> Iterator[int]:
        """Yields this process's positions in the epoch of `set_epoch`."""
        num_labeled = len(self.images.labeled)
        labeled = self._positions("labeled", num_labeled, self.num_labeled)
        unlabeled = self._positions("unlabeled", len(self.images.unlabeled), self.num_unlabeled)
        generator = keyed_generator(self.seed, "order", self.epoch)
        for ours, others in zip(labeled, unlabeled):
            batch = torch.cat([ours, others + num_labeled])
            order = torch.rand(len(batch), generator=generator).argsort()
            # The images that cannot be shared evenly count as seen, as on a single process.
            even = len(batch) - len(batch) % self.num_replicas
            yield from batch[order][self.rank : even : self.num_replicas].tolist()

    def _positions(self, kind: str, population: int, counts: list[int]) -> tuple[Tensor, ...]:
        """Returns `counts[i]` positions for each batch i of the epoch."""
        total = sum(counts)
        first, end = self.epoch * total, (self.epoch + 1) * total
        passes = range(first // population, end // population + 1)
        permutations = [
            torch.randperm(population, generator=keyed_generator(self.seed, kind, number))
            for number in passes
        ]
        start = first - passes.start * population
        return torch.cat(permutations)[start : start + total].split(counts)
