import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from robust_flatness.datamodules import autoaugment, cutout, random_flip_and_crop
from robust_flatness.datamodules.augmentation import Augmentation
from robust_flatness.datamodules.batches import GlobalBatches

MEAN = (0.5, 0.4, 0.3)
FILL = [128, 102, 76]
BOTH = ["autoaugment", "autoaugment_batch"]


def some_images(n=8, channels=3, side=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def noise_of(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(4))


# Flips and crops


def flip_pad_and_crop(image, noise, padding):
    """Flips, pads and slices a single image."""
    flip, *corner = noise.tolist()
    y, x = (min(int(u * (2 * padding + 1)), 2 * padding) for u in corner)
    height, width = image.shape[1:]
    crop = F.pad(image, [padding] * 4)[:, y : y + height, x : x + width]
    return crop.flip(2) if flip < 0.5 else crop


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (4, 3, 6, 7)]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
)
def test_a_batch_is_flipped_padded_and_cropped(shape, padding, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, shape, generator=generator).to(dtype)
    noise = torch.rand(shape[0], 3, generator=generator)
    before = images.clone(), noise.clone()
    out = random_flip_and_crop(images, noise, padding)
    expected = [flip_pad_and_crop(*pair, padding) for pair in zip(images, noise, strict=True)]
    assert torch.equal(out, torch.stack(expected))
    assert (out.shape, out.dtype) == (images.shape, dtype)
    assert out.is_contiguous()
    assert torch.equal(images, before[0])
    assert torch.equal(noise, before[1])


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1, max_size=5))
def test_noise_of_exactly_0_and_1_is_inside_of_the_padded_image(rows):
    images = torch.arange(1, 1 + 16 * len(rows)).view(len(rows), 1, 4, 4)
    out = random_flip_and_crop(images, torch.tensor(rows), padding=2)
    for image, augmented in zip(images, out, strict=True):
        kept = augmented[augmented > 0].tolist()
        assert set(kept) <= set(image.flatten().tolist())
        assert len(kept) == len(set(kept)) >= 4


def test_half_are_flipped_and_all_positions_are_used():
    images = torch.arange(1, 17).view(1, 1, 4, 4).expand(4000, -1, -1, -1)
    out = random_flip_and_crop(images, noise_of(4000, 3), padding=1).flatten(1)
    outcomes, counts = out.unique(dim=0, return_counts=True)
    assert len(outcomes) == 2 * 9
    assert counts.min() > 150


def test_padding_has_the_color_of_fill_and_flips_can_be_off():
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
    zeros = random_flip_and_crop(images, noise_of(2, 3), 3, fill=[0, 0, 0])
    assert torch.equal(zeros, random_flip_and_crop(images, noise_of(2, 3), 3))


# AutoAugment


@pytest.mark.parametrize(("channels", "side"), [(3, 16), (1, 8)])
def test_each_image_gets_torchvision_s_policy_by_its_own_noise(channels, side):
    images, noise, fill = some_images(60, channels, side), noise_of(60), FILL[:channels]
    before = images.clone()
    out = autoaugment(images, noise, fill)
    policy, expected = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=fill), []
    for image, value in zip(images, noise.tolist(), strict=True):
        torch.manual_seed(int(value * 2**24))
        expected.append(policy(image))
    assert torch.equal(out, torch.stack(expected))
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    assert 30 < sum(not torch.equal(*pair) for pair in zip(out, images, strict=True)) < 60


def test_a_single_value_is_one_policy_for_all():
    images = some_images(6)
    for value in noise_of(20).tolist():
        together = autoaugment(images, torch.tensor([value]), FILL)
        assert torch.equal(together, autoaugment(images, torch.full((6,), value), FILL))
    copies = images[:1].expand(6, -1, -1, -1)
    apart = autoaugment(copies, noise_of(6), FILL)
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
    first = autoaugment(images, noise, FILL)
    torch.manual_seed(1)
    # `torch.manual_seed` would call it.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds devices"))
    state = torch.get_rng_state()
    assert torch.equal(autoaugment(images, noise, FILL), first)
    assert torch.equal(torch.get_rng_state(), state)


