"""Layers of the networks: input normalization, the paper's batch normalization, activations."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation: TypeAlias = Literal["relu", "silu", "gelu", "mish"]
"""Names of the activations that the paper compares."""

Norm: TypeAlias = Literal["reparameterized", "batch"]
"""Names of the normalization layers: the paper's, and PyTorch's."""


class Normalize(nn.Module):
    """Normalizes images to `(x - mean) / std` with one mean and one standard deviation per channel.

    As the first layer of the network it keeps attacks in pixel space: images are in [0, 1] and
    `eps` is in the units of pixels (paper, supplementary material, "whitening"). The statistics are
    buffers, which are saved with the weights and not trained.

    Args:
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, above 0.

    Shape:
        Input and output: `(..., C, H, W)`.

    Raises:
        ValueError: If the lengths differ or are 0, a `mean` is not finite, or a `std` is not finite
            or not above 0.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25])(torch.ones(1, 1, 1, 2))
        tensor([[[[2., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = channel_values("mean", mean), channel_values("std", std)
        if not mean or len(mean) != len(std):
            raise ValueError(
                "Expected `mean` and `std` to have one value per channel each"
                f" but got {len(mean)} and {len(std)} values."
            )
        # Values that are finite and above 0 in float64 may not be so in the tensors' precision.
        means, stds = torch.tensor(mean), torch.tensor(std)
        if not means.isfinite().all():
            raise ValueError(f"Expected each value of `mean` to be finite but got {mean}.")
        if not (stds.isfinite() & (stds > 0)).all():
            raise ValueError(f"Expected each value of `std` to be finite and > 0 but got {std}.")
        self.register_buffer("mean", means.view(-1, 1, 1))
        self.register_buffer("std", stds.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes images `(..., C, H, W)`.

        Raises:
            ValueError: If `x` has another number of channels, which would broadcast.
        """
        channels = len(self.mean)
        if x.dim() < 3 or x.shape[-3] != channels:
            raise ValueError(
                f"Expected images of shape (..., {channels}, H, W) but got shape {tuple(x.shape)}."
            )
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The statistics, for `print(network)`."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def channel_values(name: str, values: Any) -> list[float]:
    """Returns one number per channel as a list, from the argument `name` of any shape and type.

    Example:
        >>> channel_values("mean", torch.tensor([[0.5]]))
        [0.5]
    """
    if isinstance(values, (property, cached_property)):
        raise ValueError(
            f"Expected `{name}` to be one number per channel but got a property of a class; use"
            f" that of an instance, as in `Digits().{name}`."
        )
    numbers = values.reshape(-1).tolist() if hasattr(values, "tolist") else values
    try:
        return [float(number) for number in numbers]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `{name}` to be one number per channel but got {values}."
        ) from error


class ReparameterizedBatchNorm2d(nn.Module):
    """Batch normalization `(x - mean) / sqrt(var + eps) * (1 + weight) + bias`.

    With `weight` and `bias` initialized to 0 it starts as `torch.nn.BatchNorm2d` does, but weight
    decay draws the scale to 1 instead of 0, and the network still works if all parameters are
    clipped to a small range. The rows "weight decay 0.05" and "weight clipping" of the paper's
    table rely on both.

    The running statistics are in the inner `BatchNorm2d` `statistics`, for SyncBatchNorm,
    `torch.optim.swa_utils.update_bn` and other code that looks for batch normalization layers. Its
    training mode decides whether batch or running statistics are used.

    Args:
        num_features: Number of channels C.
        eps: Value added to the variance.
        momentum: Weight of the batch statistics in each update of the running statistics.

    Shape:
        Input and output: `(N, C, H, W)`.

    Example:
        >>> norm = ReparameterizedBatchNorm2d(3)
        >>> norm(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
        >>> norm.weight.tolist()
        [0.0, 0.0, 0.0]
    """

    # Added to `weight` in the forward pass. Measures that are relative to weights read it.
    weight_offset = 1.0

    # `weight` and the scale `1 + weight` while an attack runs, which computes it once.
    held_scale: tuple[Tensor, Tensor] | None = None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False)
        self.weight = nn.Parameter(torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes, scales and shifts activations `(N, C, H, W)`.

        Raises:
            ValueError: If `x` does not have four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"Expected `x` to have 4 dimensions but got shape {tuple(x.shape)}.")
        norm = self.statistics
        if norm.training and (type(norm) is not nn.BatchNorm2d or norm.momentum is None):
            # `SyncBatchNorm` reduces its statistics over the processes, and a momentum of `None`
            # means a cumulative average: the inner module does both.
            return norm(x) * (1 + self.weight)[:, None, None] + self.bias[:, None, None]
        # Otherwise normalization, scale and shift are one kernel. A weight that other code put in
        # place of the parameter, as `torch.func.functional_call` does, has another scale.
        held = self.held_scale
        scale = held[1] if held is not None and held[0] is self.weight else 1 + self.weight
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            scale,
            self.bias,
            training=norm.training,
            momentum=norm.momentum or 0.0,
            eps=norm.eps,
        )

    def extra_repr(self) -> str:
        """Returns the number of channels, which `print(network)` shows."""
        return str(self.weight.numel())


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    # The exact GELU, as in the paper's code; its text has the approximation x * sigmoid(1.702 x).
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
_NORMS: dict[str, type[nn.Module]] = {
    "reparameterized": ReparameterizedBatchNorm2d,
    "batch": nn.BatchNorm2d,
}


def make_activation(name: Activation) -> nn.Module:
    """Returns the activation called `name`.

    It works out of place, because a hook on the layer before it may keep that layer's output.

    Raises:
        ValueError: If `name` is not one of `"relu"`, `"silu"`, `"gelu"` and `"mish"`.

    Example:
        >>> make_activation("silu")
        SiLU()
    """
    if name not in _ACTIVATIONS:
        names = list(_ACTIVATIONS)
        raise ValueError(f"Expected `activation` to be one of {names} but got {name!r}.")
    return _ACTIVATIONS[name]()


def make_norm(name: Norm, num_features: int) -> nn.Module:
    """Returns the normalization layer called `name` for `num_features` channels.

    Raises:
        ValueError: If `name` is not `"reparameterized"` (scale `1 + weight`) or `"batch"`.

    Example:
        >>> type(make_norm("batch", 16)).__name__
        'BatchNorm2d'
    """
    if name not in _NORMS:
        raise ValueError(f"Expected `norm` to be one of {list(_NORMS)} but got {name!r}.")
    return _NORMS[name](num_features)
