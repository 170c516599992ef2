"""Measures leave a network and the global random states as they were, whatever its forward does."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from torch import nn

from robust_flatness.functional import (
    average_case_flatness,
    evaluate_robustness,
    hessian_extreme_eigenvalues,
    loss_landscape,
    loss_surface,
    weight_directions,
    worst_case_flatness,
)
from robust_flatness.functional.evaluation import evaluation_context

SHORT = {"eps": 0.1, "steps": 1}


def directions(*of, **kwargs):
    settings = {"kind": "adversarial", "num_directions": 1, "ascent_steps": 2, **kwargs}
    return torch.cat([nu.flatten() for nu in next(weight_directions(*of, **settings)).values()])


MEASURES = {
    "robustness": lambda *of, **kwargs: evaluate_robustness(*of, **SHORT, **kwargs).losses,
    "average": lambda *of, **kwargs: (
        average_case_flatness(*of, num_perturbations=2, **SHORT, **kwargs).increases
    ),
    "per batch": lambda *of, **kwargs: (
        average_case_flatness(*of, per_batch=True, batch_size=2, **SHORT, **kwargs).increases
    ),
    "worst": lambda *of, **kwargs: worst_case_flatness(*of, **SHORT, **kwargs).increases,
    "clean worst": lambda *of, **kwargs: (
        worst_case_flatness(*of, loss="clean", **SHORT, **kwargs).increases
    ),
    "landscape": lambda *of, **kwargs: (
        loss_landscape(*of, num_directions=2, num_steps=2, **SHORT, **kwargs).losses
    ),
    "surface": lambda *of, **kwargs: loss_surface(*of, num_steps=2, **SHORT, **kwargs).losses,
    "adversarial": directions,
    "hessian": lambda *of: torch.tensor(hessian_extreme_eigenvalues(*of).max_eigenvalue),
}
ATTACKS = [name for name in MEASURES if name != "hessian"]


class Restless(nn.Module):
    """Moves, replaces and registers state in eval mode, and draws from all global generators."""

    def __init__(self):
        super().__init__()
        self.net = tiny_network()
        self.net[0].weight.requires_grad_(False)
        self.net[3].weight.grad = torch.ones_like(self.net[3].weight)
        self.register_buffer("moved", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("transient", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)
        self.calls, self.scale, self.held, self.late = 0, 1.0, torch.zeros(2), None

    def forward(self, x):
        h = self.net(x) * (1 + 0.01 * random.random() + 0.01 * np.random.rand())
        h = h + 0.01 * torch.rand(())
        self.moved.add_(1)
        self.transient.fill_(self.calls)
        self.replaced = self.replaced + 1
        self.absent = torch.ones(1)
        self.held += 1
        self.calls += 1
        self.scale *= 1.5
        self.late = torch.zeros(1)
        self.news = 3
        if not hasattr(self, "lazy"):
            self.register_buffer("lazy", torch.ones(1))
            self.head = nn.Linear(2, 2)
        self.net[0].weight.requires_grad_(True)
        return h


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_leaks(measure):
    network = Restless().train()
    network.net[4].eval()
    images, labels = images_and_labels(3)
    before, states = snapshot(network), states_now()
    buffers, content = dict(network.named_buffers()), dict(vars(network))
    grad, held, names = network.net[3].weight.grad, network.held.clone(), list(vars(network))
    MEASURES[measure](network, images, labels)
    assert same(before, snapshot(network))
    assert {name: id(b) for name, b in network.named_buffers()} == {
        name: id(b) for name, b in buffers.items()
    }
    assert network.transient.eq(0).all()
    assert network.absent is None
    assert torch.equal(network.held, held)
    assert list(vars(network)) == names
    assert all(vars(network)[name] is content[name] for name in ("calls", "scale", "held", "late"))
    assert not hasattr(network, "head")
    assert network.net[3].weight.grad is grad
    assert not network.net[0].weight.requires_grad
    assert [m.training for m in network.net] == [True] * 4 + [False] + [True] * 4
    for now, then in zip(states_now(), states):
        assert np.array_equal(now, then)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("measure", ATTACKS)
@pytest.mark.parametrize("moved", [False, True])
def test_nothing_leaks_after_an_exception(measure, moved):
    network, weights = tiny_network(dropout=True), []
    network[4].eval()
    network[0].requires_grad_(False)
    network[0].register_forward_pre_hook(lambda m, _: weights.append(m.weight.sum().item()))
    modes = [module.training for module in network.modules()]
    before, state = snapshot(network), torch.get_rng_state()

    def interrupt():
        # Frozen weights are perturbed like others.
        if len(set(weights)) > moved:
            raise Interrupted

    with nullcontext() if moved and measure == "robustness" else pytest.raises(Interrupted):
        MEASURES[measure](network, *images_and_labels(5), on_attack=interrupt)
    assert same(before, snapshot(network))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in network.modules()]
    assert [p.requires_grad for p in network.parameters()] == [False] * 2 + [True] * 7
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_outside(measure, context):
    images, labels = images_and_labels(5)
    expected = MEASURES[measure](tiny_network(), images, labels)
    network = tiny_network()
    with context():
        value = MEASURES[measure](network, images.clone(), labels.clone())
    assert torch.equal(value, expected)
    assert not value.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def states_now():
    return [
        np.array(random.getstate()[1]),
        np.random.get_state()[1].copy(),
        torch.get_rng_state().numpy().copy(),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("measure", ["robustness", "average", "worst", "landscape", "hessian"])
def test_every_type_of_weights_is_measured_like_float32(measure, dtype):
    images, labels = images_and_labels(4)
    # Weights that all types hold exactly, so that the networks are equal.
    network = tiny_network().to(torch.float16).to(torch.bfloat16)
    expected = MEASURES[measure](network.float(), images, labels)
    result = MEASURES[measure](network.to(dtype), images, labels)
    assert result.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(result.double(), expected.double(), rtol=2e-2, atol=1e-3)
    assert all(p.dtype == dtype for p in network.parameters())


def test_images_of_another_type_than_the_weights_are_measured():
    images, labels = images_and_labels(4)
    expected = evaluate_robustness(tiny_network(), images, labels, restarts=1, **SHORT)
    for dtype in (torch.float64, torch.bfloat16):
        result = evaluate_robustness(tiny_network(), images.to(dtype), labels, restarts=1, **SHORT)
        torch.testing.assert_close(
            result.losses.double(), expected.losses.double(), rtol=1e-1, atol=1e-2
        )


def test_small_perturbations_of_half_precision_weights_are_not_rounded_away():
    images, labels = images_and_labels(6)
    network = tiny_network().to(torch.bfloat16)
    # 0.1 % of a weight is below what bfloat16 resolves, 0.4 %.
    settings = {"xi": 0.001, "restarts": 1, "steps": 2, "eps": 0.1}
    result = worst_case_flatness(network, images, labels, **settings).value
    expected = worst_case_flatness(network.float(), images, labels, **settings).value
    assert result == pytest.approx(expected, rel=1e-6)


def test_state_comes_back_after_an_exception():
    network = Restless().bfloat16()
    before = snapshot(network)
    with pytest.raises(RuntimeError), evaluation_context(network):
        assert network.net[0].weight.dtype == torch.float32
        network.moved.add_(1)
        raise RuntimeError
    assert same(before, snapshot(network))


def test_a_graph_of_training_survives_a_measure():
    network = tiny_network()
    images, labels = images_and_labels(3)
    loss = network(images).square().mean()
    evaluate_robustness(network, images, labels, restarts=1, **SHORT)
    loss.backward()
    assert network[0].weight.grad is not None
