"""MART (Wang et al., 2020): misclassification-aware adversarial training."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from robust_flatness.functional.attack import pgd_attack
from robust_flatness.functional.checks import check_number
from robust_flatness.functional.logits import logits_function
from robust_flatness.functional.noise import Norm, Start


def margins(adversarial_logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p) of each example, p the probability of its strongest wrong class under attack.

    Args:
        adversarial_logits: `(N, K)`.
        labels: `(N,)` true classes.

    Returns:
        `(N,)`, finite also at p = 1, as in the original code.
    """
    wrong = adversarial_logits.softmax(1).scatter(1, labels[:, None], -1).amax(1)
    return -torch.log(1.0001 - wrong + 1e-12)


def weighted_divergences(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor
) -> Tensor:
    """KL(p ‖ q) (1 - p_y) of each example: disagreement under attack counts where p_y is small.

    Gradients flow through p, q and the weight, as in the original code.

    Args:
        clean_logits: `(N, K)`, giving p.
        adversarial_logits: `(N, K)`, giving q.
        labels: `(N,)` true classes y.

    Returns:
        `(N,)`.
    """
    log_clean = log_softmax(clean_logits, 1)
    clean = log_clean.exp()
    log_adversarial = torch.log(adversarial_logits.softmax(1) + 1e-12)
    divergence = (clean * (log_clean - log_adversarial)).sum(1)
    return divergence * (1.0000001 - clean.gather(1, labels[:, None])[:, 0])


def mart_objective(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, *, lam: float = 6.0
) -> Tensor:
    """Boosted cross-entropy under attack plus λ times the mean weighted divergence.

    Args:
        clean_logits: `(N, K)`.
        adversarial_logits: `(N, K)`.
        labels: `(N,)` true classes.
        lam: Weight λ of the divergence.

    Returns:
        A scalar.

    Example:
        >>> mart_objective(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
        tensor(1.3861)
    """
    boosted = cross_entropy(adversarial_logits, labels) + margins(adversarial_logits, labels).mean()
    return boosted + lam * weighted_divergences(clean_logits, adversarial_logits, labels).mean()


def mart_loss(
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
    """The loss that MART minimises, its adversarial examples included.

    The attack raises cross-entropy in eval mode; the loss is taken in the network's own modes,
    with one forward for the clean and one for the adversarial batch.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps: Radius of the attack.
        steps: Steps of the attack.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        start: `paper` (Stutz et al.) or `gaussian` (Wang et al.).
        lam: Weight λ of the divergence.
        seed: Of the attack's starts.

    Returns:
        A scalar to differentiate.

    Raises:
        ValueError: If pixels, shapes, or an argument are not as above.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> loss = mart_loss(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]), eps=0.1)
        >>> loss.requires_grad
        True
    """
    check_number("lam", lam)
    adversarial = pgd_attack(
        model,
        images,
        labels,
        eps=eps,
        steps=steps,
        step_size=step_size,
        norm=norm,
        start=start,
        seed=seed,
    )
    network = logits_function(model, images)
    return mart_objective(network(images), network(adversarial), labels, lam=lam)
