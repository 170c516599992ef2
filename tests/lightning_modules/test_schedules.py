import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from networks_for_tests import tiny_body
from torch.optim import SGD
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.lightning_modules import AT, Cyclic, MultiStep


def run_through(steps, **kwargs):
    optimizer = SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    schedule = Cyclic(optimizer, **kwargs)
    schedule.total = steps
    seen = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["momentum"]))
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("cycles", [1, 2, 3, 4])
def test_goes_up_and_down_once_a_cycle(cycles):
    steps = 120
    rates = [rate for rate, _ in run_through(steps, cycles=cycles)]
    length = steps // cycles
    for step, rate in enumerate(rates):
        place = (step % length) / length
        assert rate == pytest.approx(0.4 * min(place, 1 - place), abs=1e-9)
    assert max(rates) == pytest.approx(0.2)
    assert sum(rate == pytest.approx(0.2) for rate in rates) == cycles


def test_momentum_cycles_inversely_or_not_at_all():
    momenta = [momentum for _, momentum in run_through(40, cycles=1)]
    assert momenta[0] == pytest.approx(0.9)
    assert momenta[20] == pytest.approx(0.8)
    assert momenta[10] == pytest.approx(0.85)
    fixed = [momentum for _, momentum in run_through(40, cycles=1, cycle_momentum=False)]
    assert set(fixed) == {0.9}


class Rates(AT):
    """Remembers the rate of every step."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.__dict__.setdefault("rates", []).append(rate)


def test_a_run_goes_through_its_cycles_step_by_step():
    module = Rates(tiny_body, lr_scheduler=lambda o: Cyclic(o, cycles=2), **PLAIN)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, loader(64))
    assert module.rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.15, 0.1, 0.05] * 2)


def test_accumulation_counts_optimizer_steps():
    module = Rates(tiny_body, lr_scheduler=lambda o: Cyclic(o, cycles=1), **PLAIN)
    quiet_trainer(max_epochs=2, accumulate_grad_batches=2).fit(module, loader(64))
    assert module.rates[::2] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.15, 0.1, 0.05])


def test_a_resumed_run_goes_on_in_its_cycle(tmp_path):
    def fit(epochs=4, **kwargs):
        torch.manual_seed(0)
        module = Rates(tiny_body, lr_scheduler=lambda o: Cyclic(o, cycles=1), **PLAIN)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=2, save_top_k=-1)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(module, loader(32), **kwargs)
        return module.rates

    whole = fit()
    checkpoint = tmp_path / "epoch=1.ckpt"
    assert fit(ckpt_path=checkpoint) == pytest.approx(whole[8:])
    # Made longer, the run is where a run of that length would be, from its second step on: the
    # first has the rate that the optimizer was saved with.
    longer = fit(epochs=6, ckpt_path=checkpoint)
    assert longer[1:] == pytest.approx(fit(epochs=6)[9:])


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


def test_a_run_that_goes_on_for_longer_has_the_rates_of_the_longer_run(tmp_path):
    def module():
        return Rates(tiny_body, lr_scheduler=lambda o: MultiStep(o, milestones=[0.5]), **PLAIN)

    short, longer = quiet_trainer(max_epochs=4), quiet_trainer(max_epochs=10)
    short.fit(module(), loader(8))
    short.save_checkpoint(tmp_path / "a.ckpt")
    resumed = module()
    longer.fit(resumed, loader(8), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert resumed.rates == pytest.approx([0.05] + [0.005] * 5)


def test_the_logged_rate_is_the_one_that_the_epoch_trained_with():
    logged = []

    class Logged(AT):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            logged.append(self.trainer.callback_metrics["train/learning_rate"].item())

    schedule = {"lr_scheduler": lambda o: MultiStep(o, milestones=[0.5])}
    quiet_trainer(max_epochs=4).fit(Logged(tiny_body, **PLAIN, **schedule), loader(8))
    assert logged == pytest.approx([0.05, 0.05, 0.005, 0.005])


def test_shares_of_endless_training_are_refused():
    with pytest.raises(ValueError, match="`trainer.max_epochs` to be >= 1"):
        quiet_trainer(max_epochs=-1).fit(AT(tiny_body, **PLAIN), loader(8))


@pytest.mark.parametrize(
    ("momentum", "kwargs", "message"),
    [
        (0.9, {"cycles": 0}, "`cycles` to be >= 1 but got 0"),
        (0.9, {"max_momentum": 7.0}, r"`max_momentum` to be in \[0, 1\] but got 7.0"),
        (0.9, {"base_momentum": -3.0}, r"`base_momentum` to be in \[0, 0.9\] but got -3.0"),
        (0.0, {}, "with momentum for `cycle_momentum` but got SGD with momentum 0"),
    ],
)
def test_bad_arguments_are_named(momentum, kwargs, message):
    with pytest.raises(ValueError, match=message):
        Cyclic(SGD([torch.zeros(1)], lr=1.0, momentum=momentum), **kwargs)


def test_steps_may_end_training_in_place_of_epochs():
    module = Rates(tiny_body, lr_scheduler=lambda o: Cyclic(o, cycles=1), **PLAIN)
    quiet_trainer(max_epochs=-1, max_steps=8).fit(module, loader(32))
    assert module.rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.15, 0.1, 0.05])
