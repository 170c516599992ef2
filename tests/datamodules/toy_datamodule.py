"""A datamodule of random images, and what trains on it, for the tests in this folder."""

from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer

from robust_flatness.datamodules import ResidentImages, RobustDataModule


class Toy(RobustDataModule):
    """Random images whose labels are their positions, and so tell them apart."""

    in_channels = 1
    mean = [0.5]
    std = [0.3]

    def __init__(self, *, train=24, test=20, num_classes=24, first_label=0, **kwargs):
        super().__init__(**{"num_val": 5, "num_test": 10, "batch_size": 8, **kwargs})
        self.num_classes = num_classes
        self.counts = (train, test)
        self.first_label = first_label

    def sources(self):
        generator = torch.Generator().manual_seed(0)
        shapes = [(count, 1, 8, 8) for count in self.counts]
        return tuple(
            ResidentImages(
                torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8),
                self.first_label + torch.arange(shape[0]),
            )
            for shape in shapes
        )


class ToyWithPool(Toy):
    """Toy with pseudo-labeled images, by default 10, whose pixels are 0 and labels positions."""

    def __init__(self, *, pool=10, **kwargs):
        super().__init__(**{"unlabeled_share": 0.25, "seed": 0, "augment": "none", **kwargs})
        self.pool = pool

    def unlabeled_source(self):
        return ResidentImages(
            torch.zeros(self.pool, 1, 8, 8, dtype=torch.uint8), torch.arange(self.pool)
        )


class Recorder(LightningModule):
    """A model of one weight that keeps every batch it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(part.clone() for part in batch))
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**kwargs):
    """A trainer on the CPU that writes nothing but what it is asked for."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **kwargs})


def fake_trainer(rank=0, world_size=1, epoch=0, batch=0, device="cpu"):
    """The part of a trainer that a datamodule asks, for one of several processes."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=epoch))
    return SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        training=True,
        strategy=SimpleNamespace(broadcast=lambda x: x, root_device=torch.device(device)),
        precision_plugin=SimpleNamespace(convert_input=lambda x: x),
        fit_loop=SimpleNamespace(epoch_progress=progress, batch_idx=batch - 1),
    )


def record(datamodule, ckpt_path=None, **kwargs):
    """Train on a datamodule and return the batches that the model saw."""
    module = Recorder()
    quiet_trainer(**kwargs).fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return module.seen


def epoch_of(datamodule, rank, world_size, epoch=0):
    """Return the augmented batches of one epoch for one of several processes."""
    datamodule.trainer = fake_trainer(rank, world_size, epoch)
    datamodule.setup("fit")
    batches = []
    for index, batch in enumerate(datamodule.train_dataloader()):
        datamodule.trainer = fake_trainer(rank, world_size, epoch, index)
        batches.append(datamodule.on_after_batch_transfer(batch, 0))
    return batches
