"""Promise 14: measures look at the images that the trainer's loader delivers, or refuse."""

import multiprocessing
import os
import random
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from trainers import ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import RobustEarlyStopping, RobustEvaluation, WeightAveraging
from robust_flatness.datamodules import Digits

MEAN, STD = 0.5, 0.25
NORMALIZATION = ([MEAN] * 3, [STD] * 3)


class Foreign(LightningModule):
    """Somebody else's module, which validates nothing unless a loader asks for it."""

    def __init__(self):
        super().__init__()
        self.net = tiny_network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1].flatten())

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watch(**kwargs):
    settings = {"split": "val", "num_examples": 100, "steps": 1, "eps": 0.1}
    return RobustEvaluation(**{**settings, **kwargs})


def fitted(measure, train=None, val=None, module=None, **kwargs):
    """The images that a measure has looked at in a fit."""
    trainer = quiet_trainer(callbacks=[measure], **kwargs)
    trainer.fit(module or Foreign(), train or loader(), val)
    return measure.examples(trainer, trainer.lightning_module)


def numbers(measure, val, **kwargs):
    """Which images of `dataset(40)` are measured."""
    images = fitted(measure, None, val, **kwargs).images
    known = dataset(40).tensors[0]
    return [int((known == image).flatten(1).all(1).nonzero()) for image in images]


def normalised(batch):
    return (batch[0] - MEAN) / STD, *batch[1:]


def collate(items):
    images, labels = zip(*items)
    return normalised((torch.stack(images), torch.tensor(labels)))


class BeforeTransfer(Foreign):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return normalised(batch)


class AfterTransfer(Foreign):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - self.mean) / STD, *batch[1:]


class Transfer(Foreign):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(normalised(batch), device, dataloader_idx)


