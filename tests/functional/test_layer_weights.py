"""Perturbations move the tensors that layers compute with, each once, or refuse by name."""

import copy
import re
import warnings

import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from robust_flatness.functional import (
    adversarial_weight_perturbation,
    average_case_flatness,
    hessian_extreme_eigenvalues,
    loss_landscape,
    loss_surface,
    perturbed_weights,
    sample_weight_perturbation,
    worst_case_flatness,
)
from robust_flatness.functional.layer_weights import perturbed_parameters

IMAGES, LABELS = images_and_labels(6)
IMAGES = IMAGES.double()
PGD = {"eps": 0.1, "steps": 2}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()


class LowRank(nn.Module):
    """A parametrization with parameters of its own, one of them in a linear layer."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Linear(weight[0].numel(), 2)
        self.up = nn.Parameter(torch.randn(len(weight), 2))

    def forward(self, weight):
        return weight + (self.up @ self.down.weight).view_as(weight)


def custom(layer):
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    parametrize.register_parametrization(layer, "bias", Tanh())
    return parametrizations.spectral_norm(layer)


def pruned(layer):
    prune.random_unstructured(layer, "bias", 0.3)
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


def buffered(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


KINDS = {
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm, hook": spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "weight norm, hook": weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": custom,
    "pruned": pruned,
    "frozen": lambda layer: parametrizations.weight_norm(layer).requires_grad_(False),
    "buffer": buffered,
}
MEASURES = {
    "average": lambda net, *data: average_case_flatness(net, *data, num_perturbations=2, **PGD),
    "per batch": lambda net, *data: average_case_flatness(
        net, *data, num_perturbations=1, per_batch=True, batch_size=4, **PGD
    ),
    "filter": lambda net, *data: average_case_flatness(
        net, *data, num_perturbations=1, relative_to="filter", **PGD
    ),
    "network": lambda net, *data: average_case_flatness(
        net, *data, num_perturbations=1, relative_to="network", **PGD
    ),
    "worst": lambda net, *data: worst_case_flatness(net, *data, xi=0.1, restarts=1, **PGD),
}
CURVES = {
    "adversarial": lambda net, *data: (
        loss_landscape(
            net, *data, directions="adversarial", num_directions=1, num_steps=2, **PGD
        ).losses
    ),
    "hessian": lambda net, *data: loss_landscape(
        net, *data, directions="hessian", num_steps=2, loss="clean"
    ).losses.abs(),
    "surface": lambda net, *data: loss_surface(net, *data, num_steps=2, **PGD).losses,
    "curvature": lambda net, *data: torch.tensor(
        hessian_extreme_eigenvalues(net, *data, tolerance=1e-6).max_eigenvalue
    ),
    "awp": lambda net, *data: torch.cat(
        [nu.flatten() for nu in adversarial_weight_perturbation(net, *data, steps=2).values()]
    ),
}


def network(wrap=lambda layer: layer):
    torch.manual_seed(0)
    layers = wrap(nn.Conv2d(3, 4, 3, stride=2)), nn.Tanh(), nn.Flatten(), wrap(nn.Linear(36, 10))
    return nn.Sequential(*layers).double()


def pair(wrap):
    """A network in eval mode that was in train mode, and the same with plain weights."""
    parametrised, plain = network(wrap), network()
    with torch.no_grad():
        for _ in range(3):
            parametrised(IMAGES)
        parametrised.eval()(IMAGES)
        for i in (0, 3):
            plain[i].weight.copy_(parametrised[i].weight)
            plain[i].bias.copy_(parametrised[i].bias)
    return parametrised, plain


@pytest.mark.parametrize("kind", KINDS)
def test_measures_are_those_of_the_same_function_with_plain_weights(kind):
    parametrised, plain = pair(KINDS[kind])
    before = snapshot(parametrised)
    assert list(perturbed_parameters(parametrised)) == list(perturbed_parameters(plain))
    for name, measure in MEASURES.items():
        result, expected = (measure(net, IMAGES, LABELS) for net in (parametrised, plain))
        assert result.value == pytest.approx(expected.value, abs=1e-9), name
        assert abs(expected.value) > 1e-4
    for name, measure in CURVES.items() if "hook" in kind or kind == "own" else ():
        result, expected = (measure(net, IMAGES, LABELS) for net in (parametrised, plain))
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9, msg=name)
    with torch.inference_mode():
        result = MEASURES["average"](parametrised, IMAGES, LABELS).value
    assert result == pytest.approx(MEASURES["average"](plain, IMAGES, LABELS).value, abs=1e-9)
    assert same(snapshot(parametrised), before)
    assert all(parameter.grad is None for parameter in parametrised.parameters())


@pytest.mark.parametrize("kind", ["spectral norm", "spectral norm, hook", "weight norm"])
def test_gradients_at_perturbed_weights_reach_the_parameters_behind(kind):
    module, _ = pair(KINDS[kind])
    # Without the power iteration of spectral norm, which goes on in train mode.
    module.eval()
    before = snapshot(module)
    nu = adversarial_weight_perturbation(module, IMAGES, LABELS, xi=0.1)
    assert list(nu) == ["0.weight", "3.weight"]
    for name, value in nu.items():
        weight = perturbed_parameters(module)[name]
        torch.testing.assert_close(value.norm(), 0.1 * weight.norm().detach())
    with perturbed_weights(module, nu):
        loss = F.cross_entropy(module(IMAGES), LABELS)
        loss.backward()
    assert same(snapshot(module), before)
    hidden = F.conv2d(IMAGES, computed(module[0]) + nu["0.weight"], module[0].bias, stride=2)
    logits = F.linear(
        hidden.tanh().flatten(1), computed(module[3]) + nu["3.weight"], module[3].bias
    )
    expected = torch.autograd.grad(F.cross_entropy(logits, LABELS), list(module.parameters()))
    for parameter, gradient in zip(module.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12)
        assert gradient.abs().max() > 0


def computed(layer):
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())
    return layer.weight


class Tied(nn.Module):
    """Two modules share a tensor, and a linear layer that has no weight of its own is the first."""

    def __init__(self, tie):
        super().__init__()
        self.prototypes = nn.Embedding(12, 12)
        self.first, self.second, self.head = (
            nn.Linear(192, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 10),
        )
        self.third = nn.Linear(12, 12, bias=False)
        tie(self)
        self.again = self.third

    def forward(self, images):
        hidden = self.second(self.first(images.flatten(1)).tanh()) + self.prototypes.weight[0]
        return self.head(self.again(self.third(hidden.tanh())))


def tie_parameters(net):
    net.second.weight = net.third.weight = net.prototypes.weight
    net.second.bias = net.first.bias


def tie_memory(net):
    net.second.weight.data = net.third.weight.data = net.prototypes.weight.data
    net.second.bias.data = net.first.bias.data


def tie_computed(net):
    net.second.bias = net.first.bias
    for layer in (net.second, net.third):
        parametrizations.weight_norm(layer)
    for name in ("original0", "original1"):
        own = getattr(net.second.parametrizations.weight, name)
        setattr(net.third.parametrizations.weight, name, own)


@pytest.mark.parametrize("tie", [tie_parameters, tie_memory, tie_computed])
@pytest.mark.filterwarnings("ignore:Weight perturbations move")
def test_a_tensor_of_several_modules_is_perturbed_once(tie):
    net = Tied(lambda _: None).double()
    tie(net)
    names = ["first.weight", "first.bias", "second.weight", "head.weight", "head.bias"]
    assert list(perturbed_parameters(net)) == names
    before, weight = snapshot(net), net.second.weight.detach().clone()
    with perturbed_weights(net, sample_weight_perturbation(net, xi=0.5)):
        moved = net.third.weight.detach()
        assert torch.equal(moved, net.second.weight)
        torch.testing.assert_close((moved - weight).norm(), 0.5 * weight.norm())
    assert same(snapshot(net), before)
    for measure in (*MEASURES.values(), *CURVES.values()):
        measure(net, IMAGES, LABELS)
    assert same(snapshot(net), before)


def test_attention_computes_with_a_parametrised_projection():
    class Attends(nn.Module):
        def __init__(self, wrap=lambda *_: None):
            super().__init__()
            torch.manual_seed(0)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
            self.head = nn.Linear(8, 10)
            wrap(self.attend, "in_proj_weight")

        def forward(self, images):
            return self.head(self.attend(*[images[:, 0]] * 3)[0].mean(1))

    parametrised, plain = Attends(parametrizations.weight_norm).double(), Attends().double()
    result, expected = (MEASURES["average"](n, IMAGES, LABELS).value for n in (parametrised, plain))
    assert result == pytest.approx(expected, abs=1e-9)
    # AWP leaves biases out, also those with several dimensions.
    weights = ["attend.in_proj_weight", "attend.out_proj.weight", "head.weight"]
    assert list(perturbed_parameters(plain, biases=False)) == weights


class Standardized(nn.Conv2d):
    def forward(self, images):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(images, weight, self.bias, self.stride)


class InPlace(nn.Linear):
    def forward(self, images):
        self.weight.data.div_(self.weight.data.norm())
        return super().forward(images)


class SetByForward(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.raw = nn.Parameter(self.weight.detach())
        del self.weight
        self.weight = self.raw * 1

    def forward(self, images):
        self.weight = self.raw * 2
        return super().forward(images)


class Quantised(nn.Module):
    """Stands in for PyTorch's layers with packed weights, which later versions leave out."""

    _packed_params = None


