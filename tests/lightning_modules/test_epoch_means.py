import torch
from lightning.pytorch import Callback
from networks_for_tests import tiny_body
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.lightning_modules import AT
from robust_flatness.lightning_modules.epoch_means import EpochMeans


def test_means_weigh_every_value_alike_and_are_kept_apart():
    means = EpochMeans()
    means.add("a", torch.tensor([1.0, 2.0, 3.0]))
    means.add("b", torch.tensor([True, False]))
    means.add("a", torch.tensor([[6.0]]))
    means.add("a", torch.zeros(0))
    with means.paused():
        means.add("a", torch.tensor([100.0]))
    assert means["a"].compute() == 3.0
    assert means["b"].compute() == 0.5


def test_a_mean_that_was_read_goes_on():
    means = EpochMeans()
    means.add("a", torch.tensor([1.0, 2.0]))
    assert means["a"].compute() == 1.5
    means.add("a", torch.tensor([6.0]))
    assert means["a"].compute() == 3.0


class Reads(Callback):
    """Looks at a mean in the middle of an epoch and at its end."""

    def __init__(self):
        self.read, self.logged = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.read.append(module.means["train/loss"].compute().item())

    def on_train_epoch_start(self, trainer, module):
        self.logged.append(trainer.callback_metrics.get("train/loss"))


def test_a_mean_that_a_callback_reads_is_logged_all_the_same():
    figures = []
    for callbacks in ([], [Reads()]):
        torch.manual_seed(0)
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(AT(tiny_body, **PLAIN), loader(16))
        figures.append(trainer.callback_metrics["train/loss"].item())
    assert figures[1] == figures[0]
    assert callbacks[0].read[-1] == figures[0]


def test_a_training_that_failed_leaves_nothing_to_the_next():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise RuntimeError("half-way")

    module = AT(tiny_body, **PLAIN)
    try:
        quiet_trainer(callbacks=[Fails()]).fit(module, loader(16))
    except RuntimeError:
        counts = []
        module.on_before_zero_grad = lambda _: counts.append(module.means._counts["train/loss"])
        quiet_trainer().fit(module, loader(16))
    assert counts == [8, 16]
