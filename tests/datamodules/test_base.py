import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_datamodule import Toy, epoch_of, fake_trainer, record

from robust_flatness.callbacks import FinalEvaluation, evaluate
from robust_flatness.datamodules import random_flip_and_crop
from robust_flatness.datamodules.batches import GlobalBatches


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for (images, labels), (others, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, others)


@pytest.mark.parametrize("augment", ["flip_crop", "autoaugment", "autoaugment_batch"])
def test_two_processes_see_what_one_sees(augment):
    for epoch in (0, 3):
        whole = epoch_of(Toy(seed=1, augment=augment), 0, 1, epoch)
        halves = [epoch_of(Toy(seed=1, augment=augment), rank, 2, epoch) for rank in range(2)]
        assert len(whole) == len(halves[0]) == len(halves[1]) == 3
        for index, (images, labels) in enumerate(whole):
            for rank in range(2):
                assert torch.equal(labels[rank::2], halves[rank][index][1])
                assert torch.equal(images[rank::2], halves[rank][index][0])


def test_a_trainer_shuffles_and_augments_by_seed_epoch_and_batch():
    seen = record(Toy(seed=1), max_epochs=2, accumulate_grad_batches=2)
    originals = torch.stack([image for image, _ in Toy().split_dataset("train")])
    batches = GlobalBatches(8, 1, 0, seed=1)
    expected = []
    for epoch in (0, 1):
        order = torch.tensor(list(batches.sampler(originals, epoch)))
        for index, chosen in enumerate(order.split(8)):
            noise = batches.noise(8, epoch, index)
            # An eighth of 8 pixels on each side.
            expected.append((random_flip_and_crop(originals[chosen], noise, padding=1), chosen))
    assert_same(seen, expected)
    simulated = [batch for epoch in (0, 1) for batch in epoch_of(Toy(seed=1), 0, 1, epoch)]
    assert_same(seen, simulated)


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    epochs = {(s, e): epoch_of(Toy(seed=s), 0, 1, e) for s, e in [(0, 0), (0, 1), (1, 0)]}
    orders = {key: torch.cat([labels for _, labels in run]).tolist() for key, run in epochs.items()}
    assert orders[0, 0] != orders[0, 1] != orders[1, 0] != orders[0, 0]
    assert all(sorted(order) == list(range(24)) for order in orders.values())
    draws = {GlobalBatches(4, 1, 0, s).noise(1, e, b)[0, 0].item() for s, e, b in _corners()}
    assert len(draws) == 8


def _corners():
    return [(seed, epoch, batch) for seed in (0, 1) for epoch in (0, 1) for batch in (0, 1)]


@pytest.mark.parametrize("augment", ["flip_crop", "autoaugment", "autoaugment_batch"])
def test_training_images_are_augmented_and_measured_ones_are_not(augment):
    datamodule = Toy(seed=0, augment=augment)
    originals = {label: image for image, label in datamodule.split_dataset("train")}
    changed = [
        not torch.equal(image, originals[int(label)])
        for images, labels in record(datamodule, max_epochs=1)
        for image, label in zip(images, labels, strict=True)
    ]
    assert sum(changed) > 20
    again = {label: image for image, label in datamodule.split_dataset("train")}
    assert all(torch.equal(again[label], image) for label, image in originals.items())


def test_without_augmentation_images_are_what_they_were():
    originals = {label: image for image, label in Toy().split_dataset("train")}
    for images, labels in record(Toy(seed=0, augment="none"), max_epochs=1):
        for image, label in zip(images, labels, strict=True):
            assert torch.equal(image, originals[int(label)])


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("in_memory", [True, False])
def test_resuming_at_the_end_of_an_epoch_sees_what_comes_next(tmp_path, in_memory):
    lazy = {} if in_memory else {"in_memory": False, "num_workers": 1}
    seed_everything(5)
    whole = record(Toy(**lazy), max_epochs=3)
    keep = {"callbacks": [ModelCheckpoint(tmp_path, "last")], "enable_checkpointing": True}
    seed_everything(5)
    record(Toy(), max_epochs=1, **keep)
    # Another global seed: the seed of the run lies in its checkpoint.
    seed_everything(6)
    rest = record(Toy(**lazy), max_epochs=3, ckpt_path=tmp_path / "last.ckpt", **keep)
    assert_same(rest, whole[3:])


