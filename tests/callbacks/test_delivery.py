"""Promises 1 and 14: reading the measured images leaves no trace, and sees random ones."""

import multiprocessing
import os
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from foreign_project import Foreign, fitted, watch
from networks_for_tests import same, snapshot
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    TensorDataset,
)
from trainers import dataset, loader, quiet_trainer

from robust_flatness.callbacks import Flatness, WeightAveraging
from robust_flatness.callbacks.delivery import in_fork


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
        Flatness(split="val", num_perturbations=1, num_examples=9, steps=1, eps=0.1),
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


def test_a_fork_that_hangs_is_refused(monkeypatch):
    monkeypatch.setattr("robust_flatness.callbacks.delivery.TIMEOUT", 0.2)
    with pytest.raises(ValueError, match=r"that failed \(no answer in 0.2 s\); pass `dataset=`"):
        in_fork(lambda: time.sleep(60), "a loader")
