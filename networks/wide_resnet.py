"""WideResNets, the larger networks of the robustness literature."""

from itertools import pairwise

from torch import nn

from robust_flatness.networks.activations import Activation, make_activation
from robust_flatness.networks.norms import Norm, make_norm
from robust_flatness.networks.preactivation_block import PreactivationBlock
from robust_flatness.networks.residual_network import ResidualNetwork, check_positive


class WideResNet(ResidualNetwork):
    """Pre-activation WideResNet (Zagoruyko and Komodakis, 2016) for images of 32x32 pixels.

    A 3x3 stem of 16 channels and three stages of `(depth - 4) / 6` blocks, of 16, 32 and 64
    channels times `widen_factor`, the last two with stride 2. For 10 classes WideResNet-28-10
    has 36,479,194 parameters and WideResNet-34-10, the one of TRADES, 46,160,474.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        depth: number of layers, 4 more than a multiple of 6.
        widen_factor: factor on the channels of the stages.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, used everywhere.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: probability of dropout in each block, 0.1 in the paper's row.

    Shape:
        Images `(N, in_channels, H, W)`, features `(N, 64 * widen_factor)`, logits
        `(N, num_classes)`.

    Raises:
        ValueError: if a size is below 1, `depth` is no such number, or a name is unknown.

    Example:
        >>> import torch
        >>> network = WideResNet(num_classes=10, depth=10, widen_factor=1)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int = 28,
        widen_factor: int = 10,
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
    ) -> None:
        check_positive(num_classes=num_classes, in_channels=in_channels, widen_factor=widen_factor)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"Expected `depth` to be one of 10, 16, 22, 28, ... but got {depth}.")
        widths = [16, *(16 * 2**stage * widen_factor for stage in range(3))]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)]
        for stage, (before, width) in enumerate(pairwise(widths)):
            for block in range((depth - 4) // 6):
                layers.append(
                    PreactivationBlock(
                        width if block else before,
                        width,
                        stride=2 if stage > 0 and block == 0 else 1,
                        activation=activation,
                        norm=norm,
                        dropout=dropout,
                    )
                )
        layers += [make_norm(norm, widths[-1]), make_activation(activation)]
        super().__init__(nn.Sequential(*layers), num_classes, in_channels, widths[-1])


class WideResNet28x10(WideResNet):
    """WideResNet of 28 layers and widen factor 10, see `WideResNet`.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, used everywhere.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: probability of dropout in each block, 0.1 in the paper's row.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = WideResNet28x10(num_classes=10)
        >>> sum(p.numel() for p in network.parameters())
        36479194
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            num_classes, in_channels, activation=activation, norm=norm, dropout=dropout
        )


class WideResNet34x10(WideResNet):
    """WideResNet of 34 layers and widen factor 10, see `WideResNet`.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, used everywhere.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: probability of dropout in each block, 0.1 in the paper's row.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = WideResNet34x10(num_classes=10)
        >>> sum(p.numel() for p in network.parameters())
        46160474
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            num_classes, in_channels, depth=34, activation=activation, norm=norm, dropout=dropout
        )
