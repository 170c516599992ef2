"""Promise 1: watching changes nothing. Promise 3: it works in real inference mode too."""

import math
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from networks_for_tests import same, snapshot, tiny_network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from trainers import dataset, quiet_trainer

from robust_flatness.callbacks import (
    AutoAttack,
    EpochMeasure,
    FinalEvaluation,
    Flatness,
    RobustEarlyStopping,
    RobustEvaluation,
)
from robust_flatness.callbacks.measuring import evaluation_context, swapped_weights
from robust_flatness.measures import (
    AdaptiveSharpness,
    AttackChecks,
    BoundaryThickness,
    FirstOrderFlatness,
    GradientNorm,
    HessianTrace,
    LocalLipschitz,
    Margins,
)

LIGHT = {"num_examples": 12, "steps": 2, "eps": 0.1, "batch_size": 5}


class Foreign(LightningModule):
    """A stranger's module: BatchNorm, Dropout, a shuffling loader, global random state."""

    def __init__(self):
        super().__init__()
        self.net = tiny_network(dropout=True)
        self.net[4].eval()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x + 0.05 * torch.rand_like(x)), y)

    def test_step(self, batch, batch_idx):
        pass

    def train_dataloader(self):
        return DataLoader(dataset(32), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(dataset(12, seed=2), batch_size=4)

    def test_dataloader(self):
        return DataLoader(dataset(12, seed=3), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def measuring_callbacks() -> list[Callback]:
    few = {"eps": 0.1, "steps": 1, "batch_size": 5}
    derivatives = [
        AdaptiveSharpness(num_perturbations=2, parameters="all", **few),
        AdaptiveSharpness(case="worst", weight_steps=2, **few),
        HessianTrace(num_probes=1, **few),
        GradientNorm(**few),
        FirstOrderFlatness(weight_steps=1, **few),
    ]
    return [
        RobustEvaluation(**LIGHT),
        RobustEvaluation(split="train", **LIGHT),
        Flatness(num_perturbations=2, **LIGHT),
        Flatness(split="train", num_perturbations=2, **LIGHT),
        RobustEarlyStopping(dataset=dataset(12, seed=2), **LIGHT),
        FinalEvaluation(num_examples=6, steps=2, restarts=2, num_perturbations=2, eps=0.1),
        *(
            EpochMeasure(measure=measure, num_examples=6)
            for measure in (
                Margins(steps=2),
                LocalLipschitz(steps=2, search_steps=2),
                BoundaryThickness(steps=2, num_points=4),
                AttackChecks(steps=2, more_steps=3, square_queries=2),
            )
        ),
        AutoAttack(num_examples=6, eps=0.1, version="custom", attacks=["apgd-ce"]),
        *(EpochMeasure(measure=measure, num_examples=6) for measure in derivatives),
    ]


def train(callbacks: list[Callback]) -> Foreign:
    torch.manual_seed(0)
    module = Foreign()
    torch.manual_seed(0)
    quiet_trainer(max_epochs=3, callbacks=callbacks).fit(module)
    return module


def test_training_is_bit_identical_with_and_without_all_callbacks():
    alone, watched = train([]), train(measuring_callbacks())
    assert same(snapshot(alone), snapshot(watched))
    # The measured network is another one than the initial: something was trained.
    assert not same(snapshot(alone), snapshot(Foreign()))


class Restless(Foreign):
    """Has state that forwards move in eval mode, and draws from all global generators."""

    def __init__(self):
        super().__init__()
        self.register_buffer("top", torch.zeros(()))
        self.register_buffer("count", torch.zeros(1), persistent=False)
        self.calls, self.mean = 0, None

    def forward(self, x):
        h = self.net(x) * (
            1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(())
        )
        self.top.copy_(torch.maximum(self.top, h.detach().abs().max()))
        self.count = self.count + 1
        self.calls += 1
        self.mean = h.detach().mean() if self.mean is None else 0.9 * self.mean
        return h / (1 + 0.01 * (self.top + self.count + self.calls + self.mean))


def test_training_is_bit_identical_whatever_a_forward_moves():
    ends = []
    for callbacks in ([], measuring_callbacks()):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        module = Restless()
        quiet_trainer(max_epochs=2, callbacks=callbacks).fit(module)
        draws = random.random(), np.random.rand(), torch.rand(()).item()
        ends.append((snapshot(module), module.count.item(), module.calls, module.mean, draws))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_measuring_leaves_no_trace():
    module, trainer = Foreign(), quiet_trainer()
    module.train()
    module.net[4].eval()
    module.net[0].weight.requires_grad_(False)
    module.net[3].weight.grad = torch.ones_like(module.net[3].weight)
    before, state = snapshot(module), torch.get_rng_state()
    modes = [m.training for m in module.modules()]
    for callback in (
        Flatness(dataset=dataset(), num_perturbations=2, **LIGHT),
        RobustEvaluation(dataset=dataset(), **LIGHT),
    ):
        callback.compute(trainer, module)
    assert same(before, snapshot(module))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in module.modules()]
    assert not module.net[0].weight.requires_grad
    assert torch.equal(module.net[3].weight.grad, torch.ones_like(module.net[3].weight))
    assert module.net[8].weight.grad is None


def test_it_undoes_modes_and_random_state_after_an_exception():
    module, trainer = Foreign(), quiet_trainer()
    modes = [m.training for m in module.modules()]
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), evaluation_context(trainer, module):
        assert not any(m.training for m in module.modules())
        torch.rand(3)
        raise RuntimeError
    assert modes == [m.training for m in module.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_swapped_weights_come_back():
    module, other = Foreign(), Foreign()
    with torch.no_grad():
        other.net[0].weight.add_(1)
    before = snapshot(module)
    with pytest.raises(RuntimeError), swapped_weights(module, snapshot(other)):
        assert same(snapshot(module), snapshot(other))
        raise RuntimeError
    assert same(before, snapshot(module))


class InferenceMode(Callback):
    seen = False

    def on_test_epoch_end(self, trainer, module):
        self.seen = torch.is_inference_mode_enabled()


def test_all_callbacks_work_in_real_inference_mode():
    module, watch = Foreign(), InferenceMode()
    before = snapshot(module)
    # One process: under gloo Lightning only turns gradients off, which would hide a mistake.
    trainer = quiet_trainer(
        callbacks=[watch, *measuring_callbacks()[:1], *measuring_callbacks()[2:3]]
    )
    (logged,) = trainer.test(module, verbose=False)
    assert watch.seen
    assert 0 < logged["test/robust_loss"] < 20
    assert math.isfinite(logged["flatness/average/test"])
    assert same(before, snapshot(module))
    trainer = quiet_trainer(
        callbacks=[
            FinalEvaluation(splits=["test"], num_examples=6, steps=2, restarts=2, eps=0.1),
            AutoAttack(num_examples=6, eps=0.1, version="custom", attacks=["apgd-ce"]),
        ]
    )
    (logged,) = trainer.test(module, verbose=False)
    assert {"test/robust_error", "flatness/average/test_sem", "test/autoattack_error"} <= set(
        logged
    )
    assert same(before, snapshot(module))


def test_values_agree_between_fit_and_test():
    module = Foreign()
    fitted = quiet_trainer(callbacks=[Flatness(num_perturbations=2, **LIGHT)])
    fitted.fit(module)
    (tested,) = quiet_trainer(callbacks=[Flatness(num_perturbations=2, **LIGHT)]).test(
        module, verbose=False
    )
    assert tested["flatness/average/test"] == fitted.callback_metrics["flatness/average/test"]


class Augmented(torch.utils.data.Dataset):
    """A stranger's dataset, whose transforms draw from all the global generators."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        shift = random.random() + np.random.rand() + torch.rand(1).item()
        image, label = dataset(16)[index]
        return (image + 0.1 * shift).clamp(0, 1), label


def test_reading_images_takes_no_numbers_from_training():
    module, measure = Foreign(), RobustEvaluation(dataset=Augmented(), **LIGHT)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = measure.compute(quiet_trainer(), module)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.rand(3), random.random()
    again = RobustEvaluation(dataset=Augmented(), **LIGHT).compute(quiet_trainer(), Foreign())
    assert first == again


def test_a_second_fit_begins_anew():
    first, second = dataset(12, seed=2), dataset(12, seed=3)
    flat, stopping = Flatness(num_perturbations=1, **LIGHT), RobustEarlyStopping(**LIGHT)
    for data in (first, second):
        flat.dataset = stopping.dataset = data
        module = Foreign()
        trainer = quiet_trainer(callbacks=[flat, stopping])
        trainer.fit(module)
        assert torch.equal(flat.examples(trainer, module).images, data.tensors[0])
        assert set(stopping.trajectory) == {0}
        kept = stopping.best_weights["net.0.weight"]
        assert torch.equal(kept, module.net[0].weight)
