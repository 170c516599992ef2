import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_for_tests import PassCounter, images_and_labels, same, snapshot, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional import PGD, FriendlyPGD, pgd_attack
from robust_flatness.functional.attack import example_losses
from robust_flatness.functional.noise import random_start

NORMS = ("linf", "l2")


def distance(first: torch.Tensor, second: torch.Tensor, norm: str) -> torch.Tensor:
    order = torch.inf if norm == "linf" else 2
    return torch.linalg.vector_norm((first - second).flatten(1), ord=order, dim=1)


@given(
    eps=st.floats(0, 1),
    norm=st.sampled_from(NORMS),
    start=st.sampled_from(["paper", "uniform", "gaussian", "zero"]),
    keep=st.sampled_from(["best", "last"]),
    border=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_stays_in_ball_and_box_and_leaves_inputs_alone(eps, norm, start, keep, border):
    eps = 2 * eps if norm == "l2" else eps
    images, labels = images_and_labels(5)
    if border:
        images = images.round()
    before = images.clone()
    network = tiny_network()
    adversarial = pgd_attack(
        network, images, labels, eps=eps, steps=3, norm=norm, start=start, keep=keep
    )
    assert distance(adversarial, images, norm).max() <= eps + 1e-5
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(images, before)
    assert adversarial.dtype == torch.float32


def test_l2_projects_each_example_by_its_own_norm():
    images, labels = torch.full((16, 3, 8, 8), 0.5), torch.arange(16) % 10
    adversarial = pgd_attack(tiny_network(), images, labels, eps=0.5, norm="l2", start="zero")
    # Projecting the batch as one tensor would leave each example about a quarter of the radius.
    assert distance(adversarial, images, "l2").min() > 0.45


@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_and_no_steps_are_the_images(norm):
    images, labels = images_and_labels()
    network = tiny_network()
    assert torch.equal(pgd_attack(network, images, labels, eps=0.0, norm=norm), images)
    assert torch.equal(pgd_attack(network, images, labels, eps=0.1, steps=0, norm=norm), images)
    start = random_start(images.shape, eps=0.0, norm=norm)
    assert torch.equal(PGD(0.0, norm=norm).attack(network, images, labels, start).images, images)


@pytest.mark.parametrize("norm", NORMS)
def test_constant_network_gives_no_nan(norm):
    images, labels = images_and_labels()
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    nn.init.zeros_(network[1].weight)
    for start in ("zero", "paper"):
        adversarial = pgd_attack(network, images, labels, eps=0.1, norm=norm, start=start)
        assert adversarial.isfinite().all()


def test_linear_network_reaches_the_closed_form_maximum():
    images, labels = torch.full((6, 1, 4, 4), 0.5).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    weight = network[1].weight
    gap = (weight[1] - weight[0]).detach()
    adversarial = pgd_attack(network, images, labels, eps=0.1, steps=40, start="zero")
    towards = torch.where(labels == 0, 1.0, -1.0)[:, None] * gap.sign()
    expected = images + 0.1 * towards.view_as(images)
    torch.testing.assert_close(adversarial, expected)


@pytest.mark.parametrize(
    ("arguments", "reach"),
    [
        # FGSM-RS (Wong et al.), N-FGSM (de Jorge et al.), and plain FGSM.
        ({"step_size": 0.25, "start": "uniform"}, 0.2),
        ({"step_size": 0.2, "start": "uniform", "start_scale": 2, "projection": False}, None),
        ({"step_size": 0.2, "start": "zero"}, 0.2),
    ],
)
def test_single_step_attacks_are_those_of_their_papers(arguments, reach):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(20) % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    pgd = PGD(eps=0.2, steps=1, keep="last", **arguments)
    noise = pgd.draw_start(images.shape, generator).double()
    assert noise.abs().max() <= 0.2 * pgd.start_scale
    if pgd.start == "uniform":
        assert noise.abs().max() > 0.19 * pgd.start_scale
    # The gradient of a linear network does not depend on where it is taken.
    gap = (network[1].weight[1] - network[1].weight[0]).detach().view(1, 1, 6, 6)
    sign = torch.where(labels == 0, 1.0, -1.0).double().view(-1, 1, 1, 1) * gap.sign()
    delta = (images + noise).clamp(0, 1) - images + pgd.length * sign
    expected = (images + (delta if reach is None else delta.clamp(-reach, reach))).clamp(0, 1)
    adversarial = pgd.attack(network, images, labels, noise).images
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-15)
    left = (adversarial - images).abs().max() > 0.2 + 1e-9
    assert bool(left) is (reach is None)


