"""Objectives of TRADES and MART written out by hand, training labels, rotations."""

import math

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from torch.nn.functional import cross_entropy

from robust_flatness.functional import (
    TrainingLabels,
    mart_loss,
    mart_objective,
    pgd_attack,
    trades_loss,
    trades_objective,
)
from robust_flatness.functional.objectives import divergences, rotate

# The strongest class under attack is the label in the first row, another in the others.
CLEAN = torch.tensor(
    [[2.0, 0.0, -1.0, 0.5], [0.5, 0.5, 3.0, 0.0], [0.0, 1.0, 0.3, -2.0]], dtype=torch.float64
)
ADVERSARIAL = torch.tensor(
    [[1.5, 1.0, -1.0, 0.0], [2.0, -0.5, 0.0, 1.0], [3.0, 0.2, 0.1, 0.0]], dtype=torch.float64
)
LABELS = torch.tensor([0, 2, 1])
OBJECTIVES = pytest.mark.parametrize("objective", [trades_objective, mart_objective])
LOSSES = pytest.mark.parametrize("loss", [trades_loss, mart_loss])


def trades_by_hand(p, q, label):
    divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    return -math.log(p[label]) + 6 * divergence


def mart_by_hand(p, q, label):
    wrong = max(value for k, value in enumerate(q) if k != label)
    boosted = -math.log(q[label]) - math.log(1.0001 - wrong + 1e-12)
    divergence = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q))
    return boosted + 6 * divergence * (1.0000001 - p[label])


@pytest.mark.parametrize(
    ("objective", "by_hand"), [(trades_objective, trades_by_hand), (mart_objective, mart_by_hand)]
)
def test_objective_by_hand_for_a_batch_and_each_example(objective, by_hand):
    values = []
    for clean, adversarial, label in zip(CLEAN.tolist(), ADVERSARIAL.tolist(), LABELS.tolist()):
        p, q = (
            [math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (clean, adversarial)
        )
        values.append(by_hand(p, q, label))
    value = objective(CLEAN, ADVERSARIAL, LABELS, lam=6.0)
    assert value.item() == pytest.approx(sum(values) / 3, abs=1e-12)
    for i, expected in enumerate(values):
        part = slice(i, i + 1)
        alone = objective(CLEAN[part], ADVERSARIAL[part], LABELS[part], lam=6.0)
        assert alone.item() == pytest.approx(expected, abs=1e-12)


def test_gradients_of_trades_flow_through_both_arguments():
    clean, adversarial = CLEAN.clone().requires_grad_(), ADVERSARIAL.clone().requires_grad_()
    both = torch.autograd.grad(trades_objective(clean, adversarial, LABELS), [clean, adversarial])

    def gradients(p_of):
        p, q = p_of(clean.softmax(1)), adversarial.softmax(1)
        loss = cross_entropy(clean, LABELS) + 6 * (p * (p.log() - q.log())).sum(1).mean()
        return torch.autograd.grad(loss, [clean, adversarial])

    for gradient, expected in zip(both, gradients(lambda p: p)):
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(both[0], gradients(lambda p: p.detach())[0], atol=1e-3)


def test_the_weight_of_mart_receives_a_gradient():
    def gradient(weight_of):
        clean = CLEAN.clone().requires_grad_()
        p, q = clean.softmax(1), ADVERSARIAL.softmax(1)
        weights = 1.0000001 - weight_of(p).gather(1, LABELS[:, None])[:, 0]
        loss = ((p * (p.log() - (q + 1e-12).log())).sum(1) * weights).mean()
        return torch.autograd.grad(6 * loss, clean)[0]

    clean = CLEAN.clone().requires_grad_()
    (value,) = torch.autograd.grad(mart_objective(clean, ADVERSARIAL, LABELS), clean)
    torch.testing.assert_close(value, gradient(lambda p: p), atol=1e-10, rtol=0)
    assert not torch.allclose(value, gradient(lambda p: p.detach()), atol=1e-3)


@OBJECTIVES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [[0, 0], [1, 0]])
def test_extreme_logits_stay_finite_with_their_gradients(objective, dtype, labels):
    clean = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], dtype=dtype).requires_grad_()
    adversarial = torch.tensor([[-100.0, 100.0], [-100.0, 100.0]], dtype=dtype).requires_grad_()
    loss = objective(clean, adversarial, torch.tensor(labels))
    gradients = torch.autograd.grad(loss, [clean, adversarial])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@LOSSES