def integer(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


def half_tied(layer):
    both = nn.Sequential(layer, nn.Linear(4, 4))
    both[1].weight = both[0].weight
    parametrizations.weight_norm(both[1])
    return both


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Standardized(3, 4, 3), "but got `1.0` (Standardized), which makes another tensor of it"),
        (InPlace(4, 4), "but got `1.0` (InPlace), which makes another tensor of it"),
        (SetByForward(4, 4), "`weight` of layer `1.0` (SetByForward) to be a parameter"),
        (nn.LazyConv2d(4, 3), "`1.0` (LazyConv2d) to be initialized for weight perturbations but"),
        (nn.LazyLinear(4), "`1.0` (LazyLinear) to be initialized for weight perturbations but got"),
        (Quantised(), "`1.0` (Quantised) to be floating point for weight perturbations but got q"),
        (integer(nn.Linear(4, 4)), "`1.0` (Linear) to be floating point for weight perturbations"),
        (half_tied(nn.Linear(4, 4)), "Expected `1.0.1.weight` to be computed from parameters of"),
    ],
)
def test_what_cannot_be_perturbed_is_refused_by_name_before_anything_is_measured(layer, message):
    calls = []
    net = nn.Sequential(nn.Flatten(), nn.Sequential(layer), nn.Linear(4, 10))
    net[0].register_forward_hook(lambda *_: calls.append(1))
    for measure in (*MEASURES.values(), *CURVES.values()):
        with pytest.raises(ValueError, match=re.escape(message)):
            measure(net, IMAGES.float(), LABELS)
    assert not calls


