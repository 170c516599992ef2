"""The residual block of the WideResNets."""

from torch import Tensor, nn

from robust_flatness.networks.activations import Activation, make_activation
from robust_flatness.networks.norms import Norm, make_norm


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each after its normalisation and activation, beside a shortcut.

    The shortcut is the identity, or a 1x1 convolution of the activated input where the number of
    channels changes. No convolution has a bias.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        activation: name of the activation, see `~robust_flatness.networks.make_activation`.
        norm: name of the normalisation, see `~robust_flatness.networks.make_norm`.
        dropout: probability of dropout before the second convolution (Zagoruyko and Komodakis).

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, out_channels, ceil(H / stride),
        ceil(W / stride))`.

    Raises:
        ValueError: if the shape changes by the stride alone, which the shortcut cannot follow.

    Example:
        >>> import torch
        >>> PreactivationBlock(4, 8, stride=2)(torch.rand(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if stride != 1 and in_channels == out_channels:
            raise ValueError(
                f"Expected `stride` to be 1 where the channels stay {in_channels} but got {stride}."
            )
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = make_norm(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to activations `(N, in_channels, H, W)`."""
        activated = self.activation(self.norm1(x))
        hidden = self.activation(self.norm2(self.conv1(activated)))
        out: Tensor = self.conv2(self.dropout(hidden))
        return out + (x if self.shortcut is None else self.shortcut(activated))
