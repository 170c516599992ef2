"""The paper's network: a ResNet-18 for images of 32x32 pixels."""

from torch import nn

from robust_flatness.networks.activations import Activation, make_activation
from robust_flatness.networks.basic_block import BasicBlock
from robust_flatness.networks.norms import Norm, make_norm
from robust_flatness.networks.residual_network import ResidualNetwork, check_positive


class ResNet18(ResidualNetwork):
    """ResNet-18 with a stem for small images: a 3x3 convolution of stride 1 and no max-pooling.

    Four stages of two blocks, of `width` times 1, 2, 4 and 8 channels, the last three with
    stride 2. As in the paper's code the stem, the 1x1 convolutions and the linear layer have
    biases and the 3x3 convolutions of the blocks have none: 11,174,922 parameters for 10 classes.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, used everywhere.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: probability of dropout in each block, 0.1 in the paper's row.

    Shape:
        Images `(N, in_channels, H, W)`, features `(N, 8 * width)`, logits
        `(N, num_classes)`.

    Raises:
        ValueError: if a size is below 1, or a name is unknown.

    Example:
        >>> import torch
        >>> network = ResNet18(num_classes=10, width=4)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> network.features(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int = 64,
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
    ) -> None:
        check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, padding=1),
            make_norm(norm, width),
            make_activation(activation),
        ]
        channels = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                out = width * 2**stage
                layers.append(
                    BasicBlock(
                        channels,
                        out,
                        stride=stride,
                        activation=activation,
                        norm=norm,
                        dropout=dropout,
                    )
                )
                channels = out
        super().__init__(nn.Sequential(*layers), num_classes, in_channels, channels)
