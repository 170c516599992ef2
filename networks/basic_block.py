"""The residual block of the ResNets."""

from torch import Tensor, nn

from robust_flatness.networks.activations import Activation, make_activation
from robust_flatness.networks.norms import Norm, make_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    The output is `act(norm2(conv2(act(norm1(conv1(x))))) + shortcut(x))`.

    The shortcut is the identity, or a 1x1 convolution and a normalisation where the shape changes.
    As in the paper's code the 1x1 convolution has a bias and the 3x3 convolutions have none.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut.
        activation: name of the activation, see `~robust_flatness.networks.make_activation`.
        norm: name of the normalisation, see `~robust_flatness.networks.make_norm`.
        dropout: probability of dropout after the second convolution, where the paper's code has it.

    Shape:
        Input `(N, in_channels, H, W)`, output `(N, out_channels, ceil(H / stride),
        ceil(W / stride))`.

    Example:
        >>> import torch
        >>> BasicBlock(4, 8, stride=2)(torch.rand(2, 4, 8, 8)).shape
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
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = make_norm(norm, out_channels)
        self.activation = make_activation(activation)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride), make_norm(norm, out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to activations `(N, in_channels, H, W)`."""
        out = self.activation(self.norm1(self.conv1(x)))
        out = self.norm2(self.dropout(self.conv2(out)))
        return self.activation(out + self.shortcut(x))
