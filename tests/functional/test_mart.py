"""MART's objective."""

import math

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network

from robust_flatness.functional import mart_loss, mart_objective

# The strongest class under attack is the label in the first row, another in the others.
CLEAN = torch.tensor(
    [[2.0, 0.0, -1.0, 0.5], [0.5, 0.5, 3.0, 0.0], [0.0, 1.0, 0.3, -2.0]], dtype=torch.float64
)
ADVERSARIAL = torch.tensor(
    [[1.5, 1.0, -1.0, 0.0], [2.0, -0.5, 0.0, 1.0], [3.0, 0.2, 0.1, 0.0]], dtype=torch.float64
)
LABELS = torch.tensor([0, 2, 1])


def probabilities(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def test_objective_by_hand():
    total = 0.0
    for clean, adversarial, label in zip(CLEAN.tolist(), ADVERSARIAL.tolist(), LABELS.tolist()):
        p, q = probabilities(clean), probabilities(adversarial)
        wrong = max(value for k, value in enumerate(q) if k != label)
        boosted = -math.log(q[label]) - math.log(1.0001 - wrong + 1e-12)
        divergence = sum(a * (math.log(a) - math.log(b + 1e-12)) for a, b in zip(p, q))
        total += boosted + 6 * divergence * (1.0000001 - p[label])
    found = mart_objective(CLEAN, ADVERSARIAL, LABELS, lam=6.0)
    assert found.item() == pytest.approx(total / 3, abs=1e-12)


def test_the_weight_receives_a_gradient():
    def gradient(weight_of):
        clean = CLEAN.clone().requires_grad_()
        p = clean.softmax(1)
        q = ADVERSARIAL.softmax(1)
        weights = 1.0000001 - weight_of(p).gather(1, LABELS[:, None])[:, 0]
        loss = ((p * (p.log() - (q + 1e-12).log())).sum(1) * weights).mean()
        return torch.autograd.grad(6 * loss, clean)[0]

    clean = CLEAN.clone().requires_grad_()
    (found,) = torch.autograd.grad(mart_objective(clean, ADVERSARIAL, LABELS), clean)
    torch.testing.assert_close(found, gradient(lambda p: p), atol=1e-10, rtol=0)
    assert not torch.allclose(found, gradient(lambda p: p.detach()), atol=1e-3)


def test_a_batch_of_one_is_that_example():
    alone = [
        mart_objective(CLEAN[i : i + 1], ADVERSARIAL[i : i + 1], LABELS[i : i + 1])
        for i in range(3)
    ]
    together = mart_objective(CLEAN, ADVERSARIAL, LABELS)
    torch.testing.assert_close(torch.stack(alone).mean(), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite_with_their_gradients(dtype):
    clean = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], dtype=dtype).requires_grad_()
    adversarial = torch.tensor([[-100.0, 100.0], [-100.0, 100.0]], dtype=dtype).requires_grad_()
    loss = mart_objective(clean, adversarial, torch.tensor([0, 0]))
    gradients = torch.autograd.grad(loss, [clean, adversarial])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_loss_runs_on_a_batch_of_one_and_leaves_modes():
    model = tiny_network()
    images, labels = images_and_labels(1)
    loss = mart_loss(model, images, labels, eps=0.1)
    loss.backward()
    assert model.training
    assert loss.isfinite()
    with pytest.raises(ValueError, match="`lam` to be >= 0 but got -1"):
        mart_loss(model, images, labels, eps=0.1, lam=-1)
