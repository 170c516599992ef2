import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from robust_flatness.datamodules.image_files import ImageFiles

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (6, 8), dtype=np.uint8)
GRAY_16 = RANDOM.integers(0, 65536, (6, 8), dtype=np.uint16)
COLOUR = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(COLOUR)


def with_alpha(image: Image.Image, alpha: int) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


def tiff(bits: int, *, negative: bool = False, signed: bool = False) -> bytes:
    """A gray image of 2x2 black pixels that Pillow reads but does not write."""
    data = bytes(bits)
    tags = [(256, 2), (257, 2), (258, bits), (259, 1), (262, 0 if negative else 1), (273, 8)]
    tags += [(277, 1), (278, 2), (279, len(data)), (339, 2 if signed else 1)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def read(path: Path) -> torch.Tensor:
    return ImageFiles([path], torch.tensor([0]))[0][0].permute(1, 2, 0)


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.fromarray(GRAY_16), "x.png", GRAY_16 / 257),
        (Image.fromarray(GRAY_16), "x.tif", GRAY_16 / 257),
        (Image.fromarray(GRAY_16.astype(">u2")), "x.tif", GRAY_16 / 257),
        (Image.fromarray(GRAY_16), "x.pgm", GRAY_16 / 257),
        (Image.fromarray(GRAY), "x.png", GRAY),
        (Image.fromarray(GRAY > 99), "x.png", 255.0 * (GRAY > 99)),
        (Image.fromarray(GRAY > 99), "x.tif", 255.0 * (GRAY > 99)),
        (with_alpha(Image.fromarray(GRAY), 255), "x.png", GRAY),
        (PICTURE, "x.webp", COLOUR),
        (with_alpha(PICTURE, 255), "x.png", COLOUR),
        (PICTURE.quantize(256), "x.png", COLOUR),
        (PICTURE.convert("CMYK"), "x.tif", COLOUR),
    ],
)
def test_pixels_are_those_of_the_image_in_8_bits(tmp_path, image, name, expected):
    save = {"lossless": True} if name.endswith("webp") else {}
    image.save(tmp_path / name, **save)
    pixels = torch.from_numpy(np.asarray(expected, dtype=float))
    pixels = pixels if pixels.ndim == 3 else pixels[..., None].expand(-1, -1, 3)
    assert (read(tmp_path / name) - pixels).abs().max() <= 0.5


def test_a_transparent_color_that_no_pixel_has_changes_nothing(tmp_path):
    Image.fromarray(GRAY_16).save(
        tmp_path / "x.png", transparency=next(iter({*range(65536)} - {*GRAY_16.flat}))
    )
    assert (read(tmp_path / "x.png")[..., 0] - torch.from_numpy(GRAY_16 / 257)).abs().max() <= 0.5


def frames(path: Path, kind: str) -> None:
    negative = Image.fromarray(255 - COLOUR)
    PICTURE.save(path, format=kind, save_all=True, append_images=[negative])


def long_text(path: Path) -> None:
    text = PngInfo()
    text.add_text("comment", "a" * 2_000_000, zip=True)
    PICTURE.save(path, pnginfo=text)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: Image.fromarray(GRAY.astype(np.int32)).save(p, "TIFF"), "integers of 32 bits"),
        (lambda p: Image.fromarray((GRAY / 255).astype("f")).save(p, "TIFF"), "are floats"),
        (lambda p: p.write_bytes(tiff(12)), "TIFF of 12 bits or a negative"),
        (lambda p: p.write_bytes(tiff(16, negative=True)), "TIFF of 12 bits or a negative"),
        (lambda p: p.write_bytes(tiff(16, signed=True)), "integers of 32 bits"),
        (lambda p: p.write_bytes(tiff(32)), "integers of 32 bits"),
        (lambda p: with_alpha(PICTURE, 254).save(p), "transparent pixels"),
        (lambda p: with_alpha(Image.fromarray(GRAY), 0).save(p), "transparent pixels"),
        (lambda p: PICTURE.quantize(9).save(p, transparency=3), "transparent pixels"),
        (lambda p: PICTURE.save(p, transparency=tuple(map(int, COLOUR[0, 0]))), "transparent"),
        (lambda p: Image.fromarray(GRAY_16).save(p, transparency=int(GRAY_16[0, 0])), "transpar"),
        (lambda p: frames(p, "GIF"), "has 2 frames"),
        (lambda p: frames(p, "PNG"), "has 2 frames"),
        (lambda p: frames(p, "TIFF"), "has 2 frames"),
        (lambda p: frames(p, "WEBP"), "has 2 frames"),
        (long_text, "too large"),
        (lambda p: p.write_bytes(b""), "cannot identify image"),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), "cannot be read"),
    ],
)
def test_what_has_no_clear_pixels_is_refused_by_name(tmp_path, write, message):
    write(tmp_path / "x.png")
    with pytest.raises(ValueError, match=rf"Expected .*x.png to be an image .*{message}"):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("limit", [30, 20])
@pytest.mark.filterwarnings("ignore:Image size")
def test_images_above_pillows_limit_are_refused_by_name(tmp_path, monkeypatch, limit):
    PICTURE.save(tmp_path / "x.png")
    # Pillow warns above it and raises above twice of it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"Expected .*x.png .* limit"):
        read(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert torch.equal(read(tmp_path / "x.png"), torch.from_numpy(COLOUR))
