"""Training losses of TRADES and MART, training labels, and rotations."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from robust_flatness.functional.attack import pgd_attack
from robust_flatness.functional.checks import check_choice, check_number
from robust_flatness.functional.evaluation import logits_function, module_modes
from robust_flatness.functional.margins import strongest_other
from robust_flatness.functional.noise import Norm, Start

# At the clean image itself the divergence has no gradient.
TRADES_STARTS = ("paper", "uniform", "gaussian")


def divergences(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(p ‖ q) of each example `(N,)`, p from the clean and q from the adversarial logits.

    In log space, so that probabilities that underflow give gradients of zero and not NaN.

    Example:
        >>> divergences(torch.zeros(1, 2), torch.tensor([[0.0, 200.0]]))
        tensor([0.6931])
    """
    adversarial, clean = log_softmax(logits, 1), log_softmax(clean_logits, 1)
    return kl_div(adversarial, clean, reduction="none", log_target=True).sum(1)


def trades_objective(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, *, lam: float = 6.0
) -> Tensor:
    """Cross-entropy of clean images plus λ times the mean divergence under attack, a scalar.

    Gradients flow through both logits `(N, K)`.
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
    """The loss that TRADES minimizes (Zhang et al., 2019), including its attack.

    The attack increases the divergence from the clean prediction, in eval mode; the loss is
    computed in the network's own modes, with one forward for each of both batches.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps, steps, step_size, norm: The attack, as in `PGD`.
        start: `paper` (Stutz et al.), `uniform` or `gaussian` (Zhang et al.); at `zero` the
            divergence has no gradient.
        lam: Weight λ of the divergence.
        seed: Seed of the starts.

    Returns:
        A scalar with a graph.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> loss = trades_loss(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 2]), eps=0.1)
        >>> loss.requires_grad
        True
    """
    check_number("lam", lam)
    check_choice("start", start, TRADES_STARTS)
    network = logits_function(model, images)
    with torch.no_grad(), module_modes(model, "eval"):
        clean = network(images)
    adversarial = pgd_attack(
        model,
        images,
        labels,
        eps=eps,
        steps=steps,
        step_size=step_size,
        norm=norm,
        start=start,
        criterion=lambda logits, _: divergences(logits, clean),
        seed=seed,
    )
    return trades_objective(network(images), network(adversarial), labels, lam=lam)


def margin_losses(adversarial_logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p) of each example `(N,)`, p the probability of its strongest wrong class.

    It is finite also at p = 1, as in the original code.
    """
    wrong = strongest_other(adversarial_logits.softmax(1), labels)
    return -torch.log(1.0001 - wrong + 1e-12)


def weighted_divergences(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor
) -> Tensor:
    """KL(p ‖ q) (1 - p_y) of each example `(N,)`, p from the clean and q from the other logits.

    Gradients flow through p, q and the weight, as in the original code.
    """
    log_clean = log_softmax(clean_logits, 1)
    clean = log_clean.exp()
    log_adversarial = torch.log(adversarial_logits.softmax(1) + 1e-12)
    divergence = (clean * (log_clean - log_adversarial)).sum(1)
    return divergence * (1.0000001 - clean.gather(1, labels[:, None])[:, 0])


def mart_objective(
    clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, *, lam: float = 6.0
) -> Tensor:
    """Boosted cross-entropy under attack plus λ times the mean weighted divergence, a scalar."""
    boosted = cross_entropy(adversarial_logits, labels)
    boosted = boosted + margin_losses(adversarial_logits, labels).mean()
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
    """The loss that MART minimizes (Wang et al., 2020), including its attack.

    The attack increases cross-entropy in eval mode; the rest, arguments and errors are as in
    `trades_loss`.

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


Smoothing = Literal["others", "all"]


@dataclass(frozen=True)
class TrainingLabels:
    """Label noise and label smoothing, of the training loss alone: attacks see the true labels.

    Args:
        noise: Share τ of labels that are drawn anew in each batch, uniformly over all classes
            including the true one; 0.3 in the paper.
        smoothing: Probability τ that is taken from the true class; 0.3 in the paper.
        spread: `others` gives τ/(K-1) to each of the other classes (the paper's text), `all` gives
            τ/K to every class (the paper's code, and torch's `label_smoothing`).

    Raises:
        ValueError: If a share is outside [0, 1] or `spread` unknown.

    Example:
        >>> labels = TrainingLabels(smoothing=0.3)
        >>> labels.probabilities(torch.tensor([0]), 4)
        tensor([[0.7000, 0.1000, 0.1000, 0.1000]])
    """

    noise: float = 0.0
    smoothing: float = 0.0
    spread: Smoothing = "others"

    def __post_init__(self) -> None:
        check_number("label_noise", self.noise, high=1.0)
        check_number("label_smoothing", self.smoothing, high=1.0)
        check_choice("smoothing_spread", self.spread, get_args(Smoothing))

    def resample(self, labels: Tensor, draws: Tensor, num_classes: int) -> Tensor:
        """Returns labels `(N,)` of which about the share `noise` is random.

        `draws` are `(N, 2)` uniform in [0, 1): whether a label is drawn anew, and what it becomes.
        """
        drawn = (draws[:, 1] * num_classes).long().clamp_max(num_classes - 1)
        return torch.where(draws[:, 0] < self.noise, drawn, labels)

    def probabilities(
        self, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Returns smoothed labels as probabilities `(N, K)` for K >= 2 classes."""
        others = self.smoothing / (num_classes - (self.spread == "others"))
        kept = 1 - self.smoothing + (others if self.spread == "all" else 0)
        shape = (len(labels), num_classes)
        smoothed = torch.full(shape, others, dtype=dtype, device=labels.device)
        return smoothed.scatter(1, labels[:, None], kept)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits `(N, K)` to the smoothed labels."""
        if self.smoothing == 0:
            return cross_entropy(logits, labels)
        return cross_entropy(logits, self.probabilities(labels, logits.shape[1], logits.dtype))


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates each image `(N, C, S, S)` counterclockwise by `turns` `(N,)` times 90°, 0 to 3.

    Raises:
        ValueError: If images are not square.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> rotate(image, torch.tensor([1])).flatten().tolist()
        [2, 4, 1, 3]
    """
    if images.shape[-2] != images.shape[-1]:
        raise ValueError(
            f"Expected square images to rotate but got {tuple(images.shape[-2:])} pixels."
        )
    rotated = images
    for count in (1, 2, 3):
        chosen = (turns == count).view(-1, 1, 1, 1)
        rotated = torch.where(chosen, images.rot90(count, (-2, -1)), rotated)
    return rotated
