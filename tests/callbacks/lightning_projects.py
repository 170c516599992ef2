"""Small Lightning projects that the callbacks train adversarially."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from networks_for_tests import tiny_network
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet
from trainers import loader

# Exact in float32, as which modules keep them.
MEAN, STD = [0.5, 0.4375, 0.375], [0.25, 0.1875, 0.3125]


def tiny(seed=0):
    return tiny_network(seed=seed)


def residual():
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    # The last two stages have most of the weights.
    network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(128, 10)
    return network


def transformer():
    return VisionTransformer(8, 4, 1, 2, hidden_dim=8, mlp_dim=16, num_classes=10)


class Project(LightningModule):
    """Cross-entropy of any network, in two lines."""

    def __init__(self, build=tiny, lr=0.1, optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.lr, self.optimizer = build(), lr, optimizer

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


class CommandLineProject(Project):
    """A project whose arguments are of simple types."""

    def __init__(self, lr: float = 0.1):
        super().__init__(lr=lr)


class CommandLineData(LightningDataModule):
    """Its data."""

    def train_dataloader(self):
        return loader(16)


def normalised(images):
    mean, std = (torch.tensor(v, dtype=images.dtype).view(3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def classifier(images=192, classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(images, classes))
