"""He's initialisation as in the paper's networks."""

from torch import nn


def initialize(network: nn.Module) -> None:
    """Draw all convolution and linear weights of `network` anew, and set their biases to 0.

    Weights are normal with He's variance for ReLU, for every activation as in the paper:
    `2 / fan_out` for convolutions, `2 / fan_in` for linear layers. Normalisation layers keep
    what they begin with. The draws come from PyTorch's global generator.

    Args:
        network: any module, changed in place.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> initialize(layer)
        >>> layer.bias.tolist()
        [0.0, 0.0]
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
