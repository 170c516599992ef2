"""The auxiliary classifier of self-supervision."""

from torch import Tensor, nn


class RotationHead(nn.Module):
    """Predicts by which multiple of 90° an image was turned, from pooled features.

    As in the paper's code: a linear layer, ReLU, batch normalisation, a linear layer.

    Args:
        num_features: number of features.
        hidden: units of the hidden layer.

    Shape:
        Features `(N, num_features)`, logits `(N, 4)`.

    Example:
        >>> import torch
        >>> RotationHead(8)(torch.rand(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, num_features: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, hidden), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, 4)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits `(N, 4)` for features `(N, num_features)`."""
        logits: Tensor = self.layers(features)
        return logits