@pytest.mark.parametrize("count", [1, 8])
def test_a_loss_leaves_modes_and_takes_two_train_batches(loss, count):
    network = tiny_network()
    images, labels = images_and_labels(count)
    before = network[1].num_batches_tracked.item()
    value = loss(network, images, labels, eps=0.1)
    value.backward()
    assert value.isfinite()
    assert network.training
    assert network[1].num_batches_tracked.item() == before + 2


@LOSSES
def test_bad_weights_are_named(loss):
    with pytest.raises(ValueError, match="`lam` to be >= 0 but got -1"):
        loss(tiny_network(), *images_and_labels(1), eps=0.1, lam=-1)


def test_divergence_has_no_gradient_at_the_image_and_grows_from_a_start():
    network = tiny_network().eval().double()
    images, labels = images_and_labels()
    images = images.double()
    clean = network(images).detach()

    def reached(steps):
        adversarial = pgd_attack(
            network,
            images,
            labels,
            eps=0.1,
            steps=steps,
            start="gaussian",
            criterion=lambda logits, _: divergences(logits, clean),
        )
        return divergences(network(adversarial), clean).mean().item()

    assert reached(7) > reached(1) > 1e-6
    probe = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergences(network(probe), clean).sum(), probe)
    assert gradient.abs().max() < 1e-12
    with pytest.raises(
        ValueError, match="`start` to be one of paper, uniform, gaussian but got ze"
    ):
        trades_loss(network, images, labels, eps=0.1, start="zero")


@pytest.mark.parametrize(("spread", "true", "other"), [("others", 0.7, 0.1), ("all", 0.775, 0.075)])
def test_smoothed_loss_by_hand_in_both_conventions(spread, true, other):
    total = 0.0
    for row, label in zip(CLEAN.tolist(), LABELS.tolist()):
        normalizer = math.log(sum(map(math.exp, row)))
        total -= sum((true if k == label else other) * (z - normalizer) for k, z in enumerate(row))
    value = TrainingLabels(smoothing=0.3, spread=spread).loss(CLEAN, LABELS)
    assert value.item() == pytest.approx(total / 3, abs=1e-7)


def test_smoothing_is_that_of_torch():
    smoothed = TrainingLabels(smoothing=0.3, spread="all").loss(CLEAN, LABELS)
    expected = cross_entropy(CLEAN, LABELS, label_smoothing=0.3)
    torch.testing.assert_close(smoothed, expected, atol=1e-7, rtol=0)
    assert torch.equal(TrainingLabels().loss(CLEAN, LABELS), cross_entropy(CLEAN, LABELS))


def test_share_of_kept_labels_is_one_minus_tau_plus_its_part_of_tau():
    count, tau, classes = 100_000, 0.3, 10
    labels = torch.arange(count) % classes
    draws = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    noisy = TrainingLabels(noise=tau).resample(labels, draws, classes)
    kept = 1 - tau + tau / classes
    sigma = math.sqrt(kept * (1 - kept) / count)
    assert (noisy == labels).float().mean().item() == pytest.approx(kept, abs=3 * sigma)
    # What changed is uniform over the other classes.
    shift = ((noisy - labels) % classes)[noisy != labels]
    shares = torch.bincount(shift, minlength=classes)[1:] / len(shift)
    assert (shares - 1 / 9).abs().max() < 3 * math.sqrt(1 / 9 / len(shift))
    largest = torch.tensor([[0.0, 1 - 2**-24]])
    assert TrainingLabels(noise=1.0).resample(torch.tensor([0]), largest, 10).item() == 9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"noise": 1.5}, r"`label_noise` to be in \[0, 1\] but got 1.5"),
        ({"smoothing": -0.1}, r"`label_smoothing` to be in \[0, 1\] but got -0.1"),
        ({"spread": "none"}, "`smoothing_spread` to be one of others, all but got none"),
    ],
)
def test_bad_labels_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TrainingLabels(**kwargs)


def test_label_k_is_k_quarter_turns_counterclockwise():
    images = torch.rand(4, 3, 5, 5)
    rotated = rotate(images, torch.arange(4))
    for k in range(4):
        assert torch.equal(rotated[k], torch.rot90(images[k], k, (1, 2)))
    corner = torch.zeros(1, 1, 3, 3)
    corner[0, 0, 0, 2] = 1  # top right
    assert rotate(corner, torch.tensor([1]))[0, 0, 0, 0] == 1  # top left
    with pytest.raises(ValueError, match=r"square images to rotate but got \(4, 5\) pixels"):
        rotate(torch.rand(1, 1, 4, 5), torch.tensor([1]))
