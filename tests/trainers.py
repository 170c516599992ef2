"""Small trainers and data that tests share."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from networks_for_tests import images_and_labels
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from robust_flatness import lightning_modules
from robust_flatness.lightning_modules import AT

VARIANTS: list[Any] = [
    member
    for name, member in vars(lightning_modules).items()
    if name in lightning_modules.__all__ and isinstance(member, type) and issubclass(member, AT)
]
PLAIN: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "eps": 0.1, "steps": 2}


def quiet_trainer(**kwargs: Any) -> Trainer:
    """A CPU trainer that writes and shows nothing unless asked."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **kwargs,
    }
    return Trainer(**settings)


def dataset(count: int = 16, *, seed: int = 1, double: bool = False) -> TensorDataset:
    """Random 3x8x8 images with labels of ten classes."""
    images, labels = images_and_labels(count, seed=seed)
    return TensorDataset(images.double() if double else images, labels)


def loader(count: int = 16, batch_size: int = 8, **kwargs: Any) -> DataLoader:
    """Batches of `dataset`, in order."""
    return DataLoader(dataset(count, **kwargs), batch_size=batch_size)


def mixed_loader() -> DataLoader:
    """Two batches of 8 in which every fourth image has a pseudo-label."""
    images, labels = images_and_labels(16)
    return DataLoader(TensorDataset(images, labels, torch.arange(16) % 4 == 0), 8)


class ToyData(LightningDataModule):
    """A global batch shared out to ranks as the package's own datamodules do."""

    def __init__(self, count: int = 32, batch_size: int = 8, *, double: bool = False) -> None:
        super().__init__()
        self.train, self.batch_size = dataset(count, double=double), batch_size
        self.measured = dataset(21, seed=5, double=double)
        self.eps = 0.1

    def split_dataset(self, split: str) -> Dataset:
        return self.measured

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.train, world, rank, seed=3, drop_last=True)
        return DataLoader(self.train, self.batch_size // world, sampler=sampler)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.measured, batch_size=8)


class EvalBatchNorm(AT):
    """AT with BatchNorm in eval mode: what a network computes is then a sum over examples."""

    def on_train_epoch_start(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
