import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from robust_flatness.datamodules import autoaugment, cutout

MEAN = [125, 123, 114]


def some_images(n, channels=3, side=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def noise_of(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(4))


def one_by_one(images, noise, fill):
    """What torchvision makes of each image, with a global generator seeded by its noise."""
    policy, out = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=fill), []
    for image, value in zip(images, noise.tolist(), strict=True):
        torch.manual_seed(int(value * 2**24))
        out.append(policy(image))
    return torch.stack(out)


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 8)])
def test_each_image_gets_torchvision_s_policy_by_its_own_noise(channels, side):
    images, noise = some_images(60, channels, side), noise_of(60)
    before = images.clone()
    out = autoaugment(images, noise, MEAN[:channels])
    assert torch.equal(out, one_by_one(images, noise, MEAN[:channels]))
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    assert 30 < sum(not torch.equal(*pair) for pair in zip(out, images, strict=True)) < 60


def test_a_single_value_is_one_policy_for_all():
    images = some_images(6)
    for value in noise_of(20).tolist():
        together = autoaugment(images, torch.tensor([value]), MEAN)
        assert torch.equal(together, autoaugment(images, torch.full((6,), value), MEAN))
    copies = images[:1].expand(6, -1, -1, -1)
    apart = autoaugment(copies, noise_of(6), MEAN)
    assert not torch.equal(apart, apart[:1].expand_as(apart))


def test_all_sub_policies_are_drawn_evenly(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        AutoAugment, "forward", lambda self, x: drawn.append(int(torch.randint(25, ()))) or x
    )
    autoaugment(some_images(5000, 1, 1), noise_of(5000), [0])
    counts = torch.tensor(drawn).bincount(minlength=25)
    # 200 each, with a standard deviation of 14.
    assert 140 < counts.min() < counts.max() < 260


def test_global_generators_neither_matter_nor_change(monkeypatch):
    images, noise = some_images(8), noise_of(8)
    first = autoaugment(images, noise, MEAN)
    torch.manual_seed(1)
    # `torch.manual_seed` would come by here.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds devices"))
    state = torch.get_rng_state()
    assert torch.equal(autoaugment(images, noise, MEAN), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "noise", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), "got .2, 3, 4, 4. and torch.float32"),
        (some_images(2, 2), torch.zeros(2), r"1 or 3 channels .* but got \(2, 2, 16, 16\)"),
        (some_images(2)[0], torch.zeros(3), r"got \(3, 16, 16\)"),
        (some_images(3), torch.zeros(2), r"`noise` of shape \(3,\) or \(1,\) but got \(2,\)"),
    ],
)
def test_what_has_no_policy_is_refused(images, noise, message):
    with pytest.raises(ValueError, match=message):
        autoaugment(images, noise, MEAN)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(0, 10),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
def test_cutout_covers_the_square_around_the_centre(shape, size, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 200, shape, generator=generator).to(dtype)
    noise = torch.rand(shape[0], 2, generator=generator)
    fill = [201, 202, 203][: shape[1]]
    before = images.clone()
    out = cutout(images, noise, size, fill)
    expected = images.clone()
    for image, centre in zip(expected, noise.tolist(), strict=True):
        top, left = (
            int(u * length) - size // 2 for u, length in zip(centre, shape[2:], strict=True)
        )
        rows, columns = (slice(max(0, start), max(0, start + size)) for start in (top, left))
        image[:, rows, columns] = torch.tensor(fill, dtype=dtype).view(-1, 1, 1)
    assert torch.equal(out, expected)
    assert out.dtype == dtype
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("centre", "area"),
    [((0.5, 0.5), 256), ((0.25, 0.75), 256), ((0.0, 0.5), 128), ((0.0, 0.0), 64), ((1, 1), 81)],
)
def test_cutout_has_its_full_area_inside_and_less_at_the_borders(centre, area):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    out = cutout(images, torch.tensor([centre]), 16, [7, 8, 9])
    for channel, colour in enumerate([7, 8, 9]):
        assert int((out[0, channel] == colour).sum()) == area
        assert int((out[0, channel] == 0).sum()) == 32 * 32 - area


def test_centres_of_squares_are_uniform_and_each_image_has_its_own():
    noise = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0))
    out = cutout(torch.zeros(5000, 1, 4, 4, dtype=torch.uint8), noise, 1, [1])
    assert bool((out.flatten(1).sum(1) == 1).all())
    counts = out.flatten(1).long().sum(0)
    # 312 each, with a standard deviation of 17.
    assert 240 < counts.min() < counts.max() < 390


@pytest.mark.parametrize(
    ("shape", "noise", "size", "fill", "message"),
    [
        ((1, 4, 4), (1, 2), 2, [1], r"got \(1, 4, 4\) and \(1, 2\)"),
        ((2, 1, 4, 4), (1, 2), 2, [1], r"got \(2, 1, 4, 4\) and \(1, 2\)"),
        ((2, 1, 4, 4), (2, 3), 2, [1], r"got \(2, 1, 4, 4\) and \(2, 3\)"),
        ((2, 1, 4, 4), (2, 2), -1, [1], "Expected `size` to be >= 0 but got -1"),
        ((2, 1, 4, 4), (2, 2), 2, [1, 2], "a value for each of 1 channels but got 2"),
    ],
)
def test_squares_that_do_not_fit_are_refused(shape, noise, size, fill, message):
    with pytest.raises(ValueError, match=message):
        cutout(torch.zeros(shape), torch.zeros(noise), size, fill)