class ForeignData(LightningDataModule):
    """Somebody else's datamodule, which sets up its test set late."""

    def setup(self, stage):
        if stage == "test":
            self.test = dataset(9, seed=7)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(12)

    def test_dataloader(self):
        return DataLoader(self.test, 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return normalised(batch)


class OwnHook(ToyData):
    """A `split_dataset`, and a hook of the user behind it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return normalised(batch)


@pytest.mark.parametrize("how", ["collate", BeforeTransfer, AfterTransfer, Transfer])
@pytest.mark.parametrize("split", ["val", "train"])
def test_normalisation_on_the_way_to_the_module_is_seen(how, split):
    module = Foreign() if how == "collate" else how()
    made = DataLoader(dataset(12), 5, collate_fn=collate if how == "collate" else None)
    measure = watch(split=split, normalization=NORMALIZATION)
    assert torch.allclose(fitted(measure, made, made, module).images, dataset(12).tensors[0])
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] but got .*normalization="):
        fitted(watch(split=split), made, made, module)


@pytest.mark.parametrize(("data", "seed"), [(ForeignData, 1), (OwnHook, 5)])
def test_hooks_of_a_datamodule_are_seen(data, seed):
    measure = watch(normalization=NORMALIZATION)
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(Foreign(), datamodule=data())
    images = measure.examples(trainer, trainer.lightning_module).images
    assert torch.allclose(images, dataset(len(images), seed=seed).tensors[0])


def test_the_logged_error_is_that_of_the_delivered_images():
    class Turned(Foreign):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].flip(-1), (batch[1] + 3) % 10

    module, trainer = Turned(), quiet_trainer(callbacks=[watch()], max_epochs=2)
    trainer.fit(module, loader(40), loader(40))
    images, labels = dataset(40).tensors
    wrong = module.eval()(images.flip(-1)).argmax(1) != (labels + 3) % 10
    assert float(trainer.callback_metrics["val/error"]) == pytest.approx(wrong.float().mean())


EVENS = list(range(0, 40, 2))
PAIRS = [[7, 3], [5, 1], [2]]


class Backwards(Sampler):
    def __iter__(self):
        return iter(range(19, -1, -1))

    def __len__(self):
        return 20


class Endless(Sampler):
    def __iter__(self):
        index = 0
        while True:
            yield [index % 40, (index + 1) % 40]
            index += 2


class EveryThird(BatchSampler):
    def __iter__(self):
        return (batch[::3] for batch in super().__iter__())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(EVENS), 8, False)}, EVENS),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(EVENS), 8, True)}, EVENS[:16]),
        ({"batch_sampler": BatchSampler(RandomSampler(range(40)), 8, False)}, list(range(40))),
        ({"batch_sampler": PAIRS}, [7, 3, 5, 1, 2]),
        (
            {"batch_sampler": EveryThird(range(40), 9, False)},
            [i for i in range(40) if i % 9 % 3 == 0],
        ),
        ({"sampler": [4, 2, 9]}, [4, 2, 9]),
        ({"sampler": Backwards()}, list(range(19, -1, -1))),
        ({"sampler": SubsetRandomSampler(EVENS), "drop_last": True, "batch_size": 8}, EVENS[:16]),
        ({"sampler": DistributedSampler(range(40), 4, 1, shuffle=False)}, list(range(1, 40, 4))),
        ({"drop_last": True, "batch_size": 9}, list(range(36))),
        ({"shuffle": True, "batch_size": 9}, list(range(40))),
        ({"batch_size": 9}, list(range(40))),
    ],
)
def test_the_images_are_those_of_the_sampler(settings, expected):
    assert numbers(watch(), DataLoader(dataset(40), **settings)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit_val_batches": 2}, list(range(18))),
        ({"limit_val_batches": 0.5}, list(range(18))),
        ({"limit_val_batches": 0}, list(range(40))),
        ({"overfit_batches": 1}, list(range(9))),
        ({"fast_dev_run": True}, list(range(9))),
        ({"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}, list(range(40))),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, list(range(40))),
    ],
)
def test_limits_and_late_loaders_are_those_of_the_trainer(options, expected):
    assert numbers(watch(), DataLoader(dataset(40), 9), **options) == expected


def test_overfitting_turns_shuffling_off():
    val = DataLoader(dataset(40), 9, shuffle=True)
    for options in ({}, {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}):
        assert numbers(watch(), val, overfit_batches=2, **options) == list(range(18))


def test_an_endless_batch_sampler_ends_with_the_images_that_are_asked_for():
    val = DataLoader(dataset(40), batch_sampler=Endless())
    assert numbers(watch(num_examples=7), val, limit_val_batches=5) == list(range(7))


def test_an_unbatched_loader_gives_whole_batches():
    images, labels = dataset(40).tensors
    batches = [(images[i : i + 9], labels[i : i + 9]) for i in range(0, 40, 9)]
    val = DataLoader(batches, batch_size=None)
    assert numbers(watch(num_examples=20), val) == list(range(20))


class OwnRandom(Sampler):
    """Draws a part of the images from a generator that nobody seeds."""

    def __init__(self):
        self.random = random.Random()

    def __iter__(self):
        return iter(self.random.sample(range(40), 10))

    def __len__(self):
        return 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"batch_size": 4, "sampler": OwnRandom()},
        lambda: {"batch_sampler": BatchSampler(OwnRandom(), 4, False)},
        lambda: {"sampler": RandomSampler(range(40), num_samples=10)},
        lambda: {"sampler": WeightedRandomSampler(torch.ones(40), 10, replacement=False)},
    ],
)
def test_a_random_part_is_fixed_for_the_run_and_when_it_is_resumed(make, tmp_path):
    module, measures = Foreign(), [watch(), RobustEarlyStopping(num_examples=100, steps=1, eps=0.1)]
    trainer = quiet_trainer(max_epochs=2, callbacks=measures)
    trainer.fit(module, loader(), DataLoader(dataset(40), **make()))
    images = measures[0].examples(trainer, module).images
    assert len(images) == 10
    assert torch.equal(images, measures[1].examples(trainer, module).images)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)
    again = watch()
    resumed = quiet_trainer(max_epochs=3, callbacks=[again], num_sanity_val_steps=0)
    val = DataLoader(dataset(40), **make())
    resumed.fit(module, loader(), val, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(images, again.examples(resumed, module).images)


def test_a_limited_shuffle_is_drawn_once():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        val = DataLoader(dataset(40), 9, shuffle=True)
        found.append(numbers(watch(), val, limit_val_batches=2))
    assert found[0] == found[1] != sorted(found[0])
    assert len(set(found[0])) == 18


def test_other_images_in_a_resumed_run_are_a_warning(tmp_path):
    module = Foreign()
    trainer = quiet_trainer(max_epochs=1, callbacks=[watch()])
    trainer.fit(module, loader(), loader(12))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = quiet_trainer(max_epochs=2, callbacks=[watch()])
    with pytest.warns(UserWarning, match="12 measured images of split val are not those"):
        resumed.fit(module, loader(), loader(12, seed=5), ckpt_path=tmp_path / "a.ckpt")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(8))


class Preparing(DataLoader):
    def __iter__(self):
        return (normalised(batch) for batch in super().__iter__())


class Sized(TensorDataset):
    """Opens a file for the workers alone."""

    def __getitem__(self, index):
        raise RuntimeError("not\nopened")


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (lambda d: DataLoader(Stream(), 4), "dataset with indices but got the IterableDataset"),
        (lambda d: Preparing(d, 4), "iterate as DataLoader does but got a Preparing"),
        (lambda d: [loader(), loader()], "Expected a DataLoader for `split` val but got list"),
        (lambda d: [d[:4]], "Expected a DataLoader for `split` val but got"),
        (lambda d: DataLoader(Sized(*d.tensors), 4), r"RuntimeError: not opened\); pass `dataset="),
        (lambda d: DataLoader([{"image": i} for i, _ in d], 4), "begin with images and labels"),
        (
            lambda d: DataLoader(d, 4, sampler=RandomSampler(d, replacement=True)),
            "got a RandomSampler, which draws with replacement",
        ),
        (
            lambda d: DataLoader(d, 4, sampler=WeightedRandomSampler(torch.ones(8), 2)),
            "got a WeightedRandomSampler, which draws with replacement",
        ),
        (
            lambda d: DataLoader(
                d, batch_sampler=EveryThird(WeightedRandomSampler(torch.ones(8), 2), 4, False)
            ),
            "got a WeightedRandomSampler, which draws with replacement",
        ),
        (lambda d: DataLoader(d, sampler=[1, 2, 1]), "got a list that draws image 1 again"),
        (lambda d: DataLoader(d, batch_sampler=[[1, 2], [3, 1]]), "list that draws image 1 again"),
        (
            lambda d: DataLoader(d, 4, sampler=RandomSampler(d, num_samples=12)),
            "RandomSampler that draws image . again",
        ),
    ],
)
def test_what_cannot_be_sure_is_refused_before_training(val, message):
    module = Foreign()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message) as caught:
        fitted(watch(), None, val(dataset(8)), module, num_sanity_val_steps=0, limit_val_batches=2)
    assert same(before, snapshot(module))
    assert "\n" not in str(caught.value)
    assert "dataset=" in str(caught.value)


class Noisy(Dataset):
    """Augments by whatever `draw` gives."""

    def __init__(self, draw):
        self.draw, self.epoch, self.reads = draw, 0, 0
        self.own = np.random.default_rng(0)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        self.reads += 1
        image, label = dataset(16)[index]
        return (image + 0.01 * float(self.draw(self))).clamp(0, 1), label


@pytest.mark.parametrize(
    "draw",
    [
        lambda d: torch.rand(()),
        lambda d: np.random.rand(),
        lambda d: random.random(),
        lambda d: d.own.random(),
        lambda d: d.reads,
        lambda d: d.epoch,
    ],
)
def test_training_images_that_change_are_refused_unless_a_dataset_is_passed(draw):
    train = DataLoader(Noisy(draw), 8, shuffle=True)
    with pytest.raises(ValueError, match="same whenever they are read .* pass `dataset=`"):
        fitted(watch(split="train"), train)
    fitted(watch(split="train", dataset=dataset(16)), train)
    # Validation images are fixed by reading them once, and averaging measures nothing.
    assert len(fitted(watch(), None, train)) == 16
    averaging = WeightAveraging(0.9, batch_norm="reestimate", reference_steps=None)
    quiet_trainer(callbacks=[averaging]).fit(Foreign(), train)


@pytest.mark.parametrize("where", ["hook", "epoch hook"])
def test_training_images_that_a_hook_changes_are_refused(where):
    class Augmenting(Foreign):
        strength = 0.0

        def on_train_epoch_start(self):
            self.strength = 0.1 * self.current_epoch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            change = torch.rand(()) if where == "hook" else self.strength
            images = batch[0] * (1 - 0.1 * change) if self.trainer.training else batch[0]
            return images, batch[1]

    with pytest.raises(ValueError, match="same whenever they are read"):
        fitted(watch(split="train"), module=Augmenting(), max_epochs=3)
    # The hook augments in training alone.
    val = fitted(watch(), None, loader(12), Augmenting())
    assert torch.equal(val.images, dataset(12).tensors[0])


class Traceable(Foreign):
    """Counts all that is called and draws from each global generator."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.counter["before"] += 1
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.counter["after"] += 1
        shift = torch.rand(()) + random.random() + np.random.rand()
        return (batch[0] + (0.01 * shift if self.trainer.training else 0)).clamp(0, 1), batch[1]

    def val_dataloader(self):
        self.counter["asked"] += 1
        return DataLoader(Noisy(lambda d: d.reads), 5, sampler=Counting(self.counter))


class Counting(Sampler):
    def __init__(self, counter):
        self.counter = counter

    def __iter__(self):
        self.counter["drawn"] += 1
        order = torch.randperm(16).tolist()
        return iter(order)

    def __len__(self):
        return 16


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_no_trace(workers):
    def run(callbacks):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        generator, counter = torch.Generator().manual_seed(5), Counter()
        module, data = Traceable(counter), Noisy(lambda d: d.own.random() * d.reads)
        settings = {"num_workers": workers, "persistent_workers": workers > 0}
        train = DataLoader(data, 4, shuffle=True, generator=generator, **settings)
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, limit_val_batches=2)
        trainer.fit(module, train)
        states = torch.get_rng_state(), generator.get_state()
        numpy_state = np.random.get_state()[1].tolist()
        states = [*(state.tolist() for state in states), numpy_state, random.getstate()]
        return snapshot(module), states, counter, data.reads, data.own.bit_generator.state

    measures = [
        watch(num_examples=9),
        RobustEarlyStopping(num_examples=9, steps=1, eps=0.1),
        WeightAveraging(0.9, batch_norm="reestimate", reference_steps=None, split="val"),
    ]
    alone, watched = run([]), run(measures[:2])
    assert same(alone[0], watched[0])
    assert alone[1:] == watched[1:]
    # Averages replace the weights at the end, and nothing else.
    assert alone[1:] == run(measures[2:])[1:]


def write(path):
    with open(path, "a") as file:
        file.write("read")


def add(shared):
    shared.value += 1


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (lambda d: write(d.path), "writes to .*log"),
        (lambda d: add(d.value), "changes shared memory"),
        (lambda d: d.tensor.add_(1), "changes shared memory"),
        (lambda d: os._exit(1), "its process died"),
    ],
)
def test_a_trace_that_a_fork_would_leave_is_refused(leave, message, tmp_path):
    class Leaving(TensorDataset):
        path = tmp_path / "log"
        value = multiprocessing.Value("i", 0)

        def __getitem__(self, index):
            leave(self)
            return super().__getitem__(index)

    data = Leaving(*dataset(8).tensors)
    data.tensor = torch.zeros(1).share_memory_()
    with pytest.raises(ValueError, match=f"failed .*{message}.*; pass `dataset=`"):
        fitted(watch(), None, DataLoader(data, 4), num_sanity_val_steps=0)
    assert not data.path.exists()


def test_a_test_after_a_fit_has_the_images_of_the_fit():
    measure, module = watch(), Foreign()
    trainer = quiet_trainer(callbacks=[measure], limit_val_batches=0)
    trainer.fit(module, loader(), loader(12, seed=3))
    (logged,) = trainer.test(module, loader(8), verbose=False)
    images = measure.examples(trainer, module).images
    assert torch.equal(images, dataset(12, seed=3).tensors[0])
    assert logged["val/error"] == trainer.callback_metrics["val/error"]
    # Another trainer, as for a test on a single device; and a test that brings the split itself.
    other = quiet_trainer(callbacks=[measure])
    other.test(module, loader(8), verbose=False)
    assert torch.equal(measure.examples(other, module).images, images)
    other.test(module, datamodule=ToyData(), verbose=False)
    assert torch.equal(measure.examples(other, module).images, ToyData().measured.tensors[0])


