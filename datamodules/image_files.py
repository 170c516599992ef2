"""Labelled images that stay in their files until they are asked for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from robust_flatness.datamodules.labelled_images import Batch, LabelledImages


class ImageFiles(LabelledImages):
    """Image files of any kind that Pillow reads, as RGB images of 8 bits, all of one size.

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
            ValueError: if a file is no image, is damaged, or has another size.
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
    """Decode a file, whose end may be missing, to an RGB image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"Expected {path} to be an image but it cannot be read: {error}."
        ) from error
