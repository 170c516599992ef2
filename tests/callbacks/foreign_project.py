"""A small Lightning project of somebody else, and which of its images are measured."""

import torch
from lightning.pytorch import LightningModule
from networks_for_tests import tiny_network
from torch.nn.functional import cross_entropy
from trainers import dataset, loader, quiet_trainer

from robust_flatness.callbacks import RobustEvaluation

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
