import numpy as np
import pytest
import sklearn.datasets
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from sklearn.datasets import load_digits
from toy_datamodule import Toy, ToyWithPool, epoch_of, fake_trainer, record

from robust_flatness.datamodules import Digits, ImageFolder


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_say_which_images_are_pseudo_labeled(in_memory):
    seen = record(ToyWithPool(in_memory=in_memory), max_epochs=4)
    assert len(seen) == 4 * 3
    for images, labels, unlabeled in seen:
        assert (images.dtype, unlabeled.dtype) == (torch.float32, torch.bool)
        assert unlabeled.sum() == 2
        assert torch.equal(images.flatten(1).amax(1) == 0, unlabeled)
        assert labels[unlabeled].max() < 10
    labeled = torch.cat([labels[~unlabeled] for _, labels, unlabeled in seen])
    # 4 epochs of 18 labeled images are 3 passes through 24.
    assert labeled.bincount().tolist() == [3] * 24


def test_all_images_may_be_pseudo_labeled():
    for images, _, unlabeled in record(ToyWithPool(unlabeled_share=1.0, pool=3), max_epochs=2):
        assert bool(unlabeled.all())
        assert float(images.max()) == 0


def test_a_share_of_0_is_as_if_there_were_none():
    with_pool = ToyWithPool(unlabeled_share=0, unlabeled="nowhere", augment="flip_crop")
    seen = record(with_pool, max_epochs=2)
    plain = record(Toy(seed=0), max_epochs=2)
    assert len(seen) == len(plain) == 6
    for batch, other in zip(seen, plain, strict=True):
        assert len(batch) == len(other) == 2
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


def test_it_does_not_matter_where_the_images_are(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog", "extra/dog"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    sizes = {"num_val": 1, "num_test": 1, "batch_size": 4, "seed": 0}
    extra = {"unlabeled": str(tmp_path / "extra"), "unlabeled_share": 0.5}
    held, read = (
        record(ImageFolder(str(tmp_path), in_memory=keep, **sizes, **extra), max_epochs=2)
        for keep in (True, False)
    )
    assert len(held) == len(read) == 4
    for batch, other in zip(held, read, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))
        assert batch[1][batch[2]].tolist() == [1, 1]


def test_two_processes_see_what_one_sees_of_both_kinds():
    for epoch in (0, 2):
        whole = epoch_of(ToyWithPool(augment="autoaugment"), 0, 1, epoch)
        halves = [epoch_of(ToyWithPool(augment="autoaugment"), r, 2, epoch) for r in range(2)]
        for index, batch in enumerate(whole):
            for rank in range(2):
                for part, half in zip(batch, halves[rank][index], strict=True):
                    assert torch.equal(part[rank::2], half)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_resumed_run_goes_on_with_its_passes(tmp_path, in_memory):
    # Workers fetch before the trainer tells the sampler its epoch.
    lazy = {} if in_memory else {"in_memory": False, "num_workers": 1}
    whole = record(ToyWithPool(), max_epochs=3)
    keep = {"callbacks": [ModelCheckpoint(tmp_path, "last")], "enable_checkpointing": True}
    record(ToyWithPool(), max_epochs=1, **keep)
    rest = record(ToyWithPool(**lazy), max_epochs=3, ckpt_path=tmp_path / "last.ckpt", **keep)
    assert len(rest) == 6
    for batch, other in zip(rest, whole[3:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


def test_they_move_to_the_device_with_the_others():
    datamodule = ToyWithPool()
    datamodule.trainer = fake_trainer(device="meta")
    datamodule.setup("fit")
    for part in next(iter(datamodule.train_dataloader())):
        assert part.device.type == "meta"


def test_they_are_read_once_and_only_to_train():
    datamodule = ToyWithPool(pool=0)
    datamodule.setup()
    assert len(datamodule.split_dataset("test")) == 10
    datamodule.trainer = fake_trainer()
    with pytest.raises(ValueError, match="Expected at least 1 unlabeled image but got none"):
        datamodule.setup("fit")


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [
        ((3, 8, 8, 3), 0, "Expected unlabeled images of 1 channels but got 3 channels"),
        ((3, 8, 9, 1), 0, "unlabeled images of 8x8 pixels, as the labeled .* but got 9x8"),
        ((3, 8, 8, 1), 24, "labels of unlabeled images in 0 to 23 but got labels in 24 to 24"),
        ((3, 8, 8, 1), -1, "labels of unlabeled images in 0 to 23 but got labels in -1 to -1"),
    ],
)
def test_images_that_do_not_fit_the_labeled_ones_stop_before_training(
    tmp_path, shape, label, message
):
    path = tmp_path / "x.npz"
    np.savez(path, image=np.zeros(shape, np.uint8), label=np.full(3, label))
    with pytest.raises(ValueError, match=message):
        record(Toy(unlabeled=str(path), unlabeled_share=0.5), max_epochs=1)


def test_digits_mix_in_their_pool():
    digits = Digits(unlabeled_share=0.5, seed=0)
    pool = digits.unlabeled_source()
    everything, _ = digits.sources()
    assert torch.equal(pool.images, everything.images[digits.pool_indices])
    # 96 % are right: a teacher worth having, and no copy of the true labels.
    right = (pool.labels == everything.labels[digits.pool_indices]).double().mean().item()
    assert 0.93 < right < 0.99
    assert digits.teacher_accuracy == right
    seen = record(digits, max_epochs=2)
    assert [int(unlabeled.sum()) for _, _, unlabeled in seen] == [32, 32, 32, 32, 22] * 2


def test_the_teacher_sees_the_labels_of_training_images_alone(monkeypatch):
    before = Digits(val_from="train", num_val=50, num_test=600)
    labels = before.unlabeled_source().labels
    known = before.split_indices()["train"]
    real = load_digits()
    changed = real.target.copy()
    others = np.setdiff1d(np.arange(1797), known)
    changed[others] = np.roll(changed[others], 1)
    real.target = changed
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: real)
    after = Digits(val_from="train", num_val=50, num_test=600)
    assert torch.equal(after.unlabeled_source().labels, labels)
    assert after.teacher_accuracy < 0.2
    real.target = np.roll(changed, 1)
    broken = Digits(val_from="train", num_val=50, num_test=600)
    assert not torch.equal(broken.unlabeled_source().labels, labels)


def test_digits_take_other_images_and_refuse_an_empty_pool(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, image=np.full((4, 8, 8, 1), 7, np.uint8), label=np.arange(4))
    source = Digits(unlabeled=str(path), unlabeled_share=0.5).unlabeled_source()
    assert (len(source), int(source[0][0].max())) == (4, 7)
    with pytest.raises(ValueError, match="`num_pool` to be >= 1 or `unlabeled` to be a path"):
        Digits(num_pool=0, unlabeled_share=0.5).unlabeled_source()
