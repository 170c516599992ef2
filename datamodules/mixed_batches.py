"""Batches of labelled and pseudo-labelled images, with an exact share of either in each."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from robust_flatness.datamodules.global_batches import GlobalBatches
from robust_flatness.datamodules.mixed_images import MixedImages
from robust_flatness.functional.checks import check_number
from robust_flatness.functional.noise import keyed_generator


class MixedSampler(DistributedSampler[int]):
    """Positions in `MixedImages` of one process's rows of each batch, batch after batch.

    Each global batch of B images has exactly `round(share * B)` pseudo-labelled ones. Either kind
    goes through one permutation after the other, so that each image is seen once a pass, and passes
    go on from epoch to epoch. An epoch has the batches that the labelled images alone would give,
    the last one smaller, so a pass through these takes about 1 / (1 - share) epochs. Each global
    batch is shuffled before it is shared out, so that BatchNorm sees a mixture on each process.

    The code of the paper and of Carmon et al. draws the pseudo-labelled images with replacement;
    without it, how often each was seen is known.

    All of it follows from seed and epoch, so that a resumed run goes on as if it had not stopped.
    Lightning calls `set_epoch`, and leaves a `DistributedSampler` in place.

    Args:
        images: the images of both kinds.
        batches: how processes share global batches.
        share: share of pseudo-labelled images in each global batch, in (0, 1].

    Raises:
        ValueError: if `share` is out of range, or gives an image of one kind only to each batch.

    Example:
        >>> from robust_flatness.datamodules.resident import ResidentImages
        >>> part = ResidentImages(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8))
        >>> one = GlobalBatches(batch_size=4, world_size=1, rank=0, seed=0)
        >>> positions = list(MixedSampler(MixedImages(part, part), one, share=0.25))
        >>> (torch.tensor(positions).view(2, 4) >= 8).sum(1)
        tensor([1, 1])
    """

    def __init__(self, images: MixedImages, batches: GlobalBatches, share: float) -> None:
        super().__init__(images, batches.world_size, batches.rank, seed=batches.seed)
        check_share(share, batches.batch_size)
        self.images = images
        self.batch_size = batches.batch_size
        self.num_samples = len(images.labelled) // batches.world_size
        self.total_size = self.num_samples * batches.world_size
        whole, rest = divmod(len(images.labelled), batches.batch_size)
        self.sizes = [batches.batch_size] * whole + [rest] * (rest > 0)
        self.share = share

    def __iter__(self) -> Iterator[int]:
        """Go through this process's positions in the epoch that was set."""
        labelled, unlabeled = self.images.labelled, self.images.unlabeled
        extra = [round(self.share * size) for size in self.sizes]
        own = [size - count for size, count in zip(self.sizes, extra)]
        generator = keyed_generator(self.seed, "order", self.epoch)
        for known, guessed in zip(
            self._take("labelled", len(labelled), own),
            self._take("unlabelled", len(unlabeled), extra),
        ):
            batch = torch.cat([known, guessed + len(labelled)])
            order = torch.rand(len(batch), generator=generator).argsort()
            # Without what cannot be shared evenly: the passes still go on as on one process.
            even = len(batch) - len(batch) % self.num_replicas
            yield from batch[order][self.rank : even : self.num_replicas].tolist()

    def _take(self, kind: str, population: int, counts: list[int]) -> tuple[Tensor, ...]:
        """Return positions for each batch of the epoch, of an endless row of permutations."""
        total = sum(counts)
        first, end = self.epoch * total, (self.epoch + 1) * total
        passes = range(first // population, end // population + 1)
        permutations = [
            torch.randperm(population, generator=keyed_generator(self.seed, kind, number))
            for number in passes
        ]
        start = first - passes.start * population
        return torch.cat(permutations)[start : start + total].split(counts)


def check_share(share: float, batch_size: int) -> None:
    """Make sure that a share can be had: of 0, 1, or with at least one image of each kind.

    Args:
        share: share of pseudo-labelled images in each global batch.
        batch_size: images in a global batch.

    Raises:
        ValueError: if it cannot.

    Example:
        >>> check_share(1.5, 8)
        Traceback (most recent call last):
        ValueError: Expected `unlabeled_share` to be in [0, 1] but got 1.5.
    """
    check_number("unlabeled_share", share, low=0, high=1)
    if 0 < share < 1 and not 0 < round(share * batch_size) < batch_size:
        raise ValueError(
            f"Expected `unlabeled_share` to give each batch of {batch_size} images of both kinds"
            f" but got {share}."
        )
