"""Random architectures on images of 8x8 pixels, in the variety of other people's projects."""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Draw = random.Random
PLAIN_LAYERS = (nn.Conv2d, nn.Linear)


def random_network(draw: Draw) -> tuple[nn.Module, int, int]:
    """Draws a network; its initial weights depend on the draw too.

    Args:
        draw: Source of randomness.

    Returns:
        The network, and its numbers of input channels and classes.
    """
    torch.manual_seed(draw.getrandbits(32))
    channels, classes = draw.choice([1, 3]), draw.randint(2, 10)
    kinds: list[Callable[[Draw, int, int], nn.Module]] = [convolutional] * 4
    kinds += [perceptron, patches, rows, tied, prototypes]
    network = draw.choice(kinds)(draw, channels, classes)
    if draw.random() < 0.3:
        network = draw.choice([Observed, Noisy, Lazy, Temperature])(network)
    if draw.random() < 0.2:
        freeze_some(draw, network)
    # Lazy layers get their shapes, and running statistics their first values.
    network(torch.rand(4, channels, 8, 8))
    return network, channels, classes


def convolutional(draw: Draw, channels: int, classes: int) -> nn.Module:
    """Blocks of convolution, normalization, activation and dropout, and a head."""
    layers: list[nn.Module] = []
    width = channels
    for _ in range(draw.randint(1, 3)):
        out = draw.choice([2, 4, 6, 8])
        block = nn.Sequential(
            convolution(draw, width, out), normalization(draw, out), activation(draw), dropout(draw)
        )
        layers.append(Residual(block) if out == width and draw.random() < 0.7 else block)
        width = out
    layers += draw.choice(
        [
            [nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrapped(draw, nn.Linear(width, classes))],
            [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.LazyLinear(classes)],
            [nn.Flatten(), nn.LazyLinear(12), activation(draw), nn.Linear(12, classes, bias=False)],
            [nn.Conv2d(width, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        ]
    )
    return nn.Sequential(*layers)


def convolution(draw: Draw, width: int, out: int) -> nn.Module:
    """An ordinary, strided, dilated, grouped, transposed or wrapped convolution."""
    bias = draw.random() < 0.5
    groups = 2 if width % 2 == 0 and draw.random() < 0.3 else 1
    modes = {"padding_mode": draw.choice(["zeros", "reflect", "circular"])}
    return draw.choice(
        [
            lambda: wrapped(draw, nn.Conv2d(width, out, 3, padding=1, bias=bias, **modes)),
            lambda: wrapped(draw, nn.Conv2d(width, out, 1, bias=bias)),
            lambda: nn.Conv2d(width, out, 3, padding=2, dilation=2, groups=groups, bias=bias),
            lambda: nn.Conv2d(width, out, 1, stride=draw.choice([1, 2]), bias=bias),
            lambda: nn.ConvTranspose2d(width, out, 3, padding=1, bias=bias),
            lambda: nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, out, 1)
            ),
            lambda: nn.LazyConv2d(out, 3, padding=1),
        ]
    )()


def wrapped(draw: Draw, layer: nn.Module) -> nn.Module:
    """The layer as it is, or with spectral or weight norm, by hooks or parametrizations."""
    wrappers: list[Callable[[nn.Module], nn.Module]] = [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ]
    return draw.choice(wrappers)(layer) if draw.random() < 0.25 else layer


def normalization(draw: Draw, width: int) -> nn.Module:
    """Batch, group, layer, instance or local response normalization, or none."""
    return draw.choice(
        [
            lambda: nn.BatchNorm2d(width),
            lambda: nn.BatchNorm2d(width, affine=False, momentum=None),
            lambda: nn.BatchNorm2d(width, track_running_stats=False),
            lambda: nn.LazyBatchNorm2d(),
            lambda: nn.GroupNorm(2, width),
            lambda: nn.GroupNorm(1, width),
            lambda: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
            lambda: nn.LocalResponseNorm(2),
            nn.Identity,
        ]
    )()


def activation(draw: Draw) -> nn.Module:
    """Among them one in place, one with a parameter, and one that is random in training."""
    return draw.choice(
        [
            lambda: nn.ReLU(inplace=True),
            *(nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.ELU, nn.PReLU, nn.RReLU),
        ]
    )()


def dropout(draw: Draw) -> nn.Module:
    """Dropout of some kind, or none."""
    kinds = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]
    return draw.choice(kinds)(0.2) if draw.random() < 0.4 else nn.Identity()


