"""The loader of one process's share of the training batches."""

from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.datamodules.images import LabelledImages, keep_batch
from robust_flatness.datamodules.mixed_batches import MixedSampler
from robust_flatness.datamodules.mixed_images import MixedImages


def training_loader(
    images: LabelledImages,
    unlabeled: LabelledImages | None,
    share: float,
    *,
    batches: GlobalBatches,
    epoch: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Build a loader of batches of 8 bits a pixel; the last one of an epoch may be smaller.

    Args:
        images: the labelled images.
        unlabeled: pseudo-labelled images to mix in; `None` for none.
        share: share of these in each global batch.
        batches: how processes share global batches.
        epoch: number of the epoch that comes first. Workers fetch as soon as there is an iterator,
            which on resume is before the trainer tells the sampler its epoch.
        num_workers: processes that read images.
        pin_memory: whether batches are copied to pinned memory.

    Returns:
        A loader of `(images, labels)`, or of `(images, labels, unlabeled)` where some are mixed in.
    """
    dataset: Dataset[Any] = images
    sampler: DistributedSampler[Any] = batches.sampler(images, epoch)
    if unlabeled is not None:
        dataset = mixed = MixedImages(images, unlabeled)
        sampler = MixedSampler(mixed, batches, share)
        sampler.set_epoch(epoch)
    return DataLoader(
        dataset,
        batches.local_size,
        sampler=sampler,
        collate_fn=keep_batch,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )
