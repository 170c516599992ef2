"""Promise 14: measures look at the images that a loader's sampler draws, or refuse."""

import random

import pytest
import torch
from foreign_project import Foreign, fitted, normalised, numbers, watch
from networks_for_tests import same, snapshot
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from trainers import dataset, loader, quiet_trainer

from robust_flatness.callbacks import Flatness

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
    light = {"num_examples": 100, "num_perturbations": 1, "steps": 1, "eps": 0.1}
    module, measures = Foreign(), [watch(), Flatness(split="val", **light)]
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
        (
            lambda d: DataLoader([{"image": i} for i, _ in d], 4),
            r"but got a dict; pass `dataset=` with",
        ),
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
