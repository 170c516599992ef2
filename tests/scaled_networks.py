"""A network that computes the same with other weights (Promise 6)."""

import torch
from torch import nn


def scaled(network: nn.Sequential, factor: float) -> nn.Sequential:
    """Every convolution scaled, with the BatchNorm behind it made to undo that."""
    for convolution, norm in ((network[0], network[1]), (network[3], network[4])):
        with torch.no_grad():
            convolution.weight.mul_(factor)
            if convolution.bias is not None:
                convolution.bias.mul_(factor)
            norm.running_mean.mul_(factor)
            norm.running_var.mul_(factor**2)
        norm.eps *= factor**2
    return network
