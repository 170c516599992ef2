"""Networks that compute the same with other weights (Promise 6)."""

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


def scaled_filters(network: nn.Sequential) -> nn.Sequential:
    """Each filter scaled by a factor of its own, of a network `without_eps`."""
    for convolution, norm in ((network[0], network[1]), (network[3], network[4])):
        factors = torch.linspace(0.5, 3.0, len(convolution.weight)).double()
        with torch.no_grad():
            convolution.weight.mul_(factors.view(-1, 1, 1, 1))
            if convolution.bias is not None:
                convolution.bias.mul_(factors)
            norm.running_mean.mul_(factors)
            norm.running_var.mul_(factors**2)
    return network


def without_eps(network: nn.Sequential) -> nn.Sequential:
    """Sets the eps of each BatchNorm, which is one for all filters, to 0."""
    network[1].eps = network[4].eps = 0.0
    return network