def test_a_test_has_the_images_of_its_own_loader():
    measure, module = watch(split="test"), Foreign()
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(module, datamodule=ToyData())
    trainer.test(module, loader(8, seed=3), verbose=False)
    assert torch.equal(measure.examples(trainer, module).images, dataset(8, seed=3).tensors[0])


def test_a_test_without_the_split_is_refused_before_it_begins():
    with pytest.raises(ValueError, match="DataLoader for `split` val but got NoneType"):
        quiet_trainer(callbacks=[watch()]).test(Foreign(), loader(8), verbose=False)
    # There is nothing to select on in a test.
    stopping = RobustEarlyStopping(num_examples=8, steps=1)
    quiet_trainer(callbacks=[stopping]).test(Foreign(), loader(8), verbose=False)


def test_the_test_set_of_a_datamodule_is_set_up_for_a_measure_in_fit():
    measure, data = watch(split="test", normalization=NORMALIZATION), ForeignData()
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(Foreign(), datamodule=data)
    images = measure.examples(trainer, trainer.lightning_module).images
    assert torch.allclose(images, dataset(9, seed=7).tensors[0])
    assert not hasattr(data, "test")


def test_own_datamodules_are_read_without_a_fork(monkeypatch):
    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr("robust_flatness.callbacks.delivery.in_fork", forbidden)
    measure = watch(num_examples=6)
    module = Foreign()
    module.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    trainer = quiet_trainer(callbacks=[measure], limit_train_batches=1)
    trainer.fit(module, datamodule=Digits(batch_size=20))
    assert len(measure.examples(trainer, module)) == 6


