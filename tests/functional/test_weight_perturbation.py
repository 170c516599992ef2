import io
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional import (
    adversarial_weight_perturbation,
    perturbed_weights,
    sample_weight_perturbation,
)
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.functional.noise import keyed_generator
from robust_flatness.functional.weight_perturbation import onto_ball, scale_each_to, scale_to

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_perturbs_convolutions_and_linear_layers_with_biases_but_no_normalisation():
    network = tiny_network()
    everything = ["0.weight", "0.bias", "3.weight", "8.weight", "8.bias"]
    assert list(perturbed_parameters(network)) == everything
    assert list(perturbed_parameters(network, biases=False)) == ["0.weight", "3.weight", "8.weight"]


@given(xi=st.floats(0, 3), seed=st.integers(0, 9), direction=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_every_layer_moves_by_xi_of_its_norm(xi, seed, direction):
    network = tiny_network().double()
    nn.init.zeros_(network[8].bias)
    perturbation = sample_weight_perturbation(network, xi=xi, seed=seed, direction=direction)
    for name, parameter in perturbed_parameters(network).items():
        torch.testing.assert_close(perturbation[name].norm(), xi * parameter.detach().norm())
    assert (perturbation["8.bias"] == 0).all()


def test_directions_and_seeds_are_independent_and_repeatable():
    network = tiny_network()
    first = sample_weight_perturbation(network, seed=0, direction=0)["0.weight"]
    again = sample_weight_perturbation(network, seed=0, direction=0)["0.weight"]
    other = sample_weight_perturbation(network, seed=0, direction=1)["0.weight"]
    assert torch.equal(first, again)
    cosine = torch.cosine_similarity(first.flatten(), other.flatten(), dim=0)
    assert cosine.abs() < 0.4


def test_defaults_are_the_sphere_of_each_layer_drawn_as_ever():
    network = tiny_network()
    result = sample_weight_perturbation(network, xi=0.5, seed=3, direction=2)
    for position, (name, weight) in enumerate(perturbed_parameters(network).items()):
        # The generator's key is part of what makes old and new values comparable.
        noise = torch.randn(weight.shape, generator=keyed_generator(3, "direction", 2, position))
        assert torch.equal(result[name], noise * (0.5 * weight.norm() / noise.norm()))


@given(seed=st.integers(0, 9), xi=st.floats(0.01, 3))
@settings(max_examples=15, deadline=None)
def test_every_filter_moves_by_xi_of_its_norm(seed, xi):
    network = tiny_network().double()
    with torch.no_grad():
        network[3].weight[1] = 0
    result = sample_weight_perturbation(network, xi=xi, seed=seed, relative_to="filter")
    for name, weight in perturbed_parameters(network).items():
        rows = (1, -1) if weight.ndim == 1 else (len(weight), -1)
        lengths, norms = (t.detach().reshape(rows).norm(dim=1) for t in (result[name], weight))
        torch.testing.assert_close(lengths, xi * norms)
    assert (result["3.weight"][1] == 0).all()
    # The directions of filters are those of layers.
    layer = sample_weight_perturbation(network, xi=xi, seed=seed)["0.weight"][0].flatten()
    cosine = torch.cosine_similarity(layer, result["0.weight"][0].flatten(), dim=0)
    assert cosine.item() == pytest.approx(1)


def test_relative_to_the_network_there_is_one_length():
    network = tiny_network().double()
    nn.init.zeros_(network[8].bias)
    result = sample_weight_perturbation(network, xi=0.3, relative_to="network")
    length = torch.stack([nu.norm() for nu in result.values()]).norm()
    weights = perturbed_parameters(network).values()
    torch.testing.assert_close(
        length, 0.3 * torch.stack([w.detach().norm() for w in weights]).norm()
    )
    assert result["8.bias"].norm() > 0
    # One scale for all: what is drawn is one Gaussian vector.
    spread = [nu.std().item() for name, nu in result.items() if nu.numel() > 100]
    assert max(spread) < 1.2 * min(spread)


def longest_deviation(values: torch.Tensor) -> float:
    """Kolmogorov's distance of a sample from the uniform distribution on [0, 1]."""
    steps = torch.arange(len(values), dtype=torch.float64) / len(values)
    return (values.double().sort().values - steps).abs().max().item() + 1 / len(values)


@pytest.mark.parametrize(
    ("relative_to", "dimension"), [("layer", 8), ("filter", 4), ("network", 10)]
)
def test_lengths_in_the_ball_follow_the_law_of_its_volume(relative_to, dimension):
    network, count = nn.Linear(4, 2).double(), 400
    weight, bias = network.weight.detach(), network.bias.detach()
    scale = {"layer": weight.norm(), "filter": weight[0].norm()}
    scale["network"] = torch.cat([weight.flatten(), bias]).norm()
    lengths = []
    for k in range(count):
        choice = {"distribution": "ball", "relative_to": relative_to}
        nu = sample_weight_perturbation(network, xi=0.5, direction=k, **choice)
        parts = {"layer": nu["weight"], "filter": nu["weight"][0]}
        parts["network"] = torch.cat([nu["weight"].flatten(), nu["bias"]])
        lengths.append(parts[relative_to].norm() / (0.5 * scale[relative_to]))
    inside = torch.stack(lengths)
    assert inside.max() <= 1 + 1e-12
    # 1.63 / √n is the 1 % point of Kolmogorov's test; the seed is fixed.
    assert longest_deviation(inside**dimension) < 1.63 / count**0.5
    assert longest_deviation(inside) > 1.63 / count**0.5


def test_filters_in_the_ball_have_lengths_of_their_own():
    network = tiny_network().double()
    choice = {"distribution": "ball", "relative_to": "filter"}
    nu = sample_weight_perturbation(network, xi=1.0, **choice)["0.weight"]
    ratios = nu.flatten(1).norm(dim=1) / network[0].weight.detach().flatten(1).norm(dim=1)
    assert ratios.unique().numel() == 6


def test_batches_have_directions_of_their_own():
    network = tiny_network()
    drawn = [sample_weight_perturbation(network, batch=b)["0.weight"] for b in (None, 0, 1, 1)]
    assert torch.equal(drawn[2], drawn[3])
    assert all(not torch.allclose(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@given(length=st.floats(0, 5), xi=st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_onto_the_ball_is_the_shortest_way(length, xi):
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64)
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    result = onto_ball(length * direction, weight, xi)
    torch.testing.assert_close(result, min(length, 5 * xi) * direction)


def test_half_precision_does_not_overflow():
    weight = torch.full((4,), 3e4, dtype=torch.float16)
    assert scale_to(weight, weight, 0.5).tolist() == [1.5e4] * 4
    assert onto_ball(weight, weight, 0.5).tolist() == [1.5e4] * 4


@pytest.mark.parametrize("name", ["distribution", "relative_to"])
def test_unknown_choices_are_named(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be one of .* but got cube"):
        sample_weight_perturbation(nn.Linear(2, 2), **{name: "cube"})


def test_zero_or_broken_directions_do_not_move_anything():
    weight = torch.ones(3)
    assert scale_to(torch.zeros(3), weight, 0.5).tolist() == [0, 0, 0]
    assert scale_to(torch.tensor([1.0, torch.nan, 0]), weight, 0.5).tolist() == [0, 0, 0]
    assert scale_to(torch.ones(3), torch.zeros(3), 0.5).tolist() == [0, 0, 0]


def test_weights_come_back_bit_for_bit_after_an_exception():
    network = tiny_network()
    before = snapshot(network)
    perturbation = sample_weight_perturbation(network)
    with pytest.raises(RuntimeError, match="half-way"), perturbed_weights(network, perturbation):
        assert not same(before, snapshot(network))
        raise RuntimeError("half-way")
    assert same(before, snapshot(network))


def test_autocast_sees_the_perturbation():
    network = nn.Linear(4, 3)
    inputs = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(inputs)
        with perturbed_weights(network, {"weight": torch.ones(3, 4)}):
            inside = network(inputs)
        after = network(inputs)
    torch.testing.assert_close(inside.float(), before.float() + 4, atol=0.05, rtol=0)
    assert torch.equal(before, after)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "make", [torch.jit.script, partial(torch.jit.trace, example_inputs=IMAGES)]
)
def test_torchscript_is_perturbed_as_what_it_was_made_from(make):
    network, file = tiny_network().eval(), io.BytesIO()
    torch.jit.save(make(network), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert list(perturbed_parameters(loaded)) == list(perturbed_parameters(network))
    before, nu = loaded(IMAGES), sample_weight_perturbation(network)
    with perturbed_weights(loaded, sample_weight_perturbation(loaded)):
        inside = loaded(IMAGES)
    with perturbed_weights(network, nu):
        torch.testing.assert_close(inside, network(IMAGES))
    assert torch.equal(loaded(IMAGES), before)


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="convolution or linear layers to perturb but got ReLU"):
        sample_weight_perturbation(nn.ReLU())


def test_one_step_of_awp_is_the_closed_form():
    images, labels = images_and_labels(8)
    network = tiny_network().double().eval()
    results = adversarial_weight_perturbation(network, images.double(), labels, xi=0.02)
    weights = {f"{i}.weight": network[i].weight for i in (0, 3, 8)}
    loss = cross_entropy(network(images.double()), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    assert results.keys() == weights.keys()
    for (name, weight), gradient in zip(weights.items(), gradients):
        expected = 0.02 * weight.norm() * gradient / gradient.norm()
        torch.testing.assert_close(results[name], expected.detach())
        # The public code returns the unperturbed model after one step.
        assert results[name].norm() > 0


@pytest.mark.parametrize("steps", [1, 3])
def test_awp_raises_the_loss_and_stays_in_the_ball(steps):
    images, labels = images_and_labels(16)
    images, network = images.double(), tiny_network().double().eval()
    nu = adversarial_weight_perturbation(network, images, labels, xi=1e-3, steps=steps)
    before = cross_entropy(network(images), labels)
    with perturbed_weights(network, nu):
        after = cross_entropy(network(images), labels)
    assert after > before
    for name, value in nu.items():
        weight = network.get_parameter(name)
        assert value.norm() <= 1e-3 * weight.norm() * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_awp_leaves_weights_buffers_gradients_and_modes_alone(mode):
    images, labels = images_and_labels(8)
    network = tiny_network()
    network[1].eval()
    before = snapshot(network)
    adversarial_weight_perturbation(network, images, labels, steps=2, mode=mode)
    assert same(before, snapshot(network))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network[1].training
    assert network[4].training


def test_train_mode_ascends_on_batch_statistics():
    images, labels = images_and_labels(8)
    network = tiny_network()
    results = [
        adversarial_weight_perturbation(network, images, labels, mode=mode)["0.weight"]
        for mode in ("eval", "train")
    ]
    assert not torch.allclose(results[0], results[1])


def test_unused_and_zero_weights_do_not_move():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.zero = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x):
            return self.zero(self.used(x.flatten(1)))

    nu = adversarial_weight_perturbation(Unused(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    assert nu["unused.weight"].eq(0).all()
    assert nu["zero.weight"].eq(0).all()
    assert nu["used.weight"].isfinite().all()


def test_a_loss_of_nan_leaves_the_perturbation_finite():
    images, labels = images_and_labels(4)
    network = tiny_network()
    with torch.no_grad():
        network[8].bias.fill_(torch.nan)
    nu = adversarial_weight_perturbation(network, images, labels)
    assert all(value.isfinite().all() for value in nu.values())


def test_gradients_are_handed_over_ranks():
    images, labels = images_and_labels(8)
    network = tiny_network().double()
    opposite = adversarial_weight_perturbation(
        network, images.double(), labels, reduce=lambda gradients: [-g for g in gradients]
    )
    plain = adversarial_weight_perturbation(network, images.double(), labels)
    for name in plain:
        torch.testing.assert_close(opposite[name], -plain[name])


def test_bad_arguments_of_awp_are_named():
    images, labels = images_and_labels(4)
    with pytest.raises(ValueError, match="`xi` to be >= 0 but got -1"):
        adversarial_weight_perturbation(tiny_network(), images, labels, xi=-1)
    with pytest.raises(ValueError, match="`steps` to be >= 1 but got 0"):
        adversarial_weight_perturbation(tiny_network(), images, labels, steps=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_are_scaled_together_as_each_alone(dtype):
    weights = [torch.randn(7, 5, 3, 3).to(memory_format=torch.channels_last), torch.randn(9, 4)]
    weights = [weight.to(dtype) for weight in (*weights, torch.zeros(4), torch.randn(5))]
    directions = [torch.randn_like(weight) for weight in weights]
    directions.append(torch.zeros(6, dtype=dtype))
    directions[3][0] = torch.nan
    weights.append(torch.ones(6, dtype=dtype))
    scaled = scale_each_to(directions, weights, 0.01)
    for one, direction, weight in zip(scaled, directions, weights, strict=True):
        alone = scale_to(direction, weight, 0.01)
        assert torch.equal(one, alone)
        assert (one.dtype, one.stride()) == (alone.dtype, alone.stride())
