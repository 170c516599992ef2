from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from networks_for_tests import (
    PassCounter,
    images_and_labels,
    same,
    snapshot,
    tiny_body,
    tiny_network,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.functional import PGD
from robust_flatness.lightning_modules import AT, ATAWP, MultiStep, load_checkpoint
from robust_flatness.networks import ResNet18


def test_minimises_cross_entropy_on_adversarial_examples_alone():
    module = AT(tiny_body, **PLAIN)
    images, labels = images_and_labels()
    adversarial = images.flip(0)
    loss, logits, terms = module.objective(images, adversarial, labels)
    assert not terms
    assert torch.equal(logits, module(adversarial))
    assert torch.equal(loss, cross_entropy(module(adversarial), labels))


def test_one_step_spends_the_minimum_of_passes():
    module = AT(tiny_body, **{**PLAIN, "steps": 7})
    passes = PassCounter(module.network)
    quiet_trainer(max_epochs=1).fit(module, loader(8))
    # Seven gradient steps, one look at the last iterate, and the update's own pass.
    assert passes.forwards == 8 * (7 + 1 + 1)
    assert passes.backwards == 8 * (7 + 1)


def test_awp_adds_one_forward_and_one_backward():
    module = ATAWP(network=tiny_body, **{**PLAIN, "steps": 7})
    passes = PassCounter(module.network)
    quiet_trainer(max_epochs=1).fit(module, loader(8))
    assert passes.forwards == 8 * (7 + 1 + 2)
    assert passes.backwards == 8 * (7 + 2)


def test_crafting_leaves_batch_norm_to_the_update():
    module = AT(tiny_body, **PLAIN)
    before = module.network[1].num_batches_tracked.item()
    quiet_trainer(max_epochs=1).fit(module, loader(24))
    assert module.network[1].num_batches_tracked.item() == before + 3


def test_metrics_of_an_epoch_are_means_over_its_examples():
    seen = []

    class Spy(AT):
        def objective(self, images, adversarial, labels):
            loss, logits, _ = super().objective(images, adversarial, labels)
            seen.append((logits.detach(), labels))
            return loss, logits, {"train/first": labels == 1}

    module = Spy(tiny_body, **PLAIN)
    trainer = quiet_trainer(max_epochs=1)
    # Batches of 8, 8 and 5: a mean of batch means would weigh the last too high.
    trainer.fit(module, loader(21))
    logits, labels = (torch.cat(part) for part in zip(*seen))
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["train/first"], (labels == 1).float().mean())
    expected = cross_entropy(logits, labels)
    torch.testing.assert_close(logged["train/robust_loss"], expected)
    torch.testing.assert_close(logged["train/loss"], expected)
    wrong = (logits.argmax(1) != labels).float().mean()
    torch.testing.assert_close(logged["train/robust_error"], wrong)


def test_starts_differ_between_batches_and_repeat_with_the_seed():
    def starts(seed):
        torch.manual_seed(seed)
        found = []

        class Spy(AT):
            def craft(self, images, labels, *args):
                adversarial = super().craft(images, labels, *args)
                found.append(adversarial - images)
                return adversarial

        module = Spy(tiny_body, **{**PLAIN, "steps": 1, "step_size": 0.0, "keep": "last"})
        torch.manual_seed(seed)
        quiet_trainer(max_epochs=2).fit(module, loader(16))
        return torch.stack(found)

    first, again, other = starts(0), starts(0), starts(1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    signs = first.sign().flatten(1)
    for i in range(4):
        for j in range(i):
            assert (signs[i] == signs[j]).float().mean() < 0.6


def test_defaults_are_the_papers_baseline():
    module = AT(partial(ResNet18, width=4))
    assert module.pgd == PGD(eps=8 / 255, steps=7)
    assert module.pgd.length == pytest.approx(0.007)
    module.trainer = quiet_trainer(max_epochs=150)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert group["nesterov"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    rates = []
    for _ in range(150):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    drops = [epoch for epoch in range(1, 150) if rates[epoch] != rates[epoch - 1]]
    assert drops == [60, 90, 120]
    assert rates[-1] == pytest.approx(5e-5)


def test_milestones_are_shares_and_do_not_lag_by_rounding():
    for epochs, expected in ((60, [24, 36, 48]), (7, [3, 5, 6]), (1, [1, 1, 1])):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = MultiStep(optimizer)
        scheduler.total = epochs
        for epoch in range(epochs + 1):
            passed = sum(epoch >= milestone for milestone in expected)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1**passed)
            optimizer.step()
            scheduler.step()
    assert "total" not in scheduler.state_dict()
    # 0.07 · 100 is 7.000000000000001 in floating point.
    scheduler = MultiStep(torch.optim.SGD([torch.zeros(1)], lr=1.0), milestones=[0.07])
    scheduler.total, scheduler.last_epoch = 100, 7
    assert scheduler.get_lr() == [0.1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision_clipping_and_accumulation_work_together(precision):
    module = ATAWP(network=tiny_body, xi=0.01, **PLAIN)
    before = module.network[0].weight.detach().clone()
    trainer = quiet_trainer(
        max_epochs=2, precision=precision, gradient_clip_val=1.0, accumulate_grad_batches=2
    )
    trainer.fit(module, loader(32))
    assert not torch.equal(before, module.network[0].weight)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32


@pytest.mark.parametrize("cls", [AT, ATAWP])
def test_checkpoint_loads_back_as_the_class_that_wrote_it(cls, tmp_path):
    path = tmp_path / "a.ckpt"
    module = cls(network=tiny_body, **PLAIN)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(path)
    loaded = load_checkpoint(path, network=tiny_body)
    assert type(loaded) is cls
    assert loaded.pgd == module.pgd
    images, _ = images_and_labels()
    assert torch.equal(loaded(images), module.eval()(images))


def test_checkpoint_of_another_class_is_refused(tmp_path):
    path = tmp_path / "awp.ckpt"
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ATAWP(network=tiny_body, **PLAIN), loader(8))
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match="written by AT but got one of ATAWP"):
        AT.load_from_checkpoint(path, network=tiny_body)
    with pytest.raises(ValueError, match="written by AT but got one of ATAWP"):
        quiet_trainer(max_epochs=2).fit(AT(tiny_body, **PLAIN), loader(8), ckpt_path=path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="to be a checkpoint of"):
        load_checkpoint(path)


