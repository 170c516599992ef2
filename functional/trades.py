"""TRADES (Zhang et al., 2019): accuracy on clean images traded for agreement under attack."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from robust_flatness.functional.attack import pgd_attack
from robust_flatness.functional.checks import check_choice, check_number
from robust_flatness.functional.logits import logits_function
from robust_flatness.functional.modes import module_modes
from robust_flatness.functional.noise import Norm, Start

# At the clean image itself the divergence has no gradient.
STARTS = ("paper", "uniform", "gaussian")


def divergences(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(p ‖ q) of each example, p from the clean and q from the adversarial logits.

    In log space, so that probabilities that underflow give gradients of zero and not NaN.

    Args:
        logits: Of adversarial examples, `(N, K)`.
        clean_logits: Of the clean images, `(N, K)`.

    Returns:
        `(N,)`, differentiable in both arguments.

    Example:
        >>> divergences(torch.zeros(1, 2), torch.tensor([[0.0, 200.0]]))
        tensor([0.6931])
    """
    adversarial, clean = log_softmax(logits, 1), log_softmax(clean_logits, 1)
    return kl_div(adversarial, clean, reduction="none", log_target=True).sum(1)


def trades_objective(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, *, lam: float = 6.0
) -> Tensor:
    """Cross-entropy of clean images plus λ times the mean divergence under attack.

    Gradients flow through both arguments of the divergence.

    Args:
        clean_logits: `(N, K)`.
        adversarial_logits: `(N, K)`.
        labels: `(N,)` true classes.
        lam: Weight λ of the divergence.

    Returns:
        A scalar.
    """
    divergence = divergences(adversarial_logits, clean_logits).mean()
    return cross_entropy(clean_logits, labels) + lam * divergence


def trades_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 7,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    lam: float = 6.0,
    seed: int = 0,
) -> Tensor:
    """The loss that TRADES minimises, its adversarial examples included.

    The attack raises the divergence from the clean prediction, in eval mode; the loss is taken in
    the network's own modes, with one forward for the clean and one for the adversarial batch.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps: Radius of the attack.
        steps: Steps of the attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        start: `paper` (Stutz et al.) or `gaussian` (Zhang et al.); at `zero` the divergence has no
            gradient.
        lam: Weight λ of the divergence.
        seed: Of the attack's starts.

    Returns:
        A scalar to differentiate.

    Raises:
        ValueError: If pixels, shapes, or an argument are not as above.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> loss = trades_loss(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]), eps=0.1)
        >>> loss.requires_grad
        True
    """
    check_number("lam", lam)
    check_choice("start", start, STARTS)
    network = logits_function(model, images)
    with torch.no_grad(), module_modes(model, "eval"):
        clean = network(images)
    attack = partial(pgd_attack, eps=eps, steps=steps, step_size=step_size, norm=norm, start=start)
    adversarial = attack(
        model,
        images,
        labels,
        criterion=lambda logits, _: divergences(logits, clean),
        seed=seed,
    )
    return trades_objective(network(images), network(adversarial), labels, lam=lam)
