"""Architectures that map images in [0, 1] to logits, and their layers.

Every network has a constructor `(num_classes, in_channels, *, ...)`, `features(images)`, which
returns the pooled activations, and `forward(images)`, the linear classifier on them. `Normalize`
comes before the network, as a layer of its own.
"""

from robust_flatness.networks.layers import (
    Activation,
    Norm,
    Normalize,
    ReparameterizedBatchNorm2d,
    make_activation,
    make_norm,
)
from robust_flatness.networks.resnet import (
    ResidualNetwork,
    ResNet,
    ResNet18,
    RotationHead,
    SmallResNet,
    WideResNet,
    WideResNet28x10,
    WideResNet34x10,
    channels_last,
)
from robust_flatness.networks.user_network import UserNetwork, build_network

__all__ = [
    "Activation",
    "Norm",
    "Normalize",
    "ReparameterizedBatchNorm2d",
    "ResNet",
    "ResNet18",
    "ResidualNetwork",
    "RotationHead",
    "SmallResNet",
    "UserNetwork",
    "WideResNet",
    "WideResNet28x10",
    "WideResNet34x10",
    "build_network",
    "channels_last",
    "make_activation",
    "make_norm",
]