def perceptron(draw: Draw, channels: int, classes: int) -> nn.Module:
    """Linear layers with LayerNorm or BatchNorm1d."""
    width = draw.choice([8, 16])
    norm = draw.choice([nn.LayerNorm, nn.BatchNorm1d])(width)
    first = wrapped(draw, nn.Linear(64 * channels, width))
    head = wrapped(draw, nn.Linear(width, classes))
    return nn.Sequential(nn.Flatten(), first, norm, activation(draw), dropout(draw), head)


def patches(draw: Draw, channels: int, classes: int) -> nn.Module:
    """A small transformer on patches of 4x4 pixels."""
    return Transformer(channels, classes, layers=draw.randint(1, 2), norm_first=draw.random() < 0.5)


def rows(draw: Draw, channels: int, classes: int) -> nn.Module:
    """A recurrent network that reads an image row by row."""
    return Recurrent(draw.choice([nn.GRU, nn.LSTM, nn.RNN]), channels, classes)


def tied(draw: Draw, channels: int, classes: int) -> nn.Module:
    """A module used twice, or two modules that share one weight."""
    inner, other = nn.Linear(16, 16), nn.Linear(16, 16, bias=draw.random() < 0.5)
    if draw.random() < 0.5:
        other = inner
    else:
        other.weight = inner.weight
    first, head = nn.Linear(64 * channels, 16), nn.Linear(16, classes)
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), inner, nn.Tanh(), other, nn.Tanh(), head)


def prototypes(draw: Draw, channels: int, classes: int) -> nn.Module:
    """A head whose weight is first the parameter of a module that is no layer."""
    return Prototypes(channels, classes)


def freeze_some(draw: Draw, network: nn.Module) -> None:
    """Switches the gradients of one layer off, but never of the only one."""
    layers = [module for module in network.modules() if isinstance(module, PLAIN_LAYERS)]
    lazy = any(isinstance(p, nn.UninitializedParameter) for p in network.parameters())
    if len(layers) > 1 and not lazy:
        draw.choice(layers[:-1]).requires_grad_(False)


class Residual(nn.Module):
    """Adds its input if the shape is kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, images: Tensor) -> Tensor:
        """Block plus identity."""
        found = self.block(images)
        return found + images if found.shape == images.shape else found


class Transformer(nn.Module):
    """Encoder layers, whose fast path in eval mode skips the modules' forward."""

    def __init__(self, channels: int, classes: int, *, layers: int, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, 8, 4, stride=4)
        self.position = nn.Parameter(0.1 * torch.randn(4, 8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
            for _ in range(layers)
        )
        self.head = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Mean token to logits."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(1))


class Recurrent(nn.Module):
    """One recurrent layer over the rows of an image."""

    def __init__(self, kind: type[nn.RNNBase], channels: int, classes: int) -> None:
        super().__init__()
        self.rnn, self.head = kind(8 * channels, 8, batch_first=True), nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Last state to logits."""
        return self.head(self.rnn(images.transpose(1, 2).flatten(2))[0][:, -1])


class Prototypes(nn.Module):
    """Logits are products with prototypes, which a linear layer shares."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(0.1 * torch.randn(classes, 16))
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 16), nn.Tanh())
        self.head = nn.Linear(16, classes, bias=False)
        self.head.weight = self.prototypes

    def forward(self, images: Tensor) -> Tensor:
        """Products with the prototypes."""
        return self.head(self.body(images))


class Wrapper(nn.Module):
    """Keeps the network that it wraps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Observed(Wrapper):
    """Moves a buffer in every forward, in eval mode too, as observers of ranges do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("top", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits scaled by the largest seen so far."""
        logits = self.network(images)
        self.top.copy_(torch.maximum(self.top, logits.detach().abs().max()))
        self.calls += 1
        return logits / (1 + 0.01 * self.top)


class Noisy(Wrapper):
    """Draws from Python's, NumPy's and torch's global generators in training mode."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits with noise in training."""
        logits = self.network(images)
        drawn = random.random() + np.random.rand() + torch.rand(())
        return logits * (1 + 0.01 * drawn) if self.training else logits


class Lazy(Wrapper):
    """Makes a buffer in its first forward, and a new one if the batch has another size."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("ramp", None, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits with a small ramp over the batch, which is the same for each size."""
        logits = self.network(images)
        if self.ramp is None or len(self.ramp) != len(images):
            self.ramp = torch.zeros(len(images), 1)
        return logits + self.ramp


class Temperature(Wrapper):
    """Has a scalar parameter, and one that no forward uses."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.temperature = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits over the temperature."""
        return self.network(images) / self.temperature
