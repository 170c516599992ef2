"""Networks in eval mode and images that the benchmarks attack."""

from functools import partial

import torch
from torch import Tensor, nn

from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import AT
from robust_flatness.networks import ResNet18, SmallResNet

Problem = tuple[nn.Module, Tensor, Tensor, float]
"""A network, images `(N, C, H, W)`, labels `(N,)`, and the radius of attacks."""


def resnet(batch: int, width: int) -> Problem:
    """`AT` on the paper's network, and random images of CIFAR's size."""
    images, labels = random_images(batch)
    return warmed(AT(partial(ResNet18, width=width)), images), images, labels, 8 / 255


def digits(batch: int) -> Problem:
    """`AT` on the network of the Digits preset, and its images."""
    chosen = [Digits().split_dataset("train")[i] for i in range(batch)]
    images, labels = torch.stack([image for image, _ in chosen]), [label for _, label in chosen]
    module = AT(SmallResNet, in_channels=1, mean=[0.3], std=[0.4])
    return warmed(module, images), images, torch.tensor(labels), 0.2


def random_images(count: int, channels: int = 3, side: int = 32) -> tuple[Tensor, Tensor]:
    """Random images `(count, channels, side, side)` in [0, 1] and labels of ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, side, side, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def warmed(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in eval mode with statistics of real activations, without which losses explode."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(images)
    return model.eval()
