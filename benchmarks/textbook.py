"""Projected gradient descent as research code writes it, to compare with."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TEXTBOOK = "textbook"


def textbook_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, step_size: float, steps: int
) -> tuple[Tensor, Tensor]:
    """L-infinity PGD from a uniform start: `steps + 1` forwards and `steps` full backwards.

    As in Rice et al. (2020) and Wu et al. (2020), `loss.backward()` also computes the gradients of
    the weights, which nobody uses, and one more forward tells the loss of the last iterate.

    Args:
        model: Maps images `(N, C, H, W)` in [0, 1] to logits; its mode is left alone.
        images: The clean images.
        labels: `(N,)`.
        eps: Radius of the ball.
        step_size: Length of a step.
        steps: Number of steps.

    Returns:
        Adversarial examples `(N, C, H, W)` and their cross-entropy `(N,)`.
    """
    delta = torch.empty_like(images).uniform_(-eps, eps)
    delta = ((images + delta).clamp(0, 1) - images).requires_grad_()
    for _ in range(steps):
        cross_entropy(model(images + delta), labels).backward()
        assert delta.grad is not None
        with torch.no_grad():
            moved = (delta + step_size * delta.grad.sign()).clamp(-eps, eps)
            delta.copy_((images + moved).clamp(0, 1) - images)
        delta.grad.zero_()
    adversarial = (images + delta).detach()
    losses = cross_entropy(model(adversarial), labels, reduction="none")
    return adversarial, losses.detach()