def test_a_seed_that_is_set_wins_over_the_global_one_and_the_checkpoint():
    seed_everything(1)
    first = record(Toy(seed=3), max_epochs=1)
    seed_everything(2)
    assert_same(first, record(Toy(seed=3), max_epochs=1))
    for seed, expected in ((3, 3), (None, 4)):
        datamodule = Toy(seed=seed)
        datamodule.trainer = fake_trainer()
        datamodule.setup("fit")
        datamodule.load_state_dict({"seed": 4})
        assert datamodule.state_dict() == {"seed": expected}


def test_batches_have_the_precision_of_the_trainer():
    images, labels = record(Toy(), max_epochs=1, precision="64-true")[0]
    assert images.dtype is torch.float64
    assert labels.dtype is torch.int64
    assert 0 <= float(images.min()) < float(images.max()) <= 1


@pytest.mark.parametrize(("train", "rest"), [(23, 7), (17, 1), (24, 8)])
def test_an_epoch_has_every_image_once_and_a_smaller_last_batch(train, rest):
    seen = record(Toy(train=train), max_epochs=1)
    assert [len(labels) for _, labels in seen] == [8, 8, rest]
    assert sorted(torch.cat([labels for _, labels in seen]).tolist()) == list(range(train))


@pytest.mark.parametrize("augment", ["flip_crop", "autoaugment", "autoaugment_batch"])
def test_processes_share_the_last_batch_without_what_does_not_divide(augment):
    whole = epoch_of(Toy(train=23, augment=augment, seed=1), 0, 1)
    halves = [epoch_of(Toy(train=23, augment=augment, seed=1), rank, 2) for rank in range(2)]
    for rank, parts in enumerate(halves):
        assert [len(labels) for _, labels in parts] == [4, 4, 3]
        for (images, labels), (others, other_labels) in zip(parts, whole, strict=True):
            assert torch.equal(labels, other_labels[rank::2][: len(labels)])
            if len(labels) == 4:
                assert torch.equal(images, others[rank::2])
    # One image of 23 is left out; noise is drawn for the 6 that remain.
    seen = torch.cat([labels for parts in halves for _, labels in parts])
    assert len(seen.unique()) == len(seen) == 22


def test_fewer_training_images_are_the_first_ones():
    seen = record(Toy(num_train=9), max_epochs=4)
    assert set(torch.cat([labels for _, labels in seen]).tolist()) <= set(range(9))
    datamodule = Toy(num_train=9)
    assert [label for _, label in datamodule.split_dataset("train")] == list(range(9))


def test_splits_come_in_order_without_a_trainer():
    datamodule = Toy(num_train_eval=4)
    labels = {s: [y for _, y in datamodule.split_dataset(s)] for s in ("train", "val", "test")}
    assert labels == datamodule.split_indices()
    assert labels == {"train": [0, 1, 2, 3], "val": [*range(15, 20)], "test": [*range(10)]}
    (images, targets), *_ = datamodule.test_dataloader()
    assert images.dtype is torch.float32
    assert targets.tolist() == list(range(8))


def test_val_from_train_is_not_trained_on():
    datamodule = Toy(val_from="train", batch_size=1)
    val = [label for _, label in datamodule.split_dataset("val")]
    assert val == [19, 20, 21, 22, 23]
    assert datamodule.split_indices()["val"] == val
    seen = [int(labels) for _, labels in record(datamodule, max_epochs=1)]
    assert sorted(seen) == list(range(19))


def test_batches_of_8_bits_are_only_augmented_in_training():
    datamodule = Toy()
    datamodule.trainer = fake_trainer()
    datamodule.setup("fit")
    images, labels = next(iter(datamodule.train_dataloader()))
    datamodule.trainer.training = False
    floats, same = datamodule.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(floats, images.float() / 255)
    assert same is labels


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_images_move_to_the_device_if_held_in_memory(in_memory):
    datamodule = Toy(in_memory=in_memory)
    datamodule.trainer = fake_trainer(device="meta")
    datamodule.setup("fit")
    images, labels = next(iter(datamodule.train_dataloader()))
    assert images.device.type == labels.device.type == ("meta" if in_memory else "cpu")
    assert datamodule.split_dataset("train")[0][0].device.type == "cpu"