def test_one_batch_of_eight_equals_eight_batches_of_one():
    images, labels = images_and_labels()
    images, network = images.double(), tiny_network().double()
    pgd, start = PGD(8 / 255), random_start(images.shape, eps=8 / 255).double()
    whole = pgd.attack(network, images, labels, start).images
    single = [
        pgd.attack(network, images[i : i + 1], labels[i : i + 1], start[i : i + 1]).images
        for i in range(8)
    ]
    torch.testing.assert_close(whole, torch.cat(single), rtol=0, atol=1e-12)


def test_mean_and_sum_of_losses_give_the_same_attack():
    images, labels = images_and_labels()
    network = tiny_network().double()
    plain = pgd_attack(network, images.double(), labels, eps=0.1)
    scaled = pgd_attack(
        network, images.double(), labels, eps=0.1, criterion=lambda z, y: example_losses(z, y) / 8
    )
    assert torch.equal(plain, scaled)


def test_best_iterate_is_never_below_start_or_last():
    images, labels = images_and_labels(32)
    network = tiny_network().eval()
    start = random_start(images.shape, eps=0.3, generator=torch.Generator().manual_seed(3))
    best = PGD(0.3, 5, 0.2).attack(network, images, labels, start)
    last = PGD(0.3, 5, 0.2, keep="last").attack(network, images, labels, start)
    with torch.no_grad():
        at_best = cross_entropy(network(best.images), labels, reduction="none")
        at_last = cross_entropy(network(last.images), labels, reduction="none")
        at_start = cross_entropy(network((images + start).clamp(0, 1)), labels, reduction="none")
    torch.testing.assert_close(best.losses, at_best)
    assert (at_best >= at_last - 1e-6).all()
    assert (at_best >= at_start - 1e-6).all()
    assert (at_best > at_last + 1e-4).any()
    assert torch.equal(best.predictions, network(best.images).argmax(1))


@pytest.mark.parametrize(("keep", "extra"), [("best", 1), ("last", 0)])
def test_spends_the_minimum_of_passes(keep, extra):
    images, labels = images_and_labels(8)
    network = tiny_network()
    passes = PassCounter(network)
    pgd_attack(network, images, labels, eps=0.1, steps=7, keep=keep)
    assert passes.forwards == 8 * (7 + extra)
    assert passes.backwards == 8 * 7
    assert all(parameter.grad is None for parameter in network.parameters())


def test_leaves_modes_buffers_gradients_and_random_state_alone():
    images, labels = images_and_labels()
    network = tiny_network(dropout=True)
    network[1].eval()
    network[8].weight.requires_grad_(False)
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before, state = snapshot(network), torch.get_rng_state()
    pgd_attack(network, images, labels, eps=0.1)
    assert same(before, snapshot(network))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in network] == [i != 1 for i in range(9)]
    assert torch.equal(network[0].weight.grad, torch.ones_like(network[0].weight))
    assert network[3].weight.grad is None
    assert not network[8].weight.requires_grad


def test_train_mode_crafting_moves_the_statistics_once_a_forward():
    images, labels = images_and_labels()
    network = tiny_network()
    before = network[1].num_batches_tracked.item()
    pgd_attack(network, images, labels, eps=0.1, steps=3, mode="train")
    assert network[1].num_batches_tracked.item() == before + 4


def test_works_where_gradients_are_off():
    images, labels = images_and_labels()
    network = tiny_network()
    expected = pgd_attack(network, images, labels, eps=0.1)
    with torch.no_grad():
        assert torch.equal(pgd_attack(network, images, labels, eps=0.1), expected)
    with torch.inference_mode():
        inside, targets = images.clone(), labels.clone()
        assert inside.is_inference()
        assert torch.equal(pgd_attack(network, inside, targets, eps=0.1), expected)


