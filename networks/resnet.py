"""Residual networks: the paper's ResNet-18, a small one for Digits, and WideResNets."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robust_flatness.networks.layers import Activation, Norm, make_activation, make_norm

# The weight gradients of strided 1x1 convolutions with fewer than 7 input channels in
# channels_last write outside of their memory in oneDNN on some CPUs (PyTorch 2.14).
SAFE_CHANNELS = 8


class BasicBlock(nn.Module):
    """The block of ResNets: `act(norm2(conv2(act(norm1(conv1(x))))) + shortcut(x))`.

    The shortcut is the identity, or a 1x1 convolution and a normalization if the shape changes. As
    in the paper's code the 1x1 convolution has a bias and the 3x3 convolutions have none, and
    dropout comes after the second convolution. `(N, in_channels, H, W)` becomes
    `(N, out_channels, ceil(H / stride), ceil(W / stride))`.
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
        """Returns the block's output for activations `(N, in_channels, H, W)`."""
        out = self.activation(self.norm1(self.conv1(x)))
        out = self.norm2(self.dropout(self.conv2(out)))
        return self.activation(out + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """The block of WideResNets: normalization and activation come before each 3x3 convolution.

    The shortcut is the identity, or a 1x1 convolution of the activated input if the shape changes.
    No convolution has a bias. Dropout comes before the second convolution, as in Zagoruyko and
    Komodakis. Shapes are those of `BasicBlock`.
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
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = make_norm(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output for activations `(N, in_channels, H, W)`."""
        activated = self.activation(self.norm1(x))
        hidden = self.activation(self.norm2(self.conv1(activated)))
        out: Tensor = self.conv2(self.dropout(hidden))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class ResidualNetwork(nn.Module):
    """A convolutional body, global average pooling, and a linear classifier.

    As in the paper's code, weights have He's normal initialization for ReLU, whatever the
    activation is, with `fan_out` for convolutions and `fan_in` for the linear layer; biases are 0.

    Args:
        body: Maps images `(N, in_channels, H, W)` to activations `(N, num_features, H', W')`.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        num_features: Channels of the output of `body`.

    Shape:
        Images `(N, in_channels, H, W)`, logits `(N, num_classes)`.

    Raises:
        ValueError: If `num_classes` or `in_channels` is below 1.

    Example:
        >>> network = ResidualNetwork(nn.Conv2d(1, 5, 3), 10, in_channels=1, num_features=5)
        >>> network(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, body: nn.Module, num_classes: int, in_channels: int, num_features: int
    ) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, in_channels=in_channels)
        self.in_channels = in_channels
        self.num_features = num_features
        self.body = body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(num_features, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan: Any = "fan_out" if isinstance(module, nn.Conv2d) else "fan_in"
                nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Returns the pooled features `(N, num_features)` of images `(N, in_channels, H, W)`.

        Heads that share the body, such as the one of self-supervision, use them.

        Raises:
            ValueError: If `x` has another number of dimensions or of channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"Expected images of shape (N, {self.in_channels}, H, W)"
                f" but got shape {tuple(x.shape)}."
            )
        features: Tensor = self.pool(self.body(x)).flatten(1)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(N, num_classes)` of images `(N, in_channels, H, W)`."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class ResNet(ResidualNetwork):
    """ResNet with a stem for small images: a 3x3 convolution of stride 1 and no max-pooling.

    Each stage has twice the channels of the one before; all but the first have stride 2. As in the
    paper's code the stem, the 1x1 convolutions and the linear layer have biases and the 3x3
    convolutions of the blocks have none.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        width: Channels of the stem and of the first stage.
        blocks: Number of blocks of each stage.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, for all layers.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: Probability of dropout in each block, 0.1 in the paper's row.
        preactivation: Whether blocks are those of WideResNets, with normalization and activation
            after the last stage instead of the stem, whose convolution has no bias: the PreAct
            ResNet-18 of Rice et al. (2020) with `norm="batch"`.

    Shape:
        Images `(N, in_channels, H, W)`, features `(N, width * 2 ** (len(blocks) - 1))`, logits
        `(N, num_classes)`.

    Raises:
        ValueError: If a size is below 1 or a name is unknown.

    Example:
        >>> ResNet(num_classes=10, width=4, blocks=[1, 1]).features(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        activation: Activation = "relu",
        norm: Norm = "reparameterized",
        dropout: float = 0.0,
        preactivation: bool = False,
    ) -> None:
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        _check_positive(**sizes, blocks=min(blocks, default=0))
        widths = [width, *(width * 2**stage for stage in range(len(blocks)))]
        layers = {"activation": activation, "norm": norm, "dropout": dropout}
        stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=not preactivation)
        block = PreactivationBlock if preactivation else BasicBlock
        stages = _stages(block, widths, blocks, **layers)
        end = make_norm(norm, widths[-1] if preactivation else width), make_activation(activation)
        body = nn.Sequential(stem, *((*stages, *end) if preactivation else (*end, *stages)))
        super().__init__(body, num_classes, in_channels, widths[-1])


