"""Image files that are read when they are needed, and folders of them with one folder per class."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms.functional import pil_to_tensor

from robust_flatness.datamodules.images import Batch, LabeledImages

_ENDINGS = ", ".join(IMG_EXTENSIONS)
_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_TRANSPARENT = "it has transparent pixels, so put them on a background"


class ImageFiles(LabeledImages):
    """Image files of any format that Pillow reads, as RGB images of 8 bits and of one size.

    Pixels of 16 bits are rounded to 8. Images without a clear value in 8 bits are refused: floats,
    integers of 32 bits, transparent pixels, several frames.

    Args:
        paths: The files, at least one.
        labels: Label of each file, integers `(N,)`.
        size: Width and height in pixels; `None` for those of the first file.

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
        self.paths = list(paths)
        self.labels = labels.long()
        self.size = _open(self.paths[0]).size if size is None else size

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Reads the images at `indices`.

        Raises:
            ValueError: If a file is damaged, is no image, is refused, or has another size.
        """
        images = torch.stack([self._read(self.paths[index]) for index in indices])
        return images, self.labels[torch.as_tensor(indices)]

    def subset(self, indices: Sequence[int]) -> "ImageFiles":
        """Returns the files at `indices` and reads none of them."""
        labels = self.labels[torch.as_tensor(indices)]
        return ImageFiles([self.paths[index] for index in indices], labels, self.size)

    def _read(self, path: Path) -> Tensor:
        image = _open(path)
        if image.size != self.size:
            raise ValueError(
                "Expected images of one size, {}x{} pixels, but got {}x{} in {}.".format(
                    *self.size, *image.size, path
                )
            )
        return pil_to_tensor(image)


def class_folders(parent: Path) -> list[str]:
    """Returns the names of the folders in `parent`, at least one, sorted, without hidden ones."""
    if not parent.is_dir():
        raise ValueError(f"Expected a folder {parent} with one folder per class but got none.")
    _, folders, _ = next(os.walk(parent, onerror=_raise_unreadable))
    names = sorted(name for name in folders if not name.startswith("."))
    if not names:
        raise ValueError(f"Expected one folder per class in {parent} but got none.")
    return names


def read_class_folders(
    parent: Path, class_names: Sequence[str], size: tuple[int, int] | None = None
) -> tuple[ImageFiles, list[Path]]:
    """Lists the image files in `parent/<class>/`, at any depth, and other visible files.

    `torchvision.datasets.ImageFolder` is not used: it takes hidden files and folders, of which file
    managers and notebooks make copies under the images' names, follows links in circles, and opens
    FIFOs. Here links are followed, a folder is read once for each class even if several links lead
    to it, and a link to a folder above it is skipped. Folders of `class_names` may be missing.
    """
    _, _, names = next(os.walk(parent, onerror=_raise_unreadable))
    left_out = [parent / name for name in sorted(names) if not name.startswith(".")]
    paths: list[Path] = []
    labels: list[int] = []
    for name in class_folders(parent):
        images, others = _image_paths(parent / name)
        paths += images
        labels += [class_names.index(name)] * len(images)
        left_out += others
    return ImageFiles(paths, torch.tensor(labels), size), left_out


def warn_left_out(paths: Sequence[Path]) -> None:
    """Warns about files in class folders that are not images by their names, if there are any."""
    if paths:
        rank_zero_warn(
            f"Files left out, as they are not images in a class folder: {len(paths)}, such as "
            f"{paths[0]}; names of images end in {_ENDINGS}."
        )


def _image_paths(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the images in `folder`, sorted by path, and the other visible files."""
    images: list[Path] = []
    others: list[Path] = []
    seen = {os.path.realpath(above) for above in folder.absolute().parents}
    for here, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [
            name
            for name in sorted(folders, reverse=True)
            if not name.startswith(".")
            # A link to a folder above this one would add the images of all other classes.
            and not Path(real).is_relative_to(os.path.realpath(os.path.join(here, name)))
        ]
        for path in (Path(here, name) for name in sorted(names) if not name.startswith(".")):
            if not is_image_file(path.name):
                others.append(path)
            elif os.path.isfile(path):
                images.append(path)
            else:
                # Opening a FIFO would wait for a writer forever.
                raise ValueError(
                    f"Expected {path} to be a file but it is a FIFO, a device, a socket or a broken"
                    " link."
                )
    if not images:
        raise ValueError(
            f"Expected images in {folder} but got none: names of images end in {_ENDINGS}."
        )
    return sorted(images, key=str), others


def _raise_unreadable(error: OSError) -> NoReturn:
    raise ValueError(
        f"Expected {error.filename} to be a folder that can be read but got {error.strerror}."
    ) from error


def _open(path: Path) -> Image.Image:
    """Decodes a file to an RGB image of 8 bits."""
    try:
        with Image.open(path) as image:
            _check_pixels(image)
            if image.mode in _SIXTEEN_BITS:
                image = _to_8_bits(image)
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema() != (255, 255):
                    raise ValueError(_TRANSPARENT)
            return image.convert("RGB")
    # Damaged files raise errors of almost any type, and some images cannot be converted.
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be an image but it cannot be read: {str(error).rstrip('.')}."
        ) from error


def _check_pixels(image: Image.Image) -> None:
    """Raises an error if the pixels of an image that is not decoded yet have no value in 8 bits."""
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"its {width}x{height} pixels are above Pillow's limit {Image.MAX_IMAGE_PIXELS}"
        )
    # Photos of phones and cameras are MPO files, whose first image is the photo.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise ValueError(f"it has {frames} frames, so choose one")
    if image.mode in ("F", "I") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(
            f"its pixels are {kind}, whose range is not known, so scale them to 8 or 16 bits"
        )
    if isinstance(image, TiffImageFile) and image.mode in _SIXTEEN_BITS:
        # Pillow neither scales fewer bits nor inverts negatives.
        tags = image.tag_v2
        if tags.get(BITSPERSAMPLE) != (16,) or tags.get(PHOTOMETRIC_INTERPRETATION) != 1:
            raise ValueError(
                "it is a TIFF of 12 bits or a negative, so save it with 16 bits, black as 0"
            )


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Rounds pixels in 0 to 65535 to pixels in 0 to 255."""
    pixels = np.asarray(image).astype(np.uint32)
    if pixels.max() > 65535:
        raise ValueError("it has pixels above 65535, so scale them to 8 or 16 bits")
    if (transparent := image.info.get("transparency")) is not None and transparent in pixels:
        raise ValueError(_TRANSPARENT)
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
