"""Images to train and to measure on: data sets in [0, 1], their splits and their augmentation.

A datamodule of your own derives from `RobustDataModule`, sets `num_classes` and `in_channels`, and
returns `ResidentImages` from `sources`.
"""

from robust_flatness.datamodules.augmentation import autoaugment, cutout, random_flip_and_crop
from robust_flatness.datamodules.base import RobustDataModule
from robust_flatness.datamodules.cifar import CIFAR10, CIFAR100
from robust_flatness.datamodules.digits import Digits
from robust_flatness.datamodules.image_folder import ImageFolder
from robust_flatness.datamodules.images import LabeledImages, ResidentImages

LabelledImages = LabeledImages  # the name in version 0.1

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Digits",
    "ImageFolder",
    "LabeledImages",
    "LabelledImages",
    "ResidentImages",
    "RobustDataModule",
    "autoaugment",
    "cutout",
    "random_flip_and_crop",
]
