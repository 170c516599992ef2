"""What the training loss is given in place of the true labels: noisy or smoothed ones."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import check_choice, check_number

Smoothing = Literal["others", "all"]


@dataclass(frozen=True)
class TrainingLabels:
    """Label noise and label smoothing, of the training loss alone: attacks see the true labels.

    Args:
        noise: Share τ of labels that are drawn anew in each batch, uniformly over all classes, the
            true one included (the paper takes 0.3).
        smoothing: Probability τ that is taken from the true class (the paper takes 0.3).
        spread: Who receives it: `others` gives τ/(K-1) to each of the other classes (the paper's
            text), `all` gives τ/K to every class (the paper's code, and torch's `label_smoothing`).

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
        """Labels of which about the share `noise` is random.

        Args:
            labels: True classes `(N,)`.
            draws: `(N, 2)` uniform in [0, 1): whether a label is drawn anew, and which it becomes.
            num_classes: Number K of classes.

        Returns:
            Classes `(N,)`.

        Example:
            >>> draws = torch.tensor([[0.1, 0.99], [0.9, 0.99]])
            >>> TrainingLabels(noise=0.3).resample(torch.tensor([0, 0]), draws, 4)
            tensor([3, 0])
        """
        drawn = (draws[:, 1] * num_classes).long().clamp_max(num_classes - 1)
        return torch.where(draws[:, 0] < self.noise, drawn, labels)

    def probabilities(
        self, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Smoothed labels.

        Args:
            labels: Classes `(N,)`.
            num_classes: Number K of classes, at least 2.
            dtype: Of the result.

        Returns:
            Probabilities `(N, K)` that the loss is to reproduce.
        """
        others = self.smoothing / (num_classes - (self.spread == "others"))
        kept = 1 - self.smoothing + (others if self.spread == "all" else 0)
        shape = (len(labels), num_classes)
        smoothed = torch.full(shape, others, dtype=dtype, device=labels.device)
        return smoothed.scatter(1, labels[:, None], kept)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy to the smoothed labels.

        Args:
            logits: `(N, K)`.
            labels: Classes `(N,)`.

        Returns:
            A scalar.
        """
        if self.smoothing == 0:
            return cross_entropy(logits, labels)
        return cross_entropy(logits, self.probabilities(labels, logits.shape[1], logits.dtype))
