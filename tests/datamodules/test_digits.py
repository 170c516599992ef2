import pytest
import torch
from sklearn.datasets import load_digits

from robust_flatness.datamodules import Digits

# The splits of all runs: a change here makes earlier results mean something else.
FIRST = {
    "train": [362, 1568, 1440, 1761],
    "test": [957, 256, 364, 199],
    "val": [985, 701, 1422, 1367],
}
PARTS = {"train": 300, "val": 500, "test": 600, "pool": 397}


def test_all_digits_are_in_one_split():
    indices = Digits().split_indices()
    assert {name: len(part) for name, part in indices.items()} == PARTS
    assert sorted(i for part in indices.values() for i in part) == list(range(1797))


def test_what_is_known_at_once():
    digits = Digits()
    assert (digits.num_classes, digits.in_channels, digits.eps) == (10, 1, 0.2)
    assert (digits.batch_size, digits.augment, digits.flip) == (64, "none", False)
    pixels = torch.stack([image for image, _ in digits.split_dataset("train")]).double()
    assert digits.mean == [pytest.approx(pixels.mean().item(), abs=1e-6)]
    assert digits.std == [pytest.approx(pixels.std(correction=0).item(), abs=1e-6)]
    assert type(digits.mean[0]) is type(digits.std[0]) is float


def test_items_are_scikit_learn_s_digits_at_these_positions():
    raw, digits = load_digits(), Digits()
    for split, indices in digits.split_indices().items():
        if split == "pool":
            continue
        dataset = digits.split_dataset(split)
        for item in (0, len(indices) - 1):
            image, label = dataset[item]
            expected = torch.from_numpy(raw.images[indices[item]]).float() / 16
            assert image.shape == (1, 8, 8)
            torch.testing.assert_close(image[0], expected, atol=0.5 / 255 + 1e-6, rtol=0)
            assert label == raw.target[indices[item]]


def test_the_order_is_fixed_for_good():
    torch.manual_seed(1)
    indices = Digits(seed=7).split_indices()
    assert indices["train"][:4] == FIRST["train"]
    assert indices["test"][:4] == FIRST["test"]
    assert indices["val"][:4] == FIRST["val"]


def test_measured_images_stay_where_fewer_are_trained_on():
    few, many = Digits(num_train=50, num_pool=0).split_indices(), Digits().split_indices()
    assert (few["test"], few["val"], few["pool"]) == (many["test"], many["val"], [])
    assert few["train"] == many["train"][:50]


def test_val_from_train_shrinks_the_training_set():
    digits = Digits(val_from="train", num_val=50)
    indices = digits.split_indices()
    assert len(indices["train"]) == 250
    assert len(indices["val"]) == 50
    parts = [index for part in indices.values() for index in part]
    assert len(parts) == len(set(parts))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_train": 301}, "add up to at most 1797 but got 1798"),
        ({"num_train": 0}, "Expected `num_train` to be >= 1 but got 0"),
        ({"num_pool": -1}, "Expected `num_pool` to be >= 0 but got -1"),
        ({"eps": -1}, "Expected `eps` to be >= 0 but got -1"),
    ],
)
def test_bad_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Digits(**kwargs)


def test_unused_images_are_the_pool_with_its_labels():
    digits = Digits(unlabeled="unused", unlabeled_share=0.5)
    pool = digits.unlabeled_source()
    assert torch.equal(pool.images, Digits(unlabeled_share=0.5).unlabeled_source().images)
    assert pool.labels.tolist() == load_digits().target[digits.split_indices()["pool"]].tolist()
    with pytest.raises(ValueError, match="`num_pool` to be >= 1 .* got 0 and unused"):
        Digits(unlabeled="unused", num_pool=0).unlabeled_source()
