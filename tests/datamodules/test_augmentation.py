import pytest
import torch

from robust_flatness.datamodules import autoaugment, cutout, random_flip_and_crop
from robust_flatness.datamodules.augmentation import Augmentation
from robust_flatness.datamodules.batches import GlobalBatches

MEAN = (0.5, 0.4, 0.3)
FILL = [128, 102, 76]
BOTH = ["autoaugment", "autoaugment_batch"]


def some_images(n=8, channels=3, side=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def test_order_and_default_noise_are_those_of_earlier_versions():
    batches = GlobalBatches(4, 1, 0, seed=3)
    noise = batches.noise(4, epoch=2, batch=5)
    assert (noise.flatten() * 2**24).long().tolist() == [
        *[13987031, 10489160, 15985049, 13494285, 12523319, 4957285],
        *[3629421, 1431579, 11647526, 883619, 1531400, 3743220],
    ]
    assert list(batches.sampler(range(9), epoch=2)) == [3, 1, 8, 2, 0, 7, 6, 5, 4]


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
def test_autoaugment_is_crop_flip_policy_and_cutout_in_the_mean_colour(side, flip):
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
    assert Augmentation("none")(images, noise) is images


@pytest.mark.parametrize("kind", BOTH)
def test_grey_images_have_all_of_it(kind):
    augmentation, images = Augmentation(kind, mean=(0.3,)), some_images(channels=1, side=8)
    batches = GlobalBatches(8, 1, 0, seed=0)
    for batch in range(60):
        out = augmentation(images, augmentation.noise(batches, 8, 0, batch))
        assert (out.shape, out.dtype) == (images.shape, torch.uint8)


@pytest.mark.parametrize("wrong", [True, False, "autoaugment_image", None])
def test_an_unknown_kind_is_refused(wrong):
    message = f"Expected `augment` to be one of none, .*, autoaugment_batch but got {wrong}"
    with pytest.raises(ValueError, match=message):
        Augmentation(wrong)


def test_other_channels_than_grey_and_rgb_have_no_policy():
    with pytest.raises(ValueError, match="1 or 3 channels where `augment` .* but got 2 channels"):
        Augmentation("autoaugment", mean=(0.5, 0.5))
