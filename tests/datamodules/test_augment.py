import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from robust_flatness.datamodules import random_flip_and_crop


def one_by_one(images, noise, padding):
    """Flip, pad and slice each image on its own."""
    out = []
    for image, (flip, top, left) in zip(images, noise.tolist(), strict=True):
        y, x = (min(int(u * (2 * padding + 1)), 2 * padding) for u in (top, left))
        height, width = image.shape[1:]
        crop = F.pad(image, [padding] * 4)[:, y : y + height, x : x + width]
        out.append(crop.flip(2) if flip < 0.5 else crop)
    return torch.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (4, 3, 6, 7)]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
)
def test_it_is_flip_pad_and_crop(shape, padding, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, shape, generator=generator).to(dtype)
    noise = torch.rand(shape[0], 3, generator=generator)
    before = images.clone(), noise.clone()
    out = random_flip_and_crop(images, noise, padding)
    assert torch.equal(out, one_by_one(images, noise, padding))
    assert (out.shape, out.dtype) == (images.shape, dtype)
    assert out.is_contiguous()
    assert torch.equal(images, before[0])
    assert torch.equal(noise, before[1])


@given(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1, max_size=5))
def test_pixels_come_from_the_image_or_are_zero(rows):
    images = torch.arange(1, 1 + 16 * len(rows)).view(len(rows), 1, 4, 4)
    out = random_flip_and_crop(images, torch.tensor(rows), padding=2)
    for image, augmented in zip(images, out, strict=True):
        kept = augmented[augmented > 0].tolist()
        assert set(kept) <= set(image.flatten().tolist())
        assert len(kept) == len(set(kept))
        assert len(kept) >= 4


def test_half_are_flipped_and_all_positions_are_used():
    noise = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    images = torch.arange(1, 17).view(1, 1, 4, 4).expand(4000, -1, -1, -1)
    out = random_flip_and_crop(images, noise, padding=1).flatten(1)
    outcomes, counts = out.unique(dim=0, return_counts=True)
    assert len(outcomes) == 2 * 9
    assert counts.min() > 150


def test_padding_has_the_colour_asked_for_and_flips_can_be_off():
    images = torch.full((2, 3, 4, 4), 9, dtype=torch.uint8)
    images[..., 0] = 8
    before = images.clone()
    corner = torch.tensor([[0.1, 0.0, 0.0], [0.1, 0.5, 0.5]])
    out = random_flip_and_crop(images, corner, 2, flip=False, fill=[1, 2, 3])
    assert out.dtype is torch.uint8
    assert out[0, :, 0, 0].tolist() == [1, 2, 3]
    assert out[0, 1].tolist() == [[2] * 4, [2] * 4, [2, 2, 8, 9], [2, 2, 8, 9]]
    assert torch.equal(out[1], images[1])
    assert torch.equal(images, before)
    noise = torch.rand(2, 3)
    zeros = random_flip_and_crop(images, noise, 3, fill=[0, 0, 0])
    assert torch.equal(zeros, random_flip_and_crop(images, noise, 3))


@pytest.mark.parametrize(
    ("shape", "noise", "padding", "message"),
    [
        ((1, 4, 4), (1, 3), 4, r"got \(1, 4, 4\) and \(1, 3\)"),
        ((2, 1, 4, 4), (1, 3), 4, r"got \(2, 1, 4, 4\) and \(1, 3\)"),
        ((2, 1, 4, 4), (2, 3), -1, "Expected `padding` to be >= 0 but got -1"),
    ],
)
def test_what_does_not_fit_is_refused(shape, noise, padding, message):
    with pytest.raises(ValueError, match=message):
        random_flip_and_crop(torch.zeros(shape), torch.zeros(noise), padding)


def test_a_colour_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="`fill` to have a value for each of 3 channels but got 1"):
        random_flip_and_crop(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3), fill=[0.5])