@pytest.mark.parametrize("kind", ["spectral norm", "spectral norm, hook"])
def test_vectors_of_spectral_norm_stay_while_a_network_in_train_mode_is_perturbed(kind):
    net = KINDS[kind](nn.Linear(192, 10))
    whole = nn.Sequential(nn.Flatten(), net).double()
    before = snapshot(whole)
    average_case_flatness(whole, IMAGES, LABELS, num_perturbations=1, **PGD)
    adversarial_weight_perturbation(whole, IMAGES, LABELS, mode="train")
    with perturbed_weights(whole, sample_weight_perturbation(whole)):
        pass
    assert net.training
    assert same(snapshot(whole), before)


def test_cached_parametrizations_are_refused():
    net, _ = pair(parametrizations.weight_norm)
    with parametrize.cached(), pytest.raises(ValueError, match=r"outside of `torch.*cached\(\)`"):
        net(IMAGES)
        average_case_flatness(net, IMAGES, LABELS, **PGD)


class Padded(nn.Conv2d):
    def forward(self, images):
        return self._conv_forward(F.pad(images, (1, 1, 1, 1)), self.weight, self.bias)


class Product(nn.Linear):
    def forward(self, images):
        return images @ self.weight.T + self.bias


class WithGraph(nn.Linear):
    def forward(self, images, graph):
        return super().forward(graph(images))


PARAMETRISED = parametrizations.spectral_norm(Padded(3, 4, 3))


@pytest.mark.parametrize("layer", [Padded(3, 4, 3), Product(4, 4), PARAMETRISED])
def test_a_forward_of_its_own_that_takes_the_weight_as_it_is_may_be_perturbed(layer):
    before, state = snapshot(layer), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(perturbed_parameters(layer)) == ["weight", "bias"]
    assert same(snapshot(layer), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_perturbed_or_not_certain_is_named_in_a_warning():
    net = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm([4, 4]), nn.Linear(4, 4), nn.RNN(4, 4))
    net.register_parameter("position", nn.Parameter(torch.zeros(1, 4)))
    with pytest.warns(UserWarning, match=r"not position, 0\.weight, 3\.weight_ih_l0, 3\.weight_hh"):
        perturbed_parameters(net)
    with pytest.warns(UserWarning, match=r"layer `0` \(WithGraph\) computes with its `weight` as"):
        perturbed_parameters(nn.Sequential(WithGraph(4, 4)))


def test_a_network_without_trained_weights_has_no_adversarial_perturbation():
    net = network().requires_grad_(False)
    with pytest.raises(ValueError, match="trained weights to perturb but got frozen ones"):
        adversarial_weight_perturbation(net, IMAGES, LABELS)


def test_copies_of_perturbed_networks_are_independent():
    net, _ = pair(parametrizations.weight_norm)
    twin = copy.deepcopy(net)
    with perturbed_weights(net, sample_weight_perturbation(net)):
        assert not torch.equal(net[0].weight, twin[0].weight)
    assert torch.equal(net[0].weight, twin[0].weight)
