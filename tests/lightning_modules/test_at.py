"""What every variant inherits: crafting, labels, metrics, seeds, checkpoints, checks."""

import math
from functools import partial

import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_body, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.functional import PGD
from robust_flatness.lightning_modules import AT, ATAWP, load_checkpoint
from robust_flatness.networks import ResNet18


class Spy(AT):
    """Remembers what attacks and objectives get, and what the objective returns."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attacked, self.given, self.returned = [], [], []

    def craft(self, images, labels, *args, **kwargs):
        adversarial = super().craft(images, labels, *args, **kwargs)
        self.attacked.append((images, labels, adversarial))
        return adversarial

    def objective(self, images, adversarial, labels):
        returned = super().objective(images, adversarial, labels)
        self.given.append((images, adversarial, labels))
        self.returned.append((returned[0].detach(), returned[1].detach()))
        return returned


def spied(**kwargs):
    return Spy(tiny_body, **{**PLAIN, **kwargs})


def test_crafting_leaves_batch_norm_to_the_update():
    module = AT(tiny_body, **PLAIN)
    before = module.network[1].num_batches_tracked.item()
    quiet_trainer().fit(module, loader(24))
    assert module.network[1].num_batches_tracked.item() == before + 3


def test_metrics_of_an_epoch_are_means_over_its_examples():
    class Terms(Spy):
        def objective(self, images, adversarial, labels):
            loss, logits, _ = super().objective(images, adversarial, labels)
            return loss, logits, {"train/first": labels == 1}

    module, trainer = Terms(tiny_body, **PLAIN), quiet_trainer(max_epochs=2)
    # Batches of 8, 8 and 5: a mean of batch means would weigh the last too high.
    trainer.fit(module, loader(21))
    logits = torch.cat([logits for _, logits in module.returned[3:]])
    labels = torch.cat([labels for *_, labels in module.given[3:]])
    logged = trainer.callback_metrics
    expected = cross_entropy(logits, labels)
    torch.testing.assert_close(logged["train/robust_loss"], expected)
    torch.testing.assert_close(logged["train/loss"], expected)
    wrong = (logits.argmax(1) != labels).float().mean()
    torch.testing.assert_close(logged["train/robust_error"], wrong)
    torch.testing.assert_close(logged["train/first"], (labels == 1).float().mean())


def test_a_training_that_failed_leaves_nothing_to_the_metrics_of_the_next():
    class Fails(Spy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.max_epochs == 7:
                raise RuntimeError("half-way")

    module, trainer = Fails(tiny_body, **PLAIN), quiet_trainer()
    with pytest.raises(RuntimeError, match="half-way"):
        quiet_trainer(max_epochs=7).fit(module, loader(16))
    trainer.fit(module, loader(8))
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], module.returned[-1][0])


def test_starts_differ_between_batches_and_repeat_with_the_seed():
    def starts(seed):
        torch.manual_seed(seed)
        module = spied(steps=1, step_size=0.0, keep="last")
        torch.manual_seed(seed)
        quiet_trainer(max_epochs=2).fit(module, loader(16))
        return torch.stack([adversarial - images for images, _, adversarial in module.attacked])

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


def test_a_radius_above_one_is_meant_in_l2_and_a_larger_eps_keeps_the_length_of_the_steps():
    assert spied(eps=2.0, norm="l2", eps_scale=1.5).pgd.eps == 3
    pgd = spied(eps=8 / 255, eps_scale=1.125).pgd
    assert (pgd.eps, pgd.length) == pytest.approx((9 / 255, 0.007))


def test_label_noise_and_smoothing_do_not_reach_the_attack_nor_the_metrics():
    module, trainer = spied(label_noise=0.9, label_smoothing=0.3), quiet_trainer()
    images, labels = images_and_labels(32)
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 8))
    attacked = torch.cat([labels for _, labels, _ in module.attacked])
    noisy = torch.cat([labels for *_, labels in module.given])
    assert torch.equal(attacked, labels)
    changed = (noisy != labels).float().mean().item()
    assert 0.5 < changed < 1
    logged = trainer.callback_metrics
    assert logged["label_noise/changed"].item() == pytest.approx(changed)
    # Smoothed and noisy is the training loss alone.
    logits = torch.cat([logits for _, logits in module.returned])
    torch.testing.assert_close(logged["train/robust_loss"], cross_entropy(logits, labels))
    wrong = (logits.argmax(1) != labels).float().mean()
    torch.testing.assert_close(logged["train/robust_error"], wrong)
    assert logged["train/loss"].item() != pytest.approx(cross_entropy(logits, labels).item(), 1e-3)


def test_label_noise_is_drawn_anew_in_each_batch():
    module = spied(label_noise=0.5)
    images, labels = images_and_labels(8)
    data = DataLoader(TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), 8)
    quiet_trainer().fit(module, data)
    drawn = [labels for *_, labels in module.given]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_incorrect_images_stay_clean_or_are_attacked_as_their_predicted_class():
    images, labels = images_and_labels(8)
    data = DataLoader(TensorDataset(images, labels), 8)
    predicted = spied().clean_logits(images).argmax(1)
    wrong = predicted != labels
    assert wrong.sum() > 0
    module = spied(incorrect="ignore")
    quiet_trainer().fit(module, data)
    ((clean, adversarial, _),) = module.given
    assert torch.equal((clean != adversarial).flatten(1).any(1), ~wrong)
    module = spied(incorrect="predicted")
    quiet_trainer().fit(module, data)
    assert torch.equal(module.attacked[0][1], predicted)
    assert torch.equal(module.given[0][2], labels)


@pytest.mark.parametrize("incorrect", ["attack", "ignore", "predicted"])
def test_a_network_that_is_not_finite_is_wrong_on_every_image(incorrect):
    module, trainer = spied(incorrect=incorrect), quiet_trainer(limit_train_batches=1)
    with torch.no_grad():
        module.network[0].weight.fill_(math.nan)
    trainer.fit(module, loader(8))
    ((clean, adversarial, labels),) = module.given
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    # Without a prediction there is nothing but the label to attack, and no correct image.
    assert torch.equal(module.attacked[0][1], labels)
    assert torch.equal(clean, adversarial) == (incorrect == "ignore")
    assert trainer.callback_metrics["train/robust_error"] == 1
    assert trainer.callback_metrics["train/robust_loss"].isnan()
    assert trainer.callback_metrics["train/loss"].isnan()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision_clipping_and_accumulation_work_together(precision):
    module = ATAWP(tiny_body, xi=0.01, **PLAIN)
    before = module.network[0].weight.detach().clone()
    trainer = quiet_trainer(
        max_epochs=2, precision=precision, gradient_clip_val=1.0, accumulate_grad_batches=2
    )
    trainer.fit(module, loader(32))
    assert not torch.equal(before, module.network[0].weight)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())
    assert trainer.callback_metrics["train/loss"].dtype == torch.float32


def test_checkpoint_of_another_class_is_refused(tmp_path):
    path = tmp_path / "awp.ckpt"
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ATAWP(tiny_body, **PLAIN), loader(8))
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match="written by AT but got one of ATAWP"):
        AT.load_from_checkpoint(path, network=tiny_body)
    with pytest.raises(ValueError, match="written by AT but got one of ATAWP"):
        quiet_trainer(max_epochs=2).fit(AT(tiny_body, **PLAIN), loader(8), ckpt_path=path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(
        ValueError, match="to be a checkpoint of AT, ATAWP, MART.* written by another module"
    ):
        load_checkpoint(path)


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
        ({"incorrect": "skip"}, "`incorrect` to be one of attack, ignore, predicted but got skip"),
        ({"eps_scale": -1.0}, "`eps_scale` to be >= 0 but got -1.0"),
        ({"eps": 8}, r"`eps` to be in \[0, 1\] for norm linf.* but got 8; .* is 8/255"),
        ({"eps": 0.9, "eps_scale": 1.125}, r"`eps \* eps_scale` to be in \[0, 1\] .* got 1.0125"),
        ({"step_size": 2}, r"`step_size` to be in \[0, 1\] .* is 2/255"),
        ({"tau": -1}, "`tau` to be >= 0 but got -1"),
        ({"label_noise": 2.0}, r"`label_noise` to be in \[0, 1\] but got 2.0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AT(tiny_body, **kwargs)


def flat_body(classes, channels):
    """BatchNorm has one value of a single image."""
    layers = nn.Flatten(), nn.Linear(64 * channels, 8), nn.BatchNorm1d(8), nn.Linear(8, classes)
    return nn.Sequential(*layers)


def test_an_epoch_may_end_with_one_image_if_the_network_can_train_on_it(monkeypatch):
    module = AT(flat_body, **PLAIN)
    before = snapshot(module)
    message = "more than one image for the network to train on but got 9 images in batches of 8"
    with pytest.raises(ValueError, match=message):
        quiet_trainer().fit(module, loader(9))
    assert same(snapshot(module), before)
    # BatchNorm has 64 values of an image here, and the trial leaves no trace.
    ends = []
    for _ in range(2):
        module, trainer = AT(partial(tiny_network, dropout=True), **PLAIN), quiet_trainer()
        torch.manual_seed(0)
        trainer.fit(module, loader(9))
        assert trainer.global_step == 2
        ends.append((snapshot(module), torch.rand(1)))
        monkeypatch.setattr(AT, "_check_last_batch", lambda self, image: None)
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_a_strategy_that_shards_weights_is_refused_before_training(monkeypatch):
    monkeypatch.setattr("robust_flatness.functional.checks.SHARDED", ("SingleDeviceStrategy",))
    trainer = quiet_trainer()
    with pytest.raises(ValueError, match="all weights on each process, such as ddp, for AT but"):
        trainer.fit(AT(tiny_body, **PLAIN), loader())
    assert trainer.global_step == 0
