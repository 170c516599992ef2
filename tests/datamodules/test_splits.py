import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_flatness.datamodules.images import SplitSizes, make_splits


def sizes(**kwargs):
    """The documented sizes."""
    default = {"num_train": None, "num_train_eval": 1000, "num_val": 500, "num_test": 1000}
    return SplitSizes(**{**default, "val_from": "test", **kwargs})


def test_the_paper_s_splits_of_cifar10():
    splits = make_splits(range(50_000), range(10_000), sizes())
    assert splits["training"] == list(range(50_000))
    assert splits["train"] == list(range(1000))
    assert splits["test"] == list(range(1000))
    assert splits["val"] == list(range(9500, 10_000))


def test_val_may_come_out_of_the_training_images():
    splits = make_splits(range(50_000), range(10_000), sizes(val_from="train"))
    assert splits["val"] == list(range(49_500, 50_000))
    assert splits["training"] == list(range(49_500))
    assert splits["test"] == list(range(1000))


@given(
    train=st.integers(1, 40),
    test=st.integers(1, 40),
    wanted=st.tuples(*[st.integers(1, 20)] * 4),
    val_from=st.sampled_from(["test", "train"]),
)
def test_splits_are_disjoint_and_of_the_size_asked_for_or_refused(train, test, wanted, val_from):
    num_train, num_train_eval, num_val, num_test = wanted
    need_train = num_train + (num_val if val_from == "train" else 0)
    need_test = num_test + (num_val if val_from == "test" else 0)
    ask = SplitSizes(num_train, num_train_eval, num_val, num_test, val_from)
    train_order, test_order = range(1000, 1000 + train), range(test)
    if train < need_train or test < need_test:
        with pytest.raises(ValueError, match="Expected"):
            make_splits(train_order, test_order, ask)
        return
    splits = make_splits(train_order, test_order, ask)
    assert len(splits["training"]) == num_train
    assert splits["train"] == splits["training"][:num_train_eval]
    assert (len(splits["val"]), len(splits["test"])) == (num_val, num_test)
    assert not set(splits["val"]) & set(splits["test"])
    assert not set(splits["val"]) & set(splits["training"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_test": 9501}, "at least 10001 test images for `num_test` 9501 and `num_val` 500"),
        ({"num_train": 50_001}, "Expected `num_train` to be at most 50000.* but got 50001"),
        ({"num_train": 49_501, "val_from": "train"}, "Expected `num_train` to be at most 49500"),
        ({"num_val": 50_000, "val_from": "train"}, "Expected `num_val` to be below .* 50000"),
        ({"num_test": 10_001, "val_from": "train"}, "Expected at least 10001 test images"),
        ({"num_train": 0}, "Expected `num_train` to be >= 1 but got 0"),
        ({"num_val": 0}, "Expected `num_val` to be >= 1 but got 0"),
        ({"val_from": "validation"}, "Expected `val_from` to be one of test, train but got valid"),
    ],
)
def test_what_cannot_be_is_said(wanted, message):
    with pytest.raises(ValueError, match=message):
        make_splits(range(50_000), range(10_000), sizes(**wanted))


def test_an_order_without_images_is_refused():
    with pytest.raises(ValueError, match="Expected at least 1 training image but got none"):
        make_splits([], range(10_000), sizes())
