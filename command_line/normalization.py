"""Datamodules of the user's own that deliver normalised images, and say so in `normalization`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from robust_flatness.callbacks.fixed_images import ROUNDING
from robust_flatness.lightning_modules import AT, External
from robust_flatness.networks import Normalize


def undo_normalization(
    data: LightningDataModule, model: LightningModule, callbacks: Sequence[Callback]
) -> None:
    """Has normalised images measured, and trained on, as pixels in [0, 1].

    Callbacks take the `normalization` of the data, `(mean, std)` of each channel, unless they have
    one of their own, and a module of the user's own takes the images as they are delivered. Modules
    of this package take pixels: for them it is undone as each batch arrives.
    """
    normalization = getattr(data, "normalization", None)
    if normalization is None:
        return
    try:
        mean, std = (list(map(float, values)) for values in normalization)
        Normalize(mean, std)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `normalization` of {type(data).__name__} to be (mean, std), a finite number "
            f"and one > 0 for each channel, but got {normalization}."
        ) from error
    if isinstance(model, (AT, External)):
        data.on_after_batch_transfer = partial(_to_pixels, data, mean, std)  # type: ignore[method-assign]
        return
    for callback in callbacks:
        if getattr(callback, "normalization", std) is None:
            callback.normalization = (mean, std)  # type: ignore[attr-defined]


def _to_pixels(
    data: LightningDataModule,
    mean: Sequence[float],
    std: Sequence[float],
    batch: Any,
    dataloader_idx: int,
) -> Any:
    """The batch of the data's own hook, with images in [0, 1]."""
    batch = type(data).on_after_batch_transfer(data, batch, dataloader_idx)
    if not isinstance(batch, (list, tuple)):
        raise ValueError(
            f"Expected batches (images, labels) of {type(data).__name__} but got "
            f"{type(batch).__name__}."
        )
    images, *rest = batch
    scale, shift = (images.new_tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = images * scale + shift
    rounded = (pixels >= -ROUNDING) & (pixels <= 1 + ROUNDING)
    # Others were not normalised like this, which the first batch's check says.
    return [torch.where(rounded, pixels.clamp(0, 1), pixels), *rest]
