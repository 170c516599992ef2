"""Architectures that map images in [0, 1] to logits, and the layers that the paper gives them.

Every network begins `(num_classes, in_channels, *, ...)` and has `features(images)`, the pooled
activations, and `forward(images)`, the linear classifier on them. Normalisation of the input is
a layer of its own, `Normalize`, put before any of them.
"""

from robust_flatness.networks.activations import Activation, make_activation
from robust_flatness.networks.layers import Normalize
from robust_flatness.networks.memory_format import channels_last
from robust_flatness.networks.norms import Norm, make_norm
from robust_flatness.networks.reparameterized_batch_norm import ReparameterizedBatchNorm2d
from robust_flatness.networks.residual_network import ResidualNetwork
from robust_flatness.networks.resnet import ResNet18
from robust_flatness.networks.rotation_head import RotationHead
from robust_flatness.networks.small_resnet import SmallResNet
from robust_flatness.networks.user_network import UserNetwork, build_network
from robust_flatness.networks.wide_resnet import WideResNet, WideResNet28x10, WideResNet34x10

__all__ = [
    "Activation",
    "Norm",
    "Normalize",
    "ReparameterizedBatchNorm2d",
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
