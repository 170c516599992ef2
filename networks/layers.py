"""Normalisation of the input by fixed channel statistics, as the first layer of a network."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


def channel_values(name: str, values: Any) -> list[float]:
    """Reads one number a channel.

    Args:
        name: the argument's name, for the message.
        values: a sequence, a tensor or an array, in any shape.

    Raises:
        ValueError: if it is something else.

    Example:
        >>> channel_values("mean", torch.tensor([[0.5]]))
        [0.5]
    """
    if isinstance(values, (property, cached_property)):
        raise ValueError(
            f"Expected `{name}` to be one number a channel but got a property of a class; take"
            f" that of an instance, as in `Digits().{name}`."
        )
    numbers = values.reshape(-1).tolist() if hasattr(values, "tolist") else values
    try:
        return [float(number) for number in numbers]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `{name}` to be one number a channel but got {values}."
        ) from error


class Normalize(nn.Module):
    """Map images to `(x - mean) / std` with one mean and one standard deviation a channel.

    As the network's first layer it lets attacks work on pixels in [0, 1], with `eps` in the
    units of pixels (paper, supplementary material, "whitening"). The statistics are buffers: they
    are saved with the weights and move with the network, and nothing trains them.

    Args:
        mean: mean of each channel, for pixels in [0, 1].
        std: standard deviation of each channel, above 0.

    Shape:
        Input and output: `(..., C, H, W)`.

    Raises:
        ValueError: if the lengths differ, if they are empty, if a `mean` is not finite, or if a
            `std` is not finite or not above 0.

    Example:
        >>> layer = Normalize(mean=[0.5], std=[0.25])
        >>> layer(torch.ones(1, 1, 1, 2))
        tensor([[[[2., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = channel_values("mean", mean), channel_values("std", std)
        if not mean or len(mean) != len(std):
            raise ValueError(
                "Expected `mean` and `std` to have one value a channel each"
                f" but got {len(mean)} and {len(std)} values."
            )
        # As tensors: what is finite and above 0 in float64 may not be so in the weights' precision.
        mean_tensor, std_tensor = torch.tensor(mean), torch.tensor(std)
        if not mean_tensor.isfinite().all():
            raise ValueError(f"Expected each value of `mean` to be finite but got {list(mean)}.")
        if not (std_tensor.isfinite() & (std_tensor > 0)).all():
            raise ValueError(
                f"Expected each value of `std` to be finite and > 0 but got {list(std)}."
            )
        self.register_buffer("mean", mean_tensor.view(-1, 1, 1))
        self.register_buffer("std", std_tensor.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of `x`.

        Args:
            x: images `(..., C, H, W)`.

        Returns:
            Normalised images of the same shape.

        Raises:
            ValueError: if `x` has another number of channels, which would silently broadcast.
        """
        channels = self.mean.shape[0]
        if x.dim() < 3 or x.shape[-3] != channels:
            raise ValueError(
                f"Expected images of shape (..., {channels}, H, W) but got shape {tuple(x.shape)}."
            )
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the statistics in `print(network)`."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
