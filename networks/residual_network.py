"""What the residual networks share: a body, average pooling, and a linear classifier."""

from torch import Tensor, nn

from robust_flatness.networks.initialization import initialize


class ResidualNetwork(nn.Module):
    """A convolutional body, global average pooling, and a linear classifier.

    `features` is there for heads that share the body, such as the one that predicts
    rotations in self-supervision; `forward` is the classifier on it.

    Args:
        body: maps images `(N, in_channels, H, W)` to activations `(N, num_features, H', W')`.
        num_classes: number of logits.
        in_channels: channels of the images.
        num_features: channels of what `body` returns.

    Shape:
        Images `(N, in_channels, H, W)`, logits `(N, num_classes)`.

    Raises:
        ValueError: if `num_classes` or `in_channels` is below 1.

    Example:
        >>> import torch
        >>> network = ResidualNetwork(nn.Conv2d(1, 5, 3), 10, in_channels=1, num_features=5)
        >>> network(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, body: nn.Module, num_classes: int, in_channels: int, num_features: int
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        self.in_channels = in_channels
        self.num_features = num_features
        self.body = body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_features, num_classes)
        initialize(self)

    def features(self, x: Tensor) -> Tensor:
        """Compute the pooled features that the classifier sees.

        Args:
            x: images `(N, in_channels, H, W)`.

        Returns:
            Features `(N, num_features)`.

        Raises:
            ValueError: if `x` has another number of dimensions or of channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"Expected images of shape (N, {self.in_channels}, H, W)"
                f" but got shape {tuple(x.shape)}."
            )
        features: Tensor = self.pool(self.body(x)).flatten(1)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `(N, num_classes)` for images `(N, in_channels, H, W)`."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


def check_positive(**sizes: int) -> None:
    """Raise a `ValueError` that names the first of `sizes` that is below 1.

    Example:
        >>> check_positive(width=0)
        Traceback (most recent call last):
        ValueError: Expected `width` to be >= 1 but got 0.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Expected `{name}` to be >= 1 but got {size}.")
