"""Datamodules of the user that deliver normalised images, and say so in `normalization`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from robust_flatness.callbacks.examples import ROUNDING, Normalization
from robust_flatness.functional.checks import check_number
from robust_flatness.lightning_modules import AT, External


def hand_on_normalization(
    data: LightningDataModule, model: LightningModule, callbacks: Sequence[Callback]
) -> None:
    """Has normalised images measured, and trained on, as pixels in [0, 1].

    A module of the user's own takes the images as the data delivers them: the callbacks are told
    how they were normalised. The modules of this package take pixels and normalise inside of the
    network: for them the normalisation is undone as each batch arrives.

    Args:
        data: May have `normalization`, its `(mean, std)` of each channel.
        model: That trains or is tested.
        callbacks: Those that have a `normalization` of their own keep it.

    Raises:
        ValueError: If `normalization` is something else.
    """
    normalization = getattr(data, "normalization", None)
    if normalization is None:
        return
    checked = _checked(normalization, type(data).__name__)
    if isinstance(model, (AT, External)):
        data.on_after_batch_transfer = partial(_pixels, data, checked)  # type: ignore[method-assign]
        return
    for callback in callbacks:
        for measure in (callback, *getattr(callback, "measurements", ())):
            if getattr(measure, "normalization", checked) is None:
                measure.normalization = checked


def _checked(normalization: Any, owner: str) -> Normalization:
    try:
        mean, std = ([float(value) for value in values] for values in normalization)
        for value in mean:
            check_number("mean", value, low=-float("inf"))
        for value in std:
            check_number("std", value, low=torch.finfo(torch.float32).tiny)
        if len(mean) != len(std) or not mean:
            raise ValueError("their lengths differ")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `normalization` of {owner} to be (mean, std), a finite number and one > 0 "
            f"for each channel, but got {normalization}."
        ) from error
    return mean, std


def _pixels(
    data: LightningDataModule, normalization: Normalization, batch: Any, dataloader_idx: int
) -> Any:
    """The batch of the data's own hook, with images in [0, 1]."""
    batch = type(data).on_after_batch_transfer(data, batch, dataloader_idx)
    if not isinstance(batch, (list, tuple)):
        raise ValueError(
            f"Expected batches (images, labels) of {type(data).__name__} but got "
            f"{type(batch).__name__}."
        )
    images, *rest = batch
    mean, std = (images.new_tensor(list(values)).view(-1, 1, 1) for values in normalization)
    pixels = images * std + mean
    rounded = (pixels >= -ROUNDING) & (pixels <= 1 + ROUNDING)
    # Others were not normalised like this, which the first batch's check says.
    return [torch.where(rounded, pixels.clamp(0, 1), pixels), *rest]
