"""What is trained on and measured on: images in [0, 1], their splits, and their normalisation.

A datamodule of one's own derives from `RobustDataModule`, sets `num_classes`,
`in_channels`, `mean` and `std`, and returns `ResidentImages` from `sources`.
"""

from robust_flatness.datamodules.augment import random_flip_and_crop
from robust_flatness.datamodules.autoaugment import autoaugment, cutout
from robust_flatness.datamodules.base import RobustDataModule
from robust_flatness.datamodules.cifar import CIFAR10, CIFAR100
from robust_flatness.datamodules.digits import Digits
from robust_flatness.datamodules.image_folder import ImageFolder
from robust_flatness.datamodules.images import LabelledImages
from robust_flatness.datamodules.resident import ResidentImages

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "ImageFolder",
    "LabelledImages",
    "ResidentImages",
    "RobustDataModule",
    "autoaugment",
    "cutout",
    "random_flip_and_crop",
]
