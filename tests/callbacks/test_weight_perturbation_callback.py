"""Where the weights are while `AdversarialWeightPerturbation` trains, and what it refuses."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning_projects import Project, tiny
from networks_for_tests import same, snapshot
from torch import nn
from torch.nn.functional import cross_entropy
from trainers import loader, quiet_trainer

from robust_flatness.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    Flatness,
    MeasuredCheckpoint,
    RobustEarlyStopping,
    RobustEvaluation,
    WeightAveraging,
)

XI = 0.2


class Watched(Project):
    """Compares its weights in a step with those at the start of the batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.start, self.moved, self.updated = None, [], []

    @property
    def is_moved(self):
        return not torch.equal(self.start, self.network[0].weight)

    def on_train_batch_start(self, batch, batch_idx):
        self.start = self.network[0].weight.detach().clone()

    def training_step(self, batch, batch_idx):
        self.moved.append(self.is_moved)
        loss = super().training_step(batch, batch_idx)
        loss.register_hook(lambda _: self.moved.append(self.is_moved))
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        # What the update itself starts from, after the closure.
        step = optimizer.step

        def watched(closure=None):
            loss = closure() if closure else None
            self.updated.append(self.is_moved)
            return step(lambda: loss)

        optimizer.step = watched
        return optimizer


class Manual(Watched):
    """Manual optimization, with Lightning's backward and optimizer or with PyTorch's."""

    automatic_optimization = False
    lightning = True

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.lightning)
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss) if self.lightning else loss.backward()
        optimizer.step()


class RawManual(Manual):
    lightning = False


def fit(module, callbacks=(), batches=None, **kwargs):
    awp = AdversarialWeightPerturbation(xi=XI)
    trainer = quiet_trainer(callbacks=[*callbacks, awp], **kwargs)
    trainer.fit(module, batches or loader(16))
    return trainer


@pytest.mark.parametrize("project", [Watched, Manual])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_forward_and_backward_are_at_perturbed_weights_and_the_update_is_not(project, precision):
    module = project()
    trainer = fit(module, precision=precision)
    assert module.moved == [True] * 4
    assert module.updated == [False] * 2
    for end in ("min", "max"):
        assert trainer.callback_metrics[f"awp/relative_norm_{end}"] == pytest.approx(XI, rel=1e-3)


def test_manual_optimization_with_pytorchs_backward_and_optimizer():
    ends = []
    for project in (Manual, RawManual):
        module = project()
        # The wrapper of `step` would come before PyTorch's hooks.
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.1)
        torch.manual_seed(0)
        fit(module)
        assert module.moved == [True] * 4
        ends.append(snapshot(module))
    assert same(*ends)


def test_manual_and_automatic_optimization_train_alike():
    ends = []
    for project in (Watched, Manual):
        module = project()
        fit(module)
        ends.append(snapshot(module))
    assert same(*ends)


def test_a_random_direction_leaves_frozen_weights():
    class Frozen(Watched):
        def training_step(self, batch, batch_idx):
            self.frozen = torch.equal(self.network[3].weight, tiny()[3].weight)
            return super().training_step(batch, batch_idx)

    module = Frozen()
    module.network[3].weight.requires_grad_(False)
    awp = AdversarialWeightPerturbation(xi=XI, direction="random")
    quiet_trainer(callbacks=[awp]).fit(module, loader(8))
    assert module.moved == [True, True]
    assert module.frozen


