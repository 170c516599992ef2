"""Margins: how far the true class is ahead of the strongest other class."""

import math

from torch import Tensor


def strongest_other(scores: Tensor, labels: Tensor) -> Tensor:
    """The highest score `(N,)` of a class that is not the label, for scores `(N, K)`, K >= 2."""
    return scores.scatter(1, labels[:, None], -math.inf).amax(1)


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """The margin z_y - max over j ≠ y of z_j of each example.

    Args:
        scores: Logits, or probabilities for the probability margin in [-1, 1], `(N, K)`, K >= 2.
        labels: True classes `(N,)`.

    Returns:
        Margins `(N,)`, below 0 if the example is misclassified.

    Example:
        >>> import torch
        >>> margins(torch.tensor([[3.0, 1.0, 2.5], [0.0, 1.0, 0.0]]), torch.tensor([0, 2]))
        tensor([ 0.5000, -1.0000])
    """
    return scores.gather(1, labels[:, None])[:, 0] - strongest_other(scores, labels)
