"""Small trainings with averaged weights, and callbacks that look at them."""

from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule
from networks_for_tests import snapshot, tiny_body, tiny_network
from torch.nn.functional import cross_entropy
from trainers import PLAIN, ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import (
    EpochMeasure,
    FinalMeasure,
    RobustEarlyStopping,
    WeightAveraging,
)
from robust_flatness.lightning_modules import AT
from robust_flatness.measures import Measure

NAME = "network.0.weight"


def averaging(decay=0.8, **kwargs):
    return WeightAveraging(decay, reference_steps=None, **{"num_examples": 10, **kwargs})


def average_of(callback):
    return snapshot(callback._average_model.module)


def module(cls=AT, **kwargs):
    torch.manual_seed(0)
    return cls(**{"network": tiny_body, **PLAIN, **kwargs})


def fit(*callbacks, epochs=1, data=None, net=None, ckpt_path=None, **kwargs):
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(callbacks), **kwargs)
    net = net or module()
    trainer.fit(net, data or ToyData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer, net


def train(net, *callbacks, **kwargs):
    torch.manual_seed(0)
    quiet_trainer(max_epochs=2, callbacks=list(callbacks), **kwargs).fit(net)


class Recorder(Callback):
    """The module's weights after each batch and each epoch, as training has them."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(snapshot(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(snapshot(pl_module))


@dataclass(frozen=True)
class Weight:
    value: float


class FirstWeight(Measure):
    """One weight, so that a test knows which weights were measured; keeps all that it saw."""

    whole_set = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def measure(self, network, examples):
        self.seen.append(snapshot(network))
        return Weight(next(network.parameters()).flatten()[0].item())

    def metric_names(self, split):
        return (f"{split}/weight",)

    def values(self, result):
        return (result.value,)


class Spy(EpochMeasure):
    """Sees the weights that are measured at the end of an epoch."""

    def __init__(self, split="test"):
        super().__init__(measure=FirstWeight(), num_examples=4, split=split)

    @property
    def seen(self):
        return self.measure.seen


class Final(FinalMeasure):
    """Sees the weights that are measured at the end of training."""

    def __init__(self):
        super().__init__(measure=FirstWeight(), num_examples=7)

    @property
    def seen(self):
        return self.measure.seen


class Scripted(RobustEarlyStopping):
    """The first epoch is the best."""

    def compute(self, trainer, pl_module):
        return {"val/robust_error": 0.1 + 0.1 * trainer.current_epoch}


class Stranger(LightningModule):
    """BatchNorm, Dropout, a shuffling loader, global random state, and a validation."""

    def __init__(self, fail=False):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.fail, self.validated = tiny_network(dropout=True), fail, []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x + 0.05 * torch.rand_like(x)), y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(snapshot(self))
        if self.fail and self.trainer.global_step:
            raise RuntimeError("failed in validation")

    def train_dataloader(self):
        return torch.utils.data.DataLoader(dataset(32), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return loader(8)

    def test_dataloader(self):
        return loader(8)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
