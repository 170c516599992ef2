"""Labelled images that stay in their files until they are asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from robust_flatness.datamodules.images import Batch, LabelledImages

_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TRANSPARENT = "it has transparent pixels, so put them on a background"


class ImageFiles(LabelledImages):
    """Image files of any kind that Pillow reads, as RGB images of 8 bits, all of one size.

    Pixels of 16 bits are rounded to 8. What has no clear value in 8 bits is refused: floats,
    integers of 32 bits, transparent pixels, several frames.

    Args:
        paths: the files, at least one.
        labels: label of each file, integers `(N,)`.
        size: width and height in pixels; `None` for those of the first file.

    Raises:
        ValueError: if there is no file, if the number of labels is another, or if the first file
            is no image.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 4), color=255).save(Path(folder, "white.png"))
        ...     pixels, label = ImageFiles([Path(folder, "white.png")], torch.tensor([1]))[0]
        >>> pixels.shape, int(pixels.min()), label
        (torch.Size([3, 4, 4]), 255, 1)
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, size: tuple[int, int] | None = None
    ) -> None:
        if not paths or len(paths) != len(labels):
            raise ValueError(
                "Expected at least 1 path and as many `labels` as `paths`"
                f" but got {len(labels)} and {len(paths)}."
            )
        self.paths = list(paths)
        self.labels = labels.long()
        self.size = _open(self.paths[0]).size if size is None else size

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Read the images at `indices`.

        Raises:
            ValueError: if a file is no image, is damaged or of a refused kind, or has another size.
        """
        images = torch.stack([self._read(self.paths[index]) for index in indices])
        return images, self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Sequence[int]) -> "ImageFiles":
        """Return the files at `indices`; none of them is read."""
        chosen = torch.as_tensor(indices)
        return ImageFiles([self.paths[index] for index in indices], self.labels[chosen], self.size)

    def _read(self, path: Path) -> Tensor:
        image = _open(path)
        if image.size != self.size:
            raise ValueError(
                "Expected images of one size, {}x{} pixels, but got {}x{} in {}.".format(
                    *self.size, *image.size, path
                )
            )
        return pil_to_tensor(image)


def _open(path: Path) -> Image.Image:
    """Decode a file to an RGB image of 8 bits, or refuse it in a sentence."""
    try:
        with Image.open(path) as image:
            if reason := _refusal(image):
                raise ValueError(reason)
            if image.mode in _SIXTEEN_BITS:
                image = _to_8_bits(image)
            elif image.has_transparency_data:
                image = _without_alpha(image)
            return image.convert("RGB")
    # Damaged files raise almost anything, and some kinds of images cannot be converted.
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be an image but it cannot be read: {str(error).rstrip('.')}."
        ) from error


def _refusal(image: Image.Image) -> str | None:
    """Say why an image that is opened but not decoded cannot be used, or return `None`."""
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        return f"its {width}x{height} pixels are above Pillow's limit {Image.MAX_IMAGE_PIXELS}"
    # Photos of phones and cameras are MPO, whose first image is the photo.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        return f"it has {frames} frames, so choose one"
    if image.mode in ("F", "I") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        return (
            f"its pixels are {'floats' if image.mode == 'F' else 'integers of 32 bits'}, whose "
            "range is not known, so scale them to 8 or 16 bits"
        )
    if isinstance(image, TiffImageFile) and image.mode in _SIXTEEN_BITS:
        # Pillow neither stretches fewer bits nor turns negatives.
        bits, kind = image.tag_v2.get(BITSPERSAMPLE), image.tag_v2.get(PHOTOMETRIC_INTERPRETATION)
        if bits != (16,) or kind != 1:
            return "it is a TIFF of 12 bits or a negative, so save it with 16 bits, black as 0"
    return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Round pixels in 0 to 65535 to those in 0 to 255."""
    pixels = np.asarray(image).astype(np.uint32)
    if pixels.max() > 65535:
        raise ValueError("it has pixels above 65535, so scale them to 8 or 16 bits")
    if (transparent := image.info.get("transparency")) is not None and transparent in pixels:
        raise ValueError(_TRANSPARENT)
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    """Drop an alpha channel that changes nothing."""
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        raise ValueError(_TRANSPARENT)
    return image
