"""A network as AutoAttack's package needs it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_flatness.functional.evaluation import logits_function


class AttackedNetwork:
    """Maps images to float32 logits that are finite, with gradients that are finite.

    Args:
        network: Maps images to logits, in any precision.
        images: Give the type of what a network without weights expects.
        extra_class: Whether there is one class more, which is predicted for an example whose
            logits are not finite; without it such logits raise `FloatingPointError`. For other
            examples its logit is so low that attacks have no use for it.

    Example:
        >>> images = torch.tensor([[0.5, 0.2], [0.1, 0.3]])
        >>> network = AttackedNetwork(lambda x: x.log() / (x > 0.15), images, extra_class=True)
        >>> network(images).argmax(1)
        tensor([0, 2])
    """

    def __init__(self, network: nn.Module, images: Tensor, *, extra_class: bool = False) -> None:
        self._logits, self._extra_class = logits_function(network, images), extra_class

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `(N, K)`, or `(N, K + 1)` with the extra class, float32."""
        if images.requires_grad:
            images = images.view_as(images)
            # NaN in a gradient would turn pixels into NaN, which every network misclassifies.
            images.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        logits = self._logits(images)
        finite = logits.isfinite().all(1, keepdim=True)
        if logits.dtype == torch.float64:
            # Differences are what counts, and they fit into float32.
            logits = logits - logits.detach().amax(1, keepdim=True)
        logits = logits.float()
        if self._extra_class:
            logits = torch.where(finite, logits, 0.0)
            lowest = logits.detach().amin(1, keepdim=True) - 1e6
            return torch.cat([logits, torch.where(finite, lowest, 1.0)], 1)
        if not finite.all():
            raise FloatingPointError("logits are not finite")
        return logits


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Keeps FAB, which calls `backward`, from filling the gradients of the parameters."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
