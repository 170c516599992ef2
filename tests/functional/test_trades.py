"""TRADES' objective and attack."""

import math

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from torch.nn.functional import cross_entropy, softmax

from robust_flatness.functional import pgd_attack, trades_loss, trades_objective
from robust_flatness.functional.objectives import divergences

CLEAN = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], dtype=torch.float64)
ADVERSARIAL = torch.tensor([[0.0, 1.0, -1.0], [2.0, -0.5, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def probabilities(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def test_objective_by_hand():
    total = 0.0
    for clean, adversarial, label in zip(CLEAN.tolist(), ADVERSARIAL.tolist(), LABELS.tolist()):
        p, q = probabilities(clean), probabilities(adversarial)
        divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
        total += -math.log(p[label]) + 6 * divergence
    found = trades_objective(CLEAN, ADVERSARIAL, LABELS, lam=6.0)
    assert found.item() == pytest.approx(total / 2, abs=1e-12)


def test_gradients_flow_through_both_arguments():
    clean, adversarial = CLEAN.clone().requires_grad_(), ADVERSARIAL.clone().requires_grad_()
    both = torch.autograd.grad(trades_objective(clean, adversarial, LABELS), [clean, adversarial])
    p, q = softmax(clean, 1), softmax(adversarial, 1)
    written = (p * (p.log() - q.log())).sum(1).mean()
    expected = torch.autograd.grad(cross_entropy(clean, LABELS) + 6 * written, [clean, adversarial])
    for found, wanted in zip(both, expected):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    (detached,) = torch.autograd.grad(
        trades_objective(clean, adversarial, LABELS)
        - 6 * divergences(adversarial, clean).mean()
        + 6 * divergences(adversarial, clean.detach()).mean(),
        clean,
    )
    assert not torch.allclose(detached, both[0], atol=1e-3)


def test_extreme_logits_stay_finite_with_their_gradients():
    clean = torch.tensor([[100.0, -100.0], [-100.0, 100.0]]).requires_grad_()
    adversarial = torch.tensor([[-100.0, 100.0], [-100.0, 100.0]]).requires_grad_()
    loss = trades_objective(clean, adversarial, torch.tensor([1, 1]))
    gradients = torch.autograd.grad(loss, [clean, adversarial])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_divergence_has_no_gradient_at_the_image_and_grows_from_a_start():
    model = tiny_network().eval().double()
    images, labels = images_and_labels()
    images = images.double()
    clean = model(images).detach()

    def reached(start, steps):
        adversarial = pgd_attack(
            model,
            images,
            labels,
            eps=0.1,
            steps=steps,
            start=start,
            criterion=lambda logits, _: divergences(logits, clean),
        )
        return divergences(model(adversarial), clean).mean().item()

    one, many = reached("gaussian", 1), reached("gaussian", 7)
    assert many > one > 1e-6
    probe = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergences(model(probe), clean).sum(), probe)
    assert gradient.abs().max() < 1e-12


def test_loss_leaves_the_network_as_it_was_and_sees_two_train_batches():
    model = tiny_network()
    images, labels = images_and_labels()
    before = model[1].num_batches_tracked.item()
    trades_loss(model, images, labels, eps=0.1).backward()
    assert model.training
    assert model[1].num_batches_tracked.item() == before + 2
    with pytest.raises(ValueError, match="`lam` to be >= 0 but got -1"):
        trades_loss(model, images, labels, eps=0.1, lam=-1)