# Cutout


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(0, 10),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
def test_cutout_covers_the_square_around_the_center(shape, size, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 200, shape, generator=generator).to(dtype)
    noise = torch.rand(shape[0], 2, generator=generator)
    fill = [201, 202, 203][: shape[1]]
    before = images.clone()
    out = cutout(images, noise, size, fill)
    expected = images.clone()
    for image, center in zip(expected, noise.tolist(), strict=True):
        top, left = (
            int(u * length) - size // 2 for u, length in zip(center, shape[2:], strict=True)
        )
        rows, columns = (slice(max(0, start), max(0, start + size)) for start in (top, left))
        image[:, rows, columns] = torch.tensor(fill, dtype=dtype).view(-1, 1, 1)
    assert torch.equal(out, expected)
    assert out.dtype == dtype
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("center", "area"),
    [((0.5, 0.5), 256), ((0.25, 0.75), 256), ((0.0, 0.5), 128), ((0.0, 0.0), 64), ((1, 1), 81)],
)
def test_cutout_has_its_full_area_inside_and_less_at_the_borders(center, area):
    out = cutout(torch.zeros(1, 3, 32, 32), torch.tensor([center]), 16, [7, 8, 9])
    for channel, color in enumerate([7, 8, 9]):
        assert int((out[0, channel] == color).sum()) == area
        assert int((out[0, channel] == 0).sum()) == 32 * 32 - area


def test_centers_of_squares_are_uniform_and_each_image_has_its_own():
    out = cutout(torch.zeros(5000, 1, 4, 4), noise_of(5000, 2), 1, [1])
    assert bool((out.flatten(1).sum(1) == 1).all())
    counts = out.flatten(1).sum(0)
    # 312 each, with a standard deviation of 17.
    assert 240 < counts.min() < counts.max() < 390


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: random_flip_and_crop(x[0], noise_of(1, 3)), r"got \(3, 4, 4\) and \(1, 3\)"),
        (lambda x: random_flip_and_crop(x, noise_of(1, 3)), r"got \(2, 3, 4, 4\) and \(1, 3\)"),
        (lambda x: random_flip_and_crop(x, noise_of(2, 3), -1), "`padding` to be >= 0 but got -1"),
        (
            lambda x: random_flip_and_crop(x, noise_of(2, 3), fill=[1]),
            "`fill` to have a value for each of 3 channels but got 1",
        ),
        (lambda x: cutout(x[0], noise_of(1, 2), 2, FILL), r"got \(3, 4, 4\) and \(1, 2\)"),
        (lambda x: cutout(x, noise_of(1, 2), 2, FILL), r"got \(2, 3, 4, 4\) and \(1, 2\)"),
        (lambda x: cutout(x, noise_of(2, 3), 2, FILL), r"got \(2, 3, 4, 4\) and \(2, 3\)"),
        (lambda x: cutout(x, noise_of(2, 2), -1, FILL), "`size` to be >= 0 but got -1"),
        (lambda x: cutout(x, noise_of(2, 2), 2, [1]), "value for each of 3 channels but got 1"),
        (lambda x: autoaugment(x.float(), noise_of(2), FILL), "4, 4. and torch.float32"),
        (lambda x: autoaugment(x[:, :2], noise_of(2), FILL), r"1 or 3 channels .*got \(2, 2, 4,"),
        (lambda x: autoaugment(x[0], noise_of(3), FILL), r"got \(3, 4, 4\)"),
        (
            lambda x: autoaugment(x, noise_of(3), FILL),
            r"`noise` of shape \(2,\) or \(1,\) but got \(3,\)",
        ),
        (
            lambda x: Augmentation("autoaugment", mean=(0.5, 0.5)),
            "1 or 3 channels if `augment` .* but got 2 channels",
        ),
        *[
            (
                lambda x, wrong=wrong: Augmentation(wrong),
                f"`augment` to be one of none, .*, autoaugment_batch but got {wrong}",
            )
            for wrong in (True, False, "autoaugment_image", None)
        ],
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        call(some_images(2, side=4))


# What training does


def test_order_and_noise_stay_those_of_version_0_2():
    batches = GlobalBatches(4, 1, 0, seed=3)
    noise = batches.noise(4, epoch=2, batch=5)
    assert (noise.flatten() * 2**24).long().tolist() == [
        *[16563581, 4050458, 2902480, 2366189, 5447263, 3035262],
        *[14116094, 6831688, 8790163, 14971235, 6919867, 6666449],
    ]
    assert list(batches.sampler(range(9), epoch=2)) == [4, 3, 5, 8, 1, 2, 7, 6, 0]


