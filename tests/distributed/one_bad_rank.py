"""Run as a script on two gloo processes, of which one has something that is refused."""

import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from networks_for_tests import tiny_body
from trainers import PLAIN, ToyData, dataset, quiet_trainer

from robust_flatness.callbacks import RobustEvaluation
from robust_flatness.datamodules import Digits
from robust_flatness.functional.checks import errors_on_all_ranks
from robust_flatness.lightning_modules import AT


class BadBatch(ToyData):
    """One process has a pixel or a label out of range in its first batch."""

    def __init__(self, rank, **kwargs):
        super().__init__(**kwargs)
        self.rank = rank

    def train_dataloader(self):
        loader = super().train_dataloader()
        images, labels = (part.clone() for part in self.train.tensors)
        if self.trainer.global_rank == self.rank:
            self.spoil(images, labels)
        return DataLoader(TensorDataset(images, labels), loader.batch_size, sampler=loader.sampler)


class BadPixel(BadBatch):
    def spoil(self, images, labels):
        images[:, 0, 0, 0] = 3


class BadLabel(BadBatch):
    def spoil(self, images, labels):
        labels += 12


class BadMeasured(BadBatch):
    """One process reads other measured images, with a label that is no class or a broken file."""

    def spoil(self, images, labels):
        pass

    def split_dataset(self, split):
        images, labels = dataset(8)[:]
        return TensorDataset(images, labels + 12 * (self.trainer.global_rank == self.rank))


class BrokenMeasured(BadMeasured):
    def split_dataset(self, split):
        if self.trainer.global_rank == self.rank:
            raise OSError("The disk is gone.")
        return dataset(8)


class Unreadable(Digits):
    """One process cannot read the data set."""

    def sources(self):
        if self.trainer.global_rank == 0:
            raise FileNotFoundError("There is no such folder.")
        return super().sources()


def outcome(module, data):
    """What this process raised, and after how many seconds."""
    trainer = quiet_trainer(devices=2, strategy="ddp", callbacks=[RobustEvaluation(steps=1)])
    begin = time.monotonic()
    try:
        trainer.fit(module, data)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin, trainer.global_step
    return None


def main(folder):
    torch.set_num_threads(1)
    results = {
        "pixel": outcome(AT(network=tiny_body, **PLAIN), BadPixel(1)),
        "label": outcome(AT(network=tiny_body, **PLAIN), BadLabel(0)),
        "measured": outcome(AT(network=tiny_body, **PLAIN), BadMeasured(1)),
        "broken": outcome(AT(network=tiny_body, **PLAIN), BrokenMeasured(0)),
        "unreadable": outcome(AT(in_channels=1, mean=[0.5], std=[0.5]), Unreadable(batch_size=8)),
    }
    with errors_on_all_ranks():
        rank = torch.distributed.get_rank()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    # A process that exits alone may abort the other one, whose threads still listen to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