@pytest.mark.parametrize("split", ["val", "test"])
def test_images_of_a_single_class_are_a_warning(split):
    images, _ = images_and_labels(12)
    made = DataLoader(TensorDataset(images, torch.arange(12) // 6), 4)
    trainer = quiet_trainer(callbacks=[watch(split=split, num_examples=6)])
    run = trainer.test if split == "test" else lambda m, val: trainer.fit(m, loader(), val)
    with pytest.warns(UserWarning, match="All 6 measured images of split .* class 0 .* 10 classes"):
        run(Foreign(), made)


@pytest.mark.parametrize("through_loader", [True, False])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: y[:, None], None),
        (lambda y: y.float()[:, None], None),
        (lambda y: y.to(torch.uint8), None),
        (lambda y: torch.nn.functional.one_hot(y, 10), r"torch.int64 of shape \(12, 10\)"),
        (lambda y: torch.rand(12, 10).softmax(1), r"torch.float32 of shape \(12, 10\)"),
        (lambda y: y + 0.5, r"torch.float32 of shape \(12,\) with fractions"),
        (lambda y: torch.rand(12, 1), r"torch.float32 of shape \(12,\) with fractions"),
    ],
)
def test_labels_are_one_class_of_each_image(through_loader, make, message):
    images, labels = images_and_labels(12)
    data = TensorDataset(images, make(labels))
    # One image is a batch of its own, whose labels must not be taken for another dimension.
    measure = watch() if through_loader else watch(dataset=data)
    if message is None:
        found = fitted(measure, None, DataLoader(data, 11)).labels
        assert torch.equal(found, labels)
    else:
        with pytest.raises(ValueError, match=f"one class index for each image, .*{message}"):
            fitted(measure, None, DataLoader(data, 11))
