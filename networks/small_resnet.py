"""A small residual network for the 8x8 images of handwritten digits."""

from torch import nn

from robust_flatness.networks.activations import Activation, make_activation
from robust_flatness.networks.basic_block import BasicBlock
from robust_flatness.networks.norms import Norm, make_norm
from robust_flatness.networks.residual_network import ResidualNetwork, check_positive


class SmallResNet(ResidualNetwork):
    """A 3x3 stem and three of ResNet-18's blocks, the last two with stride 2.

    Everything that the paper's measures meet in a ResNet-18 is there (stem bias, 1x1 shortcuts,
    normalisation before and after, linear layer) at a cost that a laptop pays in milliseconds.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the stem and the first block; the others have 2 and 4 times as many.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, used everywhere.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: probability of dropout in each block, 0.1 in the paper's row.

    Shape:
        Images `(N, in_channels, H, W)`, features `(N, 4 * width)`, logits
        `(N, num_classes)`.

    Raises:
        ValueError: if a size is below 1, or a name is unknown.

    Example:
        >>> import torch
        >>> SmallResNet(num_classes=10)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        *,
        width: int = 16,
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
    ) -> None:
        check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
        body = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            make_norm(norm, width),
            make_activation(activation),
            BasicBlock(width, width, activation=activation, norm=norm, dropout=dropout),
            BasicBlock(
                width, 2 * width, stride=2, activation=activation, norm=norm, dropout=dropout
            ),
            BasicBlock(
                2 * width, 4 * width, stride=2, activation=activation, norm=norm, dropout=dropout
            ),
        )
        super().__init__(body, num_classes, in_channels, 4 * width)
