"""Measures in input space: cost, invariances, and checks that flag masked gradients."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from torch import nn

from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.measures import (
    AttackChecks,
    BoundaryThickness,
    Examples,
    LocalLipschitz,
    Margins,
)
from robust_flatness.measures.base import Processes
from robust_flatness.run_folder.attack_checks import attack_checks, error_curve

ATTACK = {"eps": 0.1, "steps": 2, "batch_size": 5}
CASES = [
    (Margins, {**ATTACK, "restarts": 2}),
    (Margins, {**ATTACK, "norm": "l2"}),
    (Margins, {**ATTACK, "steps": 0}),
    (LocalLipschitz, {**ATTACK, "restarts": 2}),
    (LocalLipschitz, {**ATTACK, "original": True, "search_steps": 3}),
    (LocalLipschitz, {**ATTACK, "norm": "l2"}),
    (BoundaryThickness, {"batch_size": 5, "num_points": 16}),
    (BoundaryThickness, {"batch_size": 5, "num_points": 4, "steps": 2, "keep": "best"}),
    (AttackChecks, {**ATTACK, "more_steps": 4, "restarts": 2, "square_queries": 0}),
    (AttackChecks, {**ATTACK, "more_steps": 3, "norm": "l2", "step_size": 0.2}),
]
IDS = [f"{kind.__name__}-{i}" for i, (kind, _) in enumerate(CASES)]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=IDS)
def test_the_network_is_left_alone_and_passes_are_those_announced(kind, settings):
    network, measure = tiny_network(dropout=True), kind(**settings)
    images, labels = images_and_labels(13, seed=4)
    before, state, passes, attacks = snapshot(network), torch.get_rng_state(), [0, 0], []

    def count(module, inputs, logits):
        passes[0] += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: passes.__setitem__(1, passes[1] + len(gradient)))

    handle = network.register_forward_hook(count)
    result = measure(network, images, labels)
    handle.remove()
    assert same(before, snapshot(network))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in network.modules())
    forwards, backwards = measure.passes()
    assert passes[1] == 13 * backwards
    # Square attacks only what is left.
    assert passes[0] <= 13 * forwards
    if not getattr(measure, "square_queries", 0):
        assert passes[0] == 13 * forwards
        examples = Examples(images[:5], labels[:5], range(5), lambda: attacks.append(1))
        with evaluation_context(network):
            measure.measure(network, examples)
        assert len(attacks) == measure.progress[1]
    for split in ("test", "train"):
        metrics = measure.metrics(result, split)
        assert set(metrics) <= set(measure.metric_names(split))
        assert all(map(math.isfinite, metrics.values()))
        arrays = measure.arrays(result, split)
        assert all(values.shape == (13,) for values in arrays.values())
        for name in arrays.keys() & metrics.keys():
            assert arrays[name].double().mean().item() == pytest.approx(metrics[name])


@pytest.mark.parametrize(("kind", "settings"), CASES[:-1], ids=IDS[:-1])
def test_batches_and_processes_do_not_change_the_value(kind, settings):
    network, measure = tiny_network().double().eval(), kind(**settings)
    images, labels = images_and_labels(13, seed=4)
    images = images.double()
    whole = measure(network, images, labels)
    single = dataclasses.replace(measure, batch_size=1)(network, images, labels)
    for name, value in measure.metrics(whole, "test").items():
        assert measure.metrics(single, "test")[name] == pytest.approx(value, abs=1e-9), name
    for rank in range(4):  # the last one has no images
        mine = Processes(rank, 4).indices(13, 5)
        with evaluation_context(network):
            share = measure.measure(network, Examples(images[mine], labels[mine], mine))
        for field in dataclasses.fields(share):
            part, total = getattr(share, field.name), getattr(whole, field.name)
            if isinstance(part, torch.Tensor):
                assert torch.equal(part.to(total), total[..., mine]), field.name


def rescaled(network, factors):
    """Scales the filters of each convolution, which the BatchNorm behind it undoes (eps is 0)."""
    for convolution, norm in ((network[0], network[1]), (network[3], network[4])):
        own = factors[: len(convolution.weight)]
        with torch.no_grad():
            convolution.weight.mul_(own[:, None, None, None])
            if convolution.bias is not None:
                convolution.bias.mul_(own)
            norm.running_mean.mul_(own)
            norm.running_var.mul_(own**2)
    return network


@pytest.mark.parametrize("factors", [[3.0] * 6, [0.2, 5.0, 1.0, 3.0, 0.5, 2.0]])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Margins, ATTACK), (LocalLipschitz, ATTACK), (BoundaryThickness, {"num_points": 32})],
)
def test_values_do_not_change_with_the_scale_of_layers_or_filters(kind, settings, factors):
    images, labels = images_and_labels(9, seed=4)
    values = []
    for scale in (torch.ones(6), torch.tensor(factors)):
        network = tiny_network().double()
        network[1].eps = network[4].eps = 0.0
        network = rescaled(network, scale.double())
        measure = kind(**settings)
        values.append(measure.metrics(measure(network, images.double(), labels), "test"))
    assert values[0] == pytest.approx(values[1], rel=1e-9)


class Scaled(nn.Module):
    """Logits so large that the softmax, and with it each gradient, is exactly 0 or 1."""

    def forward(self, logits):
        return 1e6 * logits


class Quantized(nn.Module):
    """Pixels of 5 levels, whose gradient is 0."""

    def forward(self, images):
        return (4 * images).round() / 4


def checked(network, eps=0.02, **settings):
    images, _ = images_and_labels(60, seed=4)
    with torch.no_grad():
        labels = network.eval()(images).argmax(1)
    measure = AttackChecks(eps=eps, **settings)
    result = measure(network, images, labels)
    arrays = {name: values.numpy() for name, values in measure.arrays(result, "test").items()}
    return {check["name"]: check["passed"] for check in attack_checks(arrays)}, arrays


@pytest.mark.parametrize("masked", ["scaled", "quantized"])
def test_masked_gradients_are_flagged(masked):
    network = tiny_network()
    parts = {"scaled": (network, Scaled()), "quantized": (Quantized(), network)}[masked]
    passed, _ = checked(nn.Sequential(*parts), eps=0.1)
    assert passed["largest radius"] is False
    assert passed["Square"] is False


def test_a_healthy_network_passes():
    passed, arrays = checked(tiny_network())
    measured = ("largest radius", "larger radius", "more steps", "Square")
    assert passed == {**dict.fromkeys(measured, True), "AutoAttack": None}
    curve = error_curve(arrays)
    assert curve["eps"][:2] == [0.01, 0.02]
    assert curve["eps"][-1] == 1
    assert curve["robust_error"] == sorted(curve["robust_error"])
    assert 0 < curve["robust_error"][1] < 1


def test_an_attack_without_radius():
    passed, _ = checked(tiny_network(), eps=0.0)
    assert passed["Square"] is True


def test_small_images_in_l2_have_no_square():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 3))
    images = torch.rand(3, 3, 4, 4)
    result = AttackChecks(eps=0.1, norm="l2")(network, images, torch.arange(3))
    assert result.correct_square is None
    assert result.radii[-1] == pytest.approx(np.sqrt(48))
    assert "attack/square_error/test" not in AttackChecks().metrics(result, "test")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LocalLipschitz, {"search_steps": 0}, "`search_steps` to be >= 1 but got 0"),
        (BoundaryThickness, {"alpha": -2.0}, r"`alpha` to be in \[-1, 1\] but got -2.0"),
        (BoundaryThickness, {"alpha": 0.8}, r"`beta` to be in \[0.8, 1\] but got 0.75"),
        (BoundaryThickness, {"num_points": 0}, "`num_points` to be >= 1 but got 0"),
        (BoundaryThickness, {"keep": "first"}, "`keep` to be one of best, last but got first"),
        (AttackChecks, {"more_steps": -1}, "`more_steps` to be >= 0 but got -1"),
        (AttackChecks, {"square_queries": -1}, "`square_queries` to be >= 0 but got -1"),
    ],
)
def test_arguments_out_of_range_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