def test_more_noise_does_not_change_the_first_columns():
    batches = GlobalBatches(8, 1, 0, seed=3)
    three, six = batches.noise(8, 0, 1), batches.noise(8, 0, 1, columns=6)
    shared = batches.noise(8, 0, 1, columns=6, shared=1)
    assert (three.shape, six.shape) == ((8, 3), (8, 6))
    assert torch.equal(six[:, :3], three)
    assert torch.equal(shared[:, :5], six[:, :5])
    assert six.unique().numel() == 48
    assert shared[:, 5].tolist() == [six[0, 5].item()] * 8


@pytest.mark.parametrize("kind", ["flip_crop", *BOTH])
def test_shares_of_processes_are_the_rows_of_a_single_one(kind):
    augmentation, images = Augmentation(kind, mean=MEAN), some_images()
    for epoch, batch in [(0, 0), (0, 1), (2, 0)]:
        noise = augmentation.noise(GlobalBatches(8, 1, 0, seed=1), 8, epoch, batch)
        whole = augmentation(images, noise)
        for rank in range(2):
            rows = augmentation.noise(GlobalBatches(8, 2, rank, seed=1), 4, epoch, batch)
            assert torch.equal(rows, noise[rank::2])
            assert torch.equal(augmentation(images[rank::2], rows), whole[rank::2])


@pytest.mark.parametrize("kind", ["flip_crop", *BOTH])
def test_seed_epoch_and_batch_decide(kind):
    augmentation, images = Augmentation(kind, mean=MEAN), some_images()

    def augmented(seed, epoch, batch):
        noise = augmentation.noise(GlobalBatches(8, 1, 0, seed), 8, epoch, batch)
        return augmentation(images, noise)

    first = augmented(0, 0, 0)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert torch.equal(augmented(0, 0, 0), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        assert not torch.equal(augmented(*other), first)


def test_one_policy_a_batch_makes_equal_images_equal():
    images = some_images(1).expand(8, -1, -1, -1)
    noise = torch.rand(1, 6).expand(8, -1).clone()
    noise[:, 5] = torch.rand(8)
    together = Augmentation("autoaugment_batch", mean=MEAN)(images, noise)
    apart = Augmentation("autoaugment", mean=MEAN)(images, noise)
    assert torch.equal(together, together[:1].expand_as(together))
    assert not torch.equal(apart, apart[:1].expand_as(apart))


@pytest.mark.parametrize("side", [32, 8])
@pytest.mark.parametrize("flip", [True, False])
def test_autoaugment_is_crop_flip_policy_and_cutout_in_the_mean_color(side, flip):
    images = some_images(side=side)
    noise = torch.rand(8, 6)
    out = Augmentation("autoaugment", flip, MEAN)(images, noise)
    crops = random_flip_and_crop(images, noise[:, :3], side // 8, flip=flip, fill=FILL)
    policies = autoaugment(crops, noise[:, 5], FILL)
    assert torch.equal(out, cutout(policies, noise[:, 3:5], side // 2, FILL))


@pytest.mark.parametrize(("side", "padding"), [(32, 4), (8, 1), (4, 1), (64, 8)])
def test_crops_are_in_proportion_to_the_side(side, padding):
    images, noise = some_images(side=side), torch.rand(8, 3)
    for flip in (True, False):
        expected = random_flip_and_crop(images, noise, padding, flip=flip)
        assert torch.equal(Augmentation("flip_crop", flip)(images, noise), expected)
    flips = torch.where(noise[:, :1, None, None] < 0.5, images.flip(3), images)
    assert torch.equal(Augmentation("flip")(images, noise), flips)
    assert Augmentation("none")(images, noise) is images


@pytest.mark.parametrize("kind", BOTH)
def test_gray_images_have_all_of_it(kind):
    augmentation, images = Augmentation(kind, mean=(0.3,)), some_images(channels=1, side=8)
    batches = GlobalBatches(8, 1, 0, seed=0)
    for batch in range(60):
        out = augmentation(images, augmentation.noise(batches, 8, 0, batch))
        assert (out.shape, out.dtype) == (images.shape, torch.uint8)