def test_batches_of_other_loaders_are_left_alone():
    for batch in (torch.zeros(2), {"x": 1}, (), [torch.zeros(1, 1, 2, 2), torch.tensor([0])]):
        assert Toy().on_after_batch_transfer(batch, 0) is batch


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -0.1}, "Expected `eps` to be >= 0 but got -0.1"),
        ({"eps": float("nan")}, "Expected `eps` to be >= 0 but got nan"),
        ({"batch_size": 0}, "Expected `batch_size` to be >= 1 but got 0"),
        ({"num_workers": -1}, "Expected `num_workers` to be >= 0 but got -1"),
        ({"unlabeled_share": 1.1}, r"Expected `unlabeled_share` to be in \[0, 1\] but got 1.1"),
        ({"unlabeled_share": float("nan")}, r"`unlabeled_share` to be in \[0, 1\] but got nan"),
        ({"unlabeled_share": 0.05}, "each batch of 8 images of both kinds but got 0.05"),
        ({"unlabeled_share": 0.95}, "each batch of 8 images of both kinds but got 0.95"),
        ({"unlabeled_share": 0.5}, "`ti_500K_pseudo_labeled.pickle` .* is above 0 but got None"),
        ({"num_test": 0}, "Expected `num_test` to be >= 1 but got 0"),
        ({"num_classes": 20}, "labels of training images in 0 to 19 but got labels in 0 to 23"),
        ({"first_label": -1}, "labels of training images in 0 to 23 but got labels in -1 to 22"),
        ({"test": 14}, "Expected at least 15 test images for `num_test` 10 and `num_val` 5"),
        ({"test": 0}, "Expected at least 1 test image but got none"),
        ({"downsample": 5}, "`downsample` to divide the sides 8x8 of the images but got 5"),
        ({"downsample": 0}, "Expected `downsample`"),
        ({"downsample": 2, "in_memory": False}, "`downsample` to be 1 if `in_memory` is false"),
        ({"batch_size": 25}, "`batch_size` to be at most the number of training images 24"),
    ],
)
def test_bad_input_stops_before_training(kwargs, message):
    with pytest.raises(ValueError, match=message):
        record(Toy(**kwargs), max_epochs=1)


@pytest.mark.parametrize("val_from", ["train", "test"])
def test_unused_training_images_are_those_of_no_split(val_from):
    arguments = {"num_train": 12, "num_train_eval": 3, "val_from": val_from, "seed": 0}
    toy = Toy(**arguments, unlabeled="unused", unlabeled_share=0.5, augment="none", downsample=2)
    seen = {False: set(), True: set()}
    for images, labels, unlabeled in record(toy, max_epochs=9):
        assert images.shape[1:] == (1, 4, 4)
        for label, is_unlabeled in zip(labels.tolist(), unlabeled.tolist(), strict=True):
            seen[is_unlabeled].add(label)
    assert seen[False] == set(range(12))
    assert seen[True] == set(range(12, 19 if val_from == "train" else 24))
    with pytest.raises(ValueError, match="`num_train` to leave some of 24 training images for"):
        Toy(unlabeled="unused").unlabeled_source()


@pytest.mark.parametrize("wrong", [True, False, "crop"])
def test_an_augmentation_that_is_none_is_refused_at_once(wrong):
    kinds = "none, flip, flip_crop, autoaugment, autoaugment_batch"
    with pytest.raises(
        ValueError, match=f"Expected `augment` to be one of {kinds} but got {wrong}"
    ):
        Toy(augment=wrong)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_downsampling_averages_blocks_of_pixels(split):
    full, half = Toy().split_dataset(split), Toy(downsample=2).split_dataset(split)
    for (image, label), (small, same_label) in zip(full, half, strict=True):
        means = (255 * image).view(1, 4, 2, 4, 2).mean((2, 4))
        assert label == same_label
        assert torch.equal((255 * small).round(), means.round())


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="multiple of the number of processes 3 but got 8"):
        epoch_of(Toy(), 0, 3)


def test_other_channels_and_other_splits_are_refused():
    datamodule = Toy()
    with pytest.raises(ValueError, match="to be 'train', 'val' or 'test' but got 'training'"):
        datamodule.split_dataset("training")
    datamodule.in_channels = 3
    with pytest.raises(ValueError, match="training images of 3 channels but got 1 channels"):
        datamodule.setup()
    with pytest.raises(RuntimeError, match="Expected a trainer that uses the datamodule"):
        Toy().train_dataloader()


def test_a_test_set_of_the_size_asked_for_is_enough():
    data = Toy(test=10, num_test=10, num_val=5, num_classes=24)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24))
    light = FinalEvaluation(num_examples=10, restarts=1, steps=1, num_perturbations=0)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    assert evaluate(network, data, [light], **quiet)["test/robust_error"] <= 1
    assert light.final_results["num_examples"]["test/error"] == 10
    with pytest.raises(ValueError, match="at least 15 test images .* but got 10"):
        data.split_dataset("val")
    with pytest.raises(ValueError, match="at least 11 test images .* but got 10"):
        evaluate(network, Toy(test=10, num_test=11), [light], **quiet)