def test_statistics_of_batchnorm_come_from_perturbed_weights():
    means = []
    for xi in (0.0, XI):
        module = Project(lr=0.0)
        awp = AdversarialWeightPerturbation(xi=xi)
        quiet_trainer(callbacks=[awp]).fit(module, loader(8))
        means.append(module.network[1].running_mean.clone())
        # At rate zero the weights are what they were, bit for bit.
        assert torch.equal(module.network[0].weight, Project().network[0].weight)
    assert not torch.allclose(*means)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_loss_updates_nothing_at_perturbed_weights(accumulate):
    class Skips(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    module, ends = Skips(), Ends()
    fit(module, [ends], accumulate_grad_batches=accumulate)
    assert module.moved == [True] * 3
    assert not any(module.updated)
    # Without gradients nothing was updated.
    assert not ends.moved[0]


class Ends(Callback):
    """Looks at the weights when a batch ends, as weight averaging does."""

    def __init__(self):
        self.moved = []

    def on_train_batch_end(self, trainer, module, *args):
        self.moved.append(module.is_moved)


class Fails(Callback):
    """Fails between the loss and its backward, and looks at the weights when training fails."""

    def __init__(self, between=False):
        self.between, self.moved = between, None

    def on_before_backward(self, trainer, module, loss):
        if self.between:
            raise RuntimeError("half-way")

    def on_exception(self, trainer, module, exception):
        self.moved = module.is_moved


@pytest.mark.parametrize("where", ["step", "between", "backward"])
def test_weights_come_back_after_an_exception(where):
    class Failing(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if where == "step":
                raise RuntimeError("half-way")
            if where == "backward":
                loss.register_hook(self.fail)
            return loss

        def fail(self, gradient):
            raise RuntimeError("half-way")

    module, fails = Failing(), Fails(where == "between")
    awp = AdversarialWeightPerturbation(xi=XI)
    with pytest.raises(RuntimeError, match="half-way"):
        quiet_trainer(callbacks=[fails, awp]).fit(module, loader(16))
    assert module.moved[0]
    assert not fails.moved
    assert not module.is_moved
    assert not {"training_step", "backward"} & set(vars(module))


def test_scaled_losses_and_skipped_updates_leave_the_weights_alone():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    module = Watched()
    fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert module.moved == [True] * 4
    # A gradient that overflows skips the update.
    module, scaler = Watched(), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = module.network[0].weight.detach().clone()
    fit(module, batches=loader(8), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert module.moved == [True, True]
    assert torch.equal(before, module.network[0].weight)


def test_ordinary_training_until_the_warm_up_ends():
    module = Watched()
    awp = AdversarialWeightPerturbation(xi=XI, warmup=1)
    quiet_trainer(callbacks=[awp], max_epochs=2).fit(module, loader(8))
    assert module.moved == [False] * 2 + [True] * 2


@pytest.mark.parametrize("first", [True, False])
def test_hooks_between_forward_and_backward_see_the_weights_themselves(first):
    class Averages(Callback):
        """Looks when averages of weights are updated in many projects."""

        moved = []

        def on_before_zero_grad(self, trainer, module, optimizer):
            self.moved.append(module.is_moved)

        def on_before_backward(self, trainer, module, loss):
            self.moved.append(module.is_moved)

    module, averages = Watched(), Averages()
    awp = AdversarialWeightPerturbation(xi=XI)
    added = [averages, awp] if first else [awp, averages]
    quiet_trainer(callbacks=added).fit(module, loader(8))
    assert module.moved == [True, True]
    assert averages.moved == [False, False]


def test_an_epoch_for_batchnorm_statistics_alone_is_at_the_weights_themselves():
    module = Watched()
    # Schedules wrap the optimizer's own `step`.
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    fit(module, [swa], max_epochs=2)
    # The last epoch has no backward.
    assert module.moved == [True] * 8 + [False] * 2


class Twice(torch.optim.SGD):
    """Evaluates its closure twice, as SAM does."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


class TwoBackwards(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))


class TwoUpdates(RawManual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)

    configure_optimizers = Project.configure_optimizers


def test_lbfgs_is_refused_before_the_first_step():
    module = Watched(optimizer=torch.optim.LBFGS)
    message = "Expected an optimizer that evaluates its closure once in a step .* but got LBFGS"
    with pytest.raises(ValueError, match=message):
        fit(module)
    assert module.moved == []


def normalization_only():
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(192))


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: Project(optimizer=Twice), {}, "evaluates its closure once .* but got Twice"),
        (TwoBackwards, {}, "Expected one backward for each batch .* but got a second one"),
        (TwoUpdates, {}, "Expected one optimizer step for each batch .* but got a second one"),
        (
            lambda: Project(optimizer=torch.optim.AdamW),
            {"order": "awp"},
            "coupled weight decay for `order` awp but got AdamW",
        ),
        (Manual, {"order": "awp"}, "automatic optimization for `order` awp"),
        (lambda: Project(normalization_only), {}, "convolution or linear layers to perturb"),
    ],
)
def test_what_cannot_be_restored_in_time_is_refused(build, arguments, message):
    module = build()
    with pytest.raises(ValueError, match=message):
        awp = AdversarialWeightPerturbation(**arguments)
        quiet_trainer(callbacks=[awp]).fit(module, loader(8))
    assert not {"training_step", "backward"} & set(vars(module))


def test_a_resumed_run_goes_on_exactly(tmp_path):
    def run(epochs, checkpoint=None):
        module = Project()
        # The checkpoint's seed counts.
        torch.manual_seed(0 if checkpoint is None else 9)
        callbacks = [
            AdversarialTraining(steps=2, warmup=2),
            AdversarialWeightPerturbation(direction="random", xi=XI),
        ]
        trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, loader(24), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return snapshot(module)

    whole = run(3)
    run(1)
    assert same(run(3, tmp_path / "1.ckpt"), whole)


def measuring(tmp_path):
    light = {"split": "val", "steps": 1, "num_examples": 8, "eps": 0.1}
    return [
        RobustEarlyStopping(**light),
        Flatness(**light, num_perturbations=1),
        RobustEvaluation(split="train", **{k: light[k] for k in ("steps", "num_examples", "eps")}),
        MeasuredCheckpoint(tmp_path, monitor="val/robust_error", save_top_k=-1, filename="{epoch}"),
    ]


@pytest.mark.parametrize("first", [True, False])
def test_measures_averages_and_checkpoints_see_clean_images_and_restored_weights(tmp_path, first):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        module = Project()
        training = [
            WeightAveraging(0.5, reference_steps=None),
            AdversarialTraining(eps=0.1, steps=2),
            AdversarialWeightPerturbation(xi=XI),
        ]
        watching = measuring(tmp_path) if watched else []
        added = [*training, *watching] if first else [*watching, *training]
        trainer = quiet_trainer(max_epochs=3, callbacks=added, enable_checkpointing=watched)
        trainer.fit(module, loader(16), loader(8))
        ends.append(snapshot(module))
    assert same(*ends)
    # What was measured is what a plain network with the averaged weights gives.
    network = tiny()
    network.load_state_dict({k.removeprefix("network."): v for k, v in ends[-1].items()})
    again = RobustEvaluation(split="val", steps=1, num_examples=8, eps=0.1).measure
    images, labels = loader(8).dataset.tensors
    result = again.metrics(again(network, images, labels), "val")
    for name in ("val/error", "val/robust_error"):
        assert trainer.callback_metrics[name] == pytest.approx(result[name])