def test_bad_first_batches_stop_before_training():
    module = AT(tiny_body, **PLAIN)
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        quiet_trainer().fit(module, DataLoader(TensorDataset(images * 255, labels), 8))
    labels[1:3] = torch.tensor([12, 0])
    with pytest.raises(ValueError, match="below the 10 classes but got 0 to 12"):
        quiet_trainer().fit(module, DataLoader(TensorDataset(images, labels), 8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -1.0}, "`eps` to be >= 0 but got -1.0"),
        ({"steps": -2}, "`steps`"),
        ({"num_classes": 1}, "`num_classes` to be >= 2 but got 1"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AT(tiny_body, **kwargs)


def test_shares_of_endless_training_are_refused():
    with pytest.raises(ValueError, match="`trainer.max_epochs` to be >= 1"):
        quiet_trainer(max_epochs=-1).fit(AT(tiny_body, **PLAIN), loader(8))


def test_batches_whose_loss_is_nan_are_not_hidden():
    class Broken(AT):
        def objective(self, images, adversarial, labels):
            loss, *others = super().objective(images, adversarial, labels)
            return loss * torch.nan, *others

    module = Broken(tiny_body, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **PLAIN)
    trainer = quiet_trainer()
    trainer.fit(module, loader(8))
    assert trainer.callback_metrics["train/loss"].isnan()


def test_a_resumed_run_keeps_its_noise_under_another_global_seed(tmp_path):
    path = tmp_path / "a.ckpt"
    module, trainer = AT(tiny_body, **PLAIN), quiet_trainer(max_epochs=1)
    torch.manual_seed(5)
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(path)
    module = AT(tiny_body, **PLAIN)
    torch.manual_seed(6)
    quiet_trainer(max_epochs=2).fit(module, loader(8), ckpt_path=path)
    assert module.run_seed == 5


class Rates(Callback):
    """Learning rates of the steps, by epoch."""

    def __init__(self):
        self.found = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.found[trainer.current_epoch] = trainer.optimizers[0].param_groups[0]["lr"]


def test_a_run_that_goes_on_for_longer_has_the_rates_of_the_longer_run(tmp_path):
    rates, settings = Rates(), {"network": tiny_body, **PLAIN}
    settings["lr_scheduler"] = lambda optimizer: MultiStep(optimizer, milestones=[0.5])
    short = quiet_trainer(max_epochs=4)
    short.fit(AT(**settings), loader(8))
    short.save_checkpoint(tmp_path / "a.ckpt")
    longer = quiet_trainer(max_epochs=10, callbacks=[rates])
    longer.fit(AT(**settings), loader(8), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert list(rates.found) == [4, 5, 6, 7, 8, 9]
    assert list(rates.found.values()) == pytest.approx([0.05] + [0.005] * 5)


def flat_body(classes, channels):
    """BatchNorm has one value of a single image."""
    layers = nn.Flatten(), nn.Linear(64 * channels, 8), nn.BatchNorm1d(8), nn.Linear(8, classes)
    return nn.Sequential(*layers)


def test_an_epoch_may_end_with_one_image_if_the_network_can_train_on_it(monkeypatch):
    module = AT(network=flat_body, **PLAIN)
    before = snapshot(module)
    message = "more than one image for the network to train on but got 9 images in batches of 8"
    with pytest.raises(ValueError, match=message):
        quiet_trainer().fit(module, loader(9))
    assert same(snapshot(module), before)
    # BatchNorm has 64 values of an image here, and the trial leaves no trace.
    ends = []
    for _ in range(2):
        module, trainer = AT(network=partial(tiny_network, dropout=True), **PLAIN), quiet_trainer()
        torch.manual_seed(0)
        trainer.fit(module, loader(9))
        assert trainer.global_step == 2
        ends.append((snapshot(module), torch.rand(1)))
        monkeypatch.setattr(AT, "_check_last_batch", lambda self, image: None)
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