class ResNet18(ResNet):
    """The paper's `ResNet`, with four stages of two blocks: 11,174,922 parameters for 10 classes.

    Args:
        width: Channels of the stem and of the first stage.
        **kwargs: `activation`, `norm`, `dropout` and `preactivation` of `ResNet`.

    Example:
        >>> ResNet18(num_classes=10, width=4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, width: int = 64, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, in_channels, width=width, blocks=(2, 2, 2, 2), **kwargs)


class SmallResNet(ResNet):
    """A small `ResNet` for 8x8 images, with three stages of one block.

    It has all that the measures meet in a ResNet-18 (a bias in the stem, 1x1 shortcuts, both kinds
    of normalization, a linear layer), at a cost of milliseconds on a laptop.

    Args:
        width: Channels of the stem and of the first stage.
        **kwargs: `activation`, `norm` and `dropout` of `ResNet`.

    Example:
        >>> SmallResNet(num_classes=10)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, *, width: int = 16, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, in_channels, width=width, blocks=(1, 1, 1), **kwargs)


class WideResNet(ResidualNetwork):
    """Pre-activation WideResNet (Zagoruyko and Komodakis, 2016) for images of 32x32 pixels.

    A 3x3 stem of 16 channels and three stages of `(depth - 4) / 6` blocks, of 16, 32 and 64
    channels times `widen_factor`, the last two with stride 2.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depth: Number of layers, 4 more than a multiple of 6.
        widen_factor: Factor on the channels of the stages.
        activation: `"relu"`, `"silu"`, `"gelu"` or `"mish"`, for all layers.
        norm: `"reparameterized"` (the paper's, scale `1 + weight`) or `"batch"`.
        dropout: Probability of dropout in each block.

    Shape:
        Images `(N, in_channels, H, W)`, features `(N, 64 * widen_factor)`, logits
        `(N, num_classes)`.

    Raises:
        ValueError: If a size is below 1, `depth` is another number, or a name is unknown.

    Example:
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
        _check_positive(num_classes=num_classes, in_channels=in_channels, widen_factor=widen_factor)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"Expected `depth` to be one of 10, 16, 22, 28, ... but got {depth}.")
        widths = [16, *(16 * 2**stage * widen_factor for stage in range(3))]
        layers = {"activation": activation, "norm": norm, "dropout": dropout}
        body = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            *_stages(PreactivationBlock, widths, [(depth - 4) // 6] * 3, **layers),
            make_norm(norm, widths[-1]),
            make_activation(activation),
        )
        super().__init__(body, num_classes, in_channels, widths[-1])


class WideResNet28x10(WideResNet):
    """`WideResNet` of 28 layers and widen factor 10: 36,479,194 parameters for 10 classes."""

    def __init__(self, num_classes: int, in_channels: int = 3, **kwargs: Any) -> None:
        super().__init__(num_classes, in_channels, depth=28, widen_factor=10, **kwargs)


class WideResNet34x10(WideResNet):
    """`WideResNet` of 34 layers and widen factor 10, TRADES': 46,160,474 parameters."""

    def __init__(self, num_classes: int, in_channels: int = 3, **kwargs: Any) -> None:
        super().__init__(num_classes, in_channels, depth=34, widen_factor=10, **kwargs)


class RotationHead(nn.Module):
    """The classifier of self-supervision, which predicts by how many times 90° an image is rotated.

    As in the paper's code: a linear layer, ReLU, batch normalization, a linear layer.

    Args:
        num_features: Number of features.
        hidden: Units of the hidden layer.

    Shape:
        Features `(N, num_features)`, logits `(N, 4)`.

    Example:
        >>> RotationHead(8)(torch.rand(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, num_features: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, hidden), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, 4)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits `(N, 4)` of features `(N, num_features)`."""
        logits: Tensor = self.layers(features)
        return logits


def channels_last(network: nn.Module) -> nn.Module:
    """Converts the weights to channels_last if the network is this package's and wide enough.

    This is faster on GPUs in bfloat16, and on CPUs for small images. Networks with layers of other
    code keep their memory format, because `view` in their `forward` may not support the other one.

    Args:
        network: Changed in place.

    Returns:
        The network.

    Example:
        >>> from robust_flatness.networks import SmallResNet, channels_last
        >>> networks = [channels_last(SmallResNet(10, 3, width=width)) for width in (4, 8)]
        >>> [network.body[0].weight.is_contiguous() for network in networks]
        [True, False]
    """
    layers = list(network.modules())
    own = isinstance(network, ResidualNetwork) and all(
        type(layer).__module__.startswith(("torch.nn.", "robust_flatness.networks."))
        for layer in layers
    )
    narrow = any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride != (1, 1)
        and layer.in_channels < SAFE_CHANNELS
        for layer in layers
    )
    if own and not narrow:
        network.to(memory_format=torch.channels_last)
    return network


def _stages(
    block: type[nn.Module], widths: Sequence[int], counts: Sequence[int], **layers: Any
) -> Iterator[nn.Module]:
    """Yields the blocks of all stages; `widths` begins with the channels of the input."""
    for stage, count in enumerate(counts):
        yield block(*widths[stage : stage + 2], stride=2 if stage else 1, **layers)
        for _ in range(count - 1):
            yield block(widths[stage + 1], widths[stage + 1], **layers)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Expected `{name}` to be >= 1 but got {size}.")
