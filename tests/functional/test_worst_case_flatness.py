import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_for_tests import PassCounter, images_and_labels, same, snapshot, tiny_network
from scaled_networks import scaled
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from robust_flatness.functional import (
    PGD,
    Sharing,
    evaluate_robustness,
    worst_case_flatness,
)
from robust_flatness.functional.layer_weights import perturbed_parameters

LIGHT = {"eps": 0.05, "steps": 3, "restarts": 2, "batch_size": 5, "xi": 0.05, "weight_step": 0.1}
# Steps so long that every one ends on the surface, and enough of them to turn to the maximiser.
TO_THE_END = {"steps": 40, "weight_step": 1.0, "restarts": 2}


def linear_network(slope: float = 0.3, bias: float = 0.2) -> nn.Sequential:
    """Two classes that differ by `slope` at each of 16 pixels, and by a bias."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        network[1].weight.copy_(slope * torch.tensor([[-0.5], [0.5]]).double())
        network[1].bias.copy_(bias * torch.tensor([-0.5, 0.5]).double())
    return network


def linear_worst(
    grey: float, xi: float, eps: float, slope: float = 0.3, bias: float = 0.2
) -> float:
    """The highest loss of a grey image of class 1, in closed form.

    With z = x + δ the margin is at least Σ slope·z - ξ‖W‖√2‖z‖ + bias - ξ‖b‖√2, ‖W‖√2 = 4·slope
    and ‖b‖√2 = bias. For ξ < (grey - eps) / (grey + eps) it falls with each pixel, so the worst z
    is grey - eps everywhere, where 4‖z‖ = Σ z.
    """
    margin = (1 - xi) * (16 * slope * (grey - eps) + bias)
    return softplus(torch.tensor(-margin, dtype=torch.float64)).item()


@given(grey=st.floats(0.3, 0.9), xi=st.floats(0, 0.4), eps=st.floats(0.001, 0.1))
@settings(max_examples=5, deadline=None)
def test_linear_network_agrees_with_the_closed_form(grey, xi, eps):
    images, labels = torch.full((3, 1, 4, 4), grey, dtype=torch.float64), torch.ones(3).long()
    found = worst_case_flatness(
        linear_network(), images, labels, xi=xi, eps=eps, batch_size=2, **TO_THE_END
    )
    assert found.reference_loss == pytest.approx(linear_worst(grey, 0, eps), abs=1e-9)
    expected = linear_worst(grey, xi, eps) - linear_worst(grey, 0, eps)
    assert found.value == pytest.approx(expected, abs=1e-9)


def test_one_perturbation_serves_the_whole_set():
    # Two images whose worst ν oppose each other: shared, neither gets its own.
    images = torch.full((2, 1, 4, 4), 0.5).double()
    labels = torch.tensor([0, 1])
    network = linear_network(bias=0.0)
    given = {"xi": 0.3, "eps": 0.0, "batch_size": 1, **TO_THE_END}
    shared, apart = (
        worst_case_flatness(network, images, labels, per_batch=per_batch, **given).value
        for per_batch in (False, True)
    )

    def loss(margin):
        return softplus(torch.tensor(-margin, dtype=torch.float64)).item()

    # The margins are -2.4 and 2.4; the steeper loss decides, and helps the other image as much.
    plain = (loss(-2.4) + loss(2.4)) / 2
    moved = 0.3 * 2.4
    assert shared == pytest.approx((loss(-2.4 - moved) + loss(2.4 + moved)) / 2 - plain, abs=1e-9)
    assert apart == pytest.approx((loss(-2.4 - moved) + loss(2.4 - moved)) / 2 - plain, abs=1e-9)


@pytest.mark.parametrize("loss", ["robust", "clean"])
@pytest.mark.parametrize("xi", [0.0, 0.1, 0.3])
def test_two_layer_network_agrees_with_the_closed_form(loss, xi):
    # A hidden layer of rank one, positive throughout, read out along itself: every layer can take
    # ξ of its share of the margin, and for ξ < 1/2 no other direction takes more.
    torch.manual_seed(0)
    x = torch.rand(16).double() * 0.4 + 0.3
    hidden = torch.rand(6).double() + 0.5
    read = torch.stack([-hidden, hidden])
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)
    ).double()
    with torch.no_grad():
        network[1].weight.copy_(0.5 * torch.outer(hidden, x) / x.norm())
        network[3].weight.copy_(read)
    margin = 2 * hidden.square().sum() * 0.5 * x.norm()
    expected = (softplus(-margin * (1 - xi) ** 2) - softplus(-margin)).item()
    found = worst_case_flatness(
        network, x.view(1, 1, 4, 4), torch.tensor([1]), xi=xi, eps=0.0, loss=loss, **TO_THE_END
    )
    assert found.value == pytest.approx(expected, abs=1e-9)


def test_grows_with_xi():
    images, _ = images_and_labels(12)
    for network in (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double(),
        tiny_network().double().eval(),
    ):
        labels = network(images.double()).argmax(1)
        values = [
            worst_case_flatness(network, images.double(), labels, **{**LIGHT, "xi": xi}).value
            for xi in (0.001, 0.01, 0.03, 0.1)
        ]
        assert values == sorted(set(values))
        assert values[-1] > 0


@pytest.mark.parametrize("factor", [0.5, 3.7])
@pytest.mark.parametrize("choice", [{}, {"loss": "clean"}, {"per_batch": True, "keep": "best"}])
def test_is_invariant_to_the_scale_of_normalised_layers(factor, choice):
    images, labels = images_and_labels(12)
    plain, moved = (
        worst_case_flatness(network, images.double(), labels, **LIGHT, **choice).value
        for network in (tiny_network().double(), scaled(tiny_network().double(), factor))
    )
    assert plain > 0
    assert moved == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_xi_zero_is_the_plain_attack(norm):
    images, labels = images_and_labels(12)
    network = tiny_network().double()
    given = {**LIGHT, "xi": 0.0, "norm": norm}
    found = worst_case_flatness(network, images.double(), labels, **given)
    # The reference keeps the best iterate and restart of each example, from the same starts.
    assert (found.perturbed_losses <= found.reference_losses + 1e-12).all()
    assert -1 < found.value < 0
    attack = {name: given[name] for name in ("eps", "steps", "restarts", "norm")}
    expected = evaluate_robustness(network, images.double(), labels, **attack).losses
    torch.testing.assert_close(found.reference_losses, expected)
    # Each restart is that of the attack by its number, with its last iterate.
    pgd = PGD(0.05, steps=3, norm=norm, keep="last")
    for restart, losses in enumerate(found.perturbed_losses):
        starts = pgd.starts(images, range(12), seed=0, restart=restart)
        adversarial = pgd.attack(network, images.double(), labels, starts).images
        plain = cross_entropy(network.eval()(adversarial), labels, reduction="none")
        torch.testing.assert_close(losses, plain.detach(), rtol=0, atol=1e-9)
    clean = worst_case_flatness(network, images.double(), labels, **given, loss="clean")
    assert clean.value == 0


def test_beats_random_directions_by_far():
    images, labels = images_and_labels(12)
    network = tiny_network().eval()
    found = worst_case_flatness(network, images, labels, loss="clean", **LIGHT)
    random = worst_case_flatness(
        network, images, labels, loss="clean", **{**LIGHT, "weight_step": 0.0, "restarts": 5}
    )
    assert found.value > 5 * abs(random.value)


@pytest.mark.parametrize("loss", ["robust", "clean"])
def test_perturbations_stay_on_the_ball_and_start_inside(loss):
    images, labels = images_and_labels(12)
    network, ratios, reaches = tiny_network(), [], []
    weights = {name: w.detach().clone() for name, w in perturbed_parameters(network).items()}

    def record(module, inputs):
        moved = perturbed_parameters(module)
        ratios.append([((moved[name] - w).norm() / w.norm()).item() for name, w in weights.items()])
        reaches.append((inputs[0] - images).abs().max().item())

    network.register_forward_pre_hook(record)
    worst_case_flatness(network, images, labels, loss=loss, **{**LIGHT, "batch_size": 12})
    # Four forwards for each of two restarts, after those of the reference.
    ascents = torch.tensor(ratios[-8:])
    starts, ends = ascents[0::4], torch.cat([ascents[1::4], ascents[3::4]])
    assert (starts < 0.05).all()
    # A length of its own for each layer.
    assert starts.flatten().unique().numel() == starts.numel()
    torch.testing.assert_close(ends, torch.full_like(ends, 0.05))
    assert max(reaches) == pytest.approx(0.05 if loss == "robust" else 0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({}, "last"),
        ({"keep": "best"}, "best"),
        ({"loss": "clean"}, "best"),
        ({"loss": "clean", "keep": "last"}, "last"),
    ],
)
def test_keeps_the_last_or_the_best_iterate(choice, kept):
    images, labels = images_and_labels(12)
    network, means = tiny_network().double(), []
    # The third pass of the ascent, after those of the reference, has a higher loss than the last.
    highest = 3 + (1 if choice.get("loss") == "clean" else 4)

    def record(module, inputs, logits):
        logits = logits * 10 if len(means) + 1 == highest else logits
        means.append(cross_entropy(logits, labels).item())
        return logits

    network.register_forward_hook(record)
    given = {**LIGHT, "batch_size": 12, "restarts": 1}
    found = worst_case_flatness(network, images.double(), labels, **given, **choice)
    iterates = means[-4:]
    assert max(iterates) > iterates[-1] + 0.01
    expected = iterates[-1] if kept == "last" else max(iterates)
    assert found.perturbed_losses.mean().item() == pytest.approx(expected, abs=1e-12)


def test_result_is_that_of_the_worst_restart():
    images, labels = images_and_labels(12)
    found = worst_case_flatness(tiny_network(), images, labels, **{**LIGHT, "restarts": 4})
    rises = found.perturbed_losses.double() - found.reference_losses.double()
    assert found.perturbed_losses.shape == (4, 12)
    assert found.value == rises.mean(1).max().item()
    assert found.worst_restart == rises.mean(1).argmax()
    assert torch.equal(found.worst_losses, found.perturbed_losses[found.worst_restart])
    assert found.standard_error_examples == pytest.approx(
        rises[found.worst_restart].std().item() / math.sqrt(12)
    )
    again = worst_case_flatness(tiny_network(), images, labels, **{**LIGHT, "restarts": 4})
    assert torch.equal(found.perturbed_losses, again.perturbed_losses)
    fewer = worst_case_flatness(tiny_network(), images, labels, **{**LIGHT, "restarts": 2})
    assert torch.equal(found.perturbed_losses[:2], fewer.perturbed_losses)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_changes_nothing_where_the_set_shares_the_perturbation(batch_size):
    images, labels = images_and_labels(13)
    network, images = tiny_network().double(), images.double()
    plain = worst_case_flatness(network, images, labels, **LIGHT)
    other = worst_case_flatness(network, images, labels, **{**LIGHT, "batch_size": batch_size})
    torch.testing.assert_close(other.perturbed_losses, plain.perturbed_losses, rtol=0, atol=1e-9)


def on_ranks(world: int, count: int, chunk: int, measure):
    """Runs `measure(indices, sharing)` on threads that stand for processes."""
    barrier, board, results = threading.Barrier(world, timeout=60), [None] * world, [None] * world
    rounds = math.ceil(count / (chunk * world))

    def work(rank: int) -> None:
        def gather(part):
            board[rank] = part.clone()
            barrier.wait()
            parts = list(board)
            barrier.wait()
            return parts

        starts = range(rank * chunk, count, world * chunk)
        mine = [i for start in starts for i in range(start, min(start + chunk, count))]
        results[rank] = mine, measure(mine, Sharing(rounds, gather))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("world", "choice"),
    [(2, {}), (3, {"loss": "clean"}), (2, {"keep": "best"}), (5, {"per_batch": True}), (5, {})],
)
def test_ranks_share_one_perturbation_bit_for_bit(world, choice):
    images, labels = images_and_labels(13)
    given = {**LIGHT, "batch_size": 4, **choice}
    alone = worst_case_flatness(tiny_network(), images, labels, **given)
    # Networks are built in turn, as threads share the global generator.
    networks = [tiny_network() for _ in range(world)]
    parts = on_ranks(
        world,
        13,
        4,
        lambda mine, sharing: worst_case_flatness(
            networks.pop(), images[mine], labels[mine], indices=mine, sharing=sharing, **given
        ),
    )
    for mine, found in parts:
        assert torch.equal(found.reference_losses, alone.reference_losses[mine])
        assert torch.equal(found.perturbed_losses, alone.perturbed_losses[:, mine])
    assert sorted(index for mine, _ in parts for index in mine) == list(range(13))


def test_a_network_that_fails_at_perturbed_weights_gets_them_back():
    images, labels = images_and_labels(12)
    network = tiny_network()
    network[0].requires_grad_(False)
    before = snapshot(network)

    def fail(module, inputs):
        if not torch.equal(module.weight, before["0.weight"]):
            raise RuntimeError("half-way")

    network[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        worst_case_flatness(network, images, labels, **LIGHT)
    assert same(before, snapshot(network))
    assert not network[0].weight.requires_grad


def test_works_under_autocast():
    images, labels = images_and_labels(12)
    expected = worst_case_flatness(tiny_network(), images, labels, **LIGHT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = worst_case_flatness(tiny_network(), images, labels, **LIGHT)
    assert found.value == pytest.approx(expected.value, abs=0.1)
    assert found.perturbed_losses.dtype == torch.float32


def test_spends_what_it_says():
    images, labels = images_and_labels(8)
    network, calls = tiny_network(), []
    passes = PassCounter(network)
    given = {"eps": 0.1, "steps": 5, "restarts": 3}
    worst_case_flatness(network, images, labels, on_attack=lambda: calls.append(0), **given)
    assert (passes.forwards, passes.backwards) == (8 * 2 * 3 * (5 + 1), 8 * 2 * 3 * 5)
    assert len(calls) == 2 * 3
    passes.forwards = passes.backwards = 0
    worst_case_flatness(network, images, labels, loss="clean", **given)
    assert (passes.forwards, passes.backwards) == (8 * (3 * (5 + 1) + 1), 8 * 3 * 5)


def test_layers_without_a_gradient_or_a_norm_break_nothing():
    images, labels = images_and_labels(8)
    network = tiny_network()
    nn.init.zeros_(network[8].bias)
    biases = []
    network[8].register_forward_pre_hook(lambda m, _: biases.append(m.bias.abs().max().item()))
    unused = nn.ModuleDict({"used": network, "unused": nn.Linear(3, 3)})
    unused.forward = unused["used"].forward
    found = worst_case_flatness(unused, images, labels, **LIGHT)
    assert math.isfinite(found.value)
    assert max(biases) == 0


def test_the_clean_loss_is_that_of_the_images():
    images, labels = images_and_labels(8)
    network = tiny_network().eval()
    found = worst_case_flatness(network, images, labels, loss="clean", **LIGHT)
    expected = cross_entropy(network(images), labels, reduction="none").detach()
    torch.testing.assert_close(found.reference_losses, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"xi": -0.1}, "`xi` to be >= 0 but got -0.1"),
        ({"steps": 0}, "`steps` to be >= 1 but got 0"),
        ({"restarts": 0}, "`restarts` to be >= 1 but got 0"),
        ({"weight_step": math.nan}, "`weight_step` to be >= 0 but got nan"),
        ({"loss": "both"}, "`loss` to be one of robust, clean but got both"),
        ({"keep": "first"}, "`keep` to be one of best, last but got first"),
        ({"eps": -1.0}, "`eps` to be >= 0 but got -1.0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    images, labels = images_and_labels(2)
    with pytest.raises(ValueError, match=message):
        worst_case_flatness(tiny_network(), images, labels, **{**LIGHT, **kwargs})
