"""Small trainings with averaged weights, and callbacks that look at them."""

import torch
from lightning.pytorch import Callback, LightningModule
from networks_for_tests import snapshot, tiny_body, tiny_network
from torch.nn.functional import cross_entropy
from trainers import PLAIN, ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import RobustEarlyStopping, WeightAveraging
from robust_flatness.callbacks.final_measurement import FinalMeasurement
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.lightning_modules import AT

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


class Spy(Measurement):
    """Measures one weight, and keeps all that it saw."""

    def __init__(self, isolate=True, **kwargs):
        super().__init__(num_examples=4, **kwargs)
        self.isolate, self.seen = isolate, []

    @property
    def state_key(self):
        return f"Spy{id(self)}"

    def measure(self, trainer, pl_module):
        if self.isolate:
            with self.network(trainer, pl_module) as network, self.network(trainer, pl_module):
                self.seen.append(snapshot(network))
        else:
            self.seen.append(snapshot(pl_module))
        return {"test/weight": self.seen[-1][NAME][0, 0, 0, 0].item()}


class Final(FinalMeasurement):
    def __init__(self):
        super().__init__()
        self.spy = Spy()

    @property
    def measurements(self):
        return [self.spy]

    def logged_name(self, name, weights):
        return f"{weights}/{name}"


class Scripted(RobustEarlyStopping):
    """The first epoch is the best."""

    def measure(self, trainer, pl_module):
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