def test_bf16_network_keeps_float32_perturbations():
    images, labels = images_and_labels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = pgd_attack(tiny_network(), images, labels, eps=8 / 255)
    assert adversarial.dtype == torch.float32
    # bfloat16 near 0.5 knows steps of 1/256 only: the ball would be missed.
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6
    assert (adversarial - images).abs().max() > 7.9 / 255


def test_step_size_defaults_to_the_papers_proportion():
    assert PGD(8 / 255).length == pytest.approx(0.007)
    assert PGD(0.2).length == pytest.approx(0.2 * 0.007 * 255 / 8)
    assert PGD(0.2, step_size=0.01).length == 0.01


def test_paper_start_is_closer_to_the_centre_than_uniform():
    shape = (2000, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    paper = random_start(shape, eps=1.0, start="paper", generator=generator)
    uniform = random_start(shape, eps=1.0, start="uniform", generator=generator)
    # Largest entry of an example: uniform in [0, 1] for the paper's start, near 1 for the other.
    assert paper.flatten(1).abs().amax(1).mean() == pytest.approx(0.5, abs=0.03)
    assert uniform.flatten(1).abs().amax(1).mean() == pytest.approx(16 / 17, abs=0.03)
    gaussian = random_start(shape, eps=1.0, start="gaussian", generator=generator)
    assert gaussian.std() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -0.1}, "`eps` to be >= 0 but got -0.1"),
        ({"eps": 0.1, "steps": -1}, "`steps` to be >= 0 but got -1"),
        ({"eps": 0.1, "norm": "l1"}, "`norm` to be one of linf, l2 but got l1"),
        ({"eps": float("nan")}, "`eps`"),
        ({"eps": 0.1, "step_size": -1.0}, "`step_size` to be >= 0 but got -1.0"),
        ({"eps": 0.1, "start": "far"}, "`start` to be one of paper, .* but got far"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match=message):
        pgd_attack(tiny_network(), images, labels, **kwargs)


def test_bad_examples_are_named():
    images, labels = images_and_labels()
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] but got \[0, 255\]"):
        pgd_attack(tiny_network(), 255.0 * images.round(), labels, eps=0.1)
    with pytest.raises(ValueError, match=r"`labels` to have shape \(8,\)"):
        pgd_attack(tiny_network(), images, labels[:4], eps=0.1)


class Ramp(nn.Module):
    """One pixel x against 0.5: class 1 above, class 0 below; raising x fools label 0."""

    def forward(self, images):
        height = images.flatten(1)[:, 0] - 0.5
        return torch.stack([-height, height], 1)


def ramp_attack(tau, values, steps=5, label=0):
    images = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)
    labels = torch.full((len(values),), label)
    attack = FriendlyPGD(eps=0.35, steps=steps, step_size=0.1, tau=tau)
    start = torch.zeros_like(images)
    return attack.attack(Ramp(), images, labels, start).images.flatten().tolist()


@pytest.mark.parametrize(("tau", "reached"), [(0, 0.55), (1, 0.65), (2, 0.7), (9, 0.7)])
def test_goes_tau_iterates_beyond_the_first_misclassified_one(tau, reached):
    # 0.35, 0.45, 0.55, 0.65, 0.7 (the ball's edge), 0.7
    assert ramp_attack(tau, [0.35]) == pytest.approx([reached])


def test_each_example_stops_for_itself_and_stays_clean_if_no_iterate_fools():
    # The last one is misclassified when clean.
    assert ramp_attack(0, [0.35, 0.05, 0.45, 0.6]) == pytest.approx([0.55, 0.05, 0.55, 0.6])
    assert ramp_attack(3, [0.6], steps=0) == pytest.approx([0.6])


def test_friendly_pgd_stays_in_ball_and_box_and_spends_as_much_as_pgd():
    model = tiny_network().eval()
    images, labels = images_and_labels()
    passes = PassCounter(model)
    start = torch.full_like(images, 0.5)
    result = FriendlyPGD(eps=0.1, steps=4, tau=1).attack(model, images, labels, start)
    assert (passes.forwards, passes.backwards) == (8 * 5, 8 * 4)
    assert (result.images - images).abs().max() <= 0.1 + 1e-6
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert not result.images.requires_grad
    with pytest.raises(ValueError, match="`tau` to be >= 0 but got -1"):
        FriendlyPGD(eps=0.1, tau=-1)
