"""Batch normalisation whose scale is `1 + weight`, the normalisation of the paper's networks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReparameterizedBatchNorm2d(nn.Module):
    """Batch normalisation `(x - mean) / sqrt(var + eps) * (1 + weight) + bias`.

    With `weight` and `bias` both starting at 0 it begins as `torch.nn.BatchNorm2d`
    does. What differs is what pulls on it: weight decay draws the
    scale to 1 instead of 0, and clipping all parameters to a small range leaves the network
    working. The rows "weight decay 0.05" and "weight clipping" of the paper's table rely on both.

    The statistics live in an inner `BatchNorm2d`, so that
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, `torch.optim.swa_utils.update_bn`
    and everything else that looks for batch normalisation finds it. Whether batch or running
    statistics are used is decided by the mode of that inner module.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: share of the batch statistics in each update of the running ones.

    Shape:
        Input and output: `(N, C, H, W)`.

    Example:
        >>> norm = ReparameterizedBatchNorm2d(3)
        >>> norm(torch.rand(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
        >>> norm.weight.tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm2d(num_features, eps=eps, momentum=momentum, affine=False)
        self.weight = nn.Parameter(torch.zeros(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale and shift the channels of `x`.

        Args:
            x: activations `(N, C, H, W)`.

        Returns:
            Activations of the same shape.

        Raises:
            ValueError: if `x` does not have four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"Expected `x` to have 4 dimensions but got shape {tuple(x.shape)}.")
        norm = self.statistics
        if norm.training and (type(norm) is not nn.BatchNorm2d or norm.momentum is None):
            # A converted layer gathers its statistics from all processes, and without a momentum
            # the running statistics are a plain average: both are the inner module's business.
            return norm(x) * (1 + self.weight)[:, None, None] + self.bias[:, None, None]
        return self._fused(x, norm)

    def _fused(self, x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        """Do what the inner module does, with scale and shift, in a single kernel."""
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            1 + self.weight,
            self.bias,
            training=norm.training,
            momentum=norm.momentum or 0.0,
            eps=norm.eps,
        )

    def extra_repr(self) -> str:
        """Show the number of channels in `print(network)`."""
        return str(self.weight.numel())
