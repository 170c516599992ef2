"""What one measure has computed serves the next, and never for other weights, images or attacks."""

import pytest
import torch
from lightning.pytorch import Callback
from networks_for_tests import PassCounter, tiny_body
from torch.utils.data import TensorDataset
from trainers import PLAIN, ToyData, dataset, quiet_trainer

from robust_flatness.callbacks import (
    EpochMeasure,
    FinalEvaluation,
    Flatness,
    RobustEvaluation,
    WorstCaseFlatness,
)
from robust_flatness.lightning_modules import AT
from robust_flatness.measures import AttackChecks

ATTACK = {"eps": 0.1, "steps": 2, "batch_size": 5}
COUNT, DIRECTIONS = 12, 3
# An attack costs a pass more than it has steps, and a robust loss begins with the clean images.
PASSES = COUNT * 3
DOUBLED = TensorDataset(2 * dataset(COUNT).tensors[0], dataset(COUNT).tensors[1])
ROBUST_LOSS, FLATNESS = PASSES + COUNT, PASSES * (1 + DIRECTIONS)


def evaluation(**kwargs):
    return RobustEvaluation(**{"num_examples": COUNT, **ATTACK, **kwargs})


def flatness(**kwargs):
    settings = {"num_examples": COUNT, "num_perturbations": DIRECTIONS, **ATTACK}
    return Flatness(**{**settings, **kwargs})


class Passes(Callback):
    """Counts the images of forwards between two places in the list of callbacks."""

    def __init__(self):
        self.epochs, self.end = [], End(self)

    def on_train_epoch_end(self, trainer, pl_module):
        self.counter = PassCounter(pl_module.network)


class End(Callback):
    def __init__(self, begin):
        self.begin = begin

    def on_train_epoch_end(self, trainer, pl_module):
        self.begin.epochs.append(self.begin.counter.forwards)
        for handle in self.begin.counter.handles:
            handle.remove()


def fit(*callbacks, epochs=1):
    """Forwards of each epoch's measures, and what was logged last."""
    torch.manual_seed(0)
    passes = Passes()
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[passes, *callbacks, passes.end])
    trainer.fit(AT(tiny_body, **PLAIN), ToyData())
    return passes.epochs, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("flatness_first", [False, True])
def test_the_losses_at_the_weights_are_computed_once_in_each_epoch(restarts, flatness_first):
    callbacks = [evaluation(restarts=restarts), flatness()]
    apart = [fit(callback, epochs=2) for callback in callbacks]
    assert [passes for passes, _ in apart] == [
        [ROBUST_LOSS + PASSES * (restarts - 1)] * 2,
        [FLATNESS] * 2,
    ]
    passes, logged = fit(*callbacks[:: -1 if flatness_first else 1], epochs=2)
    assert passes == [ROBUST_LOSS + PASSES * (restarts - 1) + FLATNESS - PASSES] * 2
    assert logged == apart[0][1] | apart[1][1]


class Between(Callback):
    """Changes a network between two measures."""

    def __init__(self, change):
        self.change = change

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, pl_module):
        self.change(pl_module)


def scale_weight(module):
    module.network[0].weight.data[0] *= 1.5


def move_statistic(module):
    module.network[1].running_mean += 0.1


def soften(module):
    module.network[1].eps = 0.5


def add_hook(module):
    module.register_forward_hook(lambda _, inputs, logits: 2 * logits)


@pytest.mark.parametrize("change", [scale_weight, move_statistic, soften, add_hook])
def test_a_network_that_has_changed_is_measured_anew(change):
    alone = fit(Between(change), flatness())
    passes, logged = fit(evaluation(), Between(change), flatness())
    assert passes == [ROBUST_LOSS + FLATNESS]
    assert {name: logged[name] for name in alone[1]} == alone[1]


@pytest.mark.parametrize(
    "other",
    [
        {"eps": 0.05},
        {"steps": 1},
        {"seed": 1},
        {"norm": "l2"},
        {"batch_size": 4},
        {"dataset": dataset(COUNT, seed=7)},
        # The same pixels, but the module takes what is twice as large.
        {"dataset": DOUBLED, "normalization": ([0.0] * 3, [0.5] * 3)},
    ],
)
def test_another_attack_and_other_images_are_measured_anew(other):
    passes, logged = fit(evaluation(**other), flatness(dataset=dataset(COUNT)))
    steps = other.get("steps", ATTACK["steps"])
    assert passes == [COUNT * (2 + steps) + FLATNESS]
    alone = fit(flatness(dataset=dataset(COUNT)))[1]
    assert {name: logged[name] for name in alone} == alone


def test_equal_images_of_another_dataset_are_the_same_images():
    same = [evaluation(dataset=dataset(COUNT)), flatness(dataset=dataset(COUNT))]
    assert fit(*same)[0] == [ROBUST_LOSS + FLATNESS - PASSES]


def test_clean_losses_and_those_of_other_measures_are_shared_too():
    clean = fit(evaluation(), flatness(loss="clean"))[0]
    assert clean == [ROBUST_LOSS + COUNT * DIRECTIONS]
    worst = WorstCaseFlatness(num_examples=COUNT, restarts=1, **ATTACK)
    assert fit(evaluation(), worst)[0] == [ROBUST_LOSS + PASSES]
    checks = EpochMeasure(
        num_examples=COUNT, measure=AttackChecks(more_steps=0, square_queries=0, **ATTACK)
    )
    alone, shared = fit(checks)[0], fit(evaluation(), checks)[0]
    assert shared == [alone[0] + ROBUST_LOSS - COUNT - PASSES]


def test_the_protocol_of_the_end_shares_the_reference():
    final = FinalEvaluation(
        num_examples=COUNT, restarts=2, num_perturbations=DIRECTIONS, splits=["test"], **ATTACK
    )
    module = AT(tiny_body, **PLAIN)
    counter = PassCounter(module.network)
    results = []
    for _ in range(2):
        quiet_trainer(callbacks=[final]).test(module, datamodule=ToyData(), verbose=False)
        results.append(final.final_results["final"] | {})
        scale_weight(module)
    # Before measures 8 images are looked at. The second restart is of the robust loss alone.
    assert counter.forwards == 2 * (8 + ROBUST_LOSS + PASSES + FLATNESS - PASSES)
    assert results[0]["flatness/average/test"] != results[1]["flatness/average/test"]
