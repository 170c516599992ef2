"""Images turned by multiples of 90°, the self-supervision of Hendrycks et al. (2019)."""

import torch
from torch import Tensor


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Turns each image counter-clockwise.

    Args:
        images: `(N, C, S, S)`.
        turns: `(N,)`, multiples of 90°, 0 to 3.

    Returns:
        `(N, C, S, S)`.

    Raises:
        ValueError: If images are not square.

    Example:
        >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
        >>> rotate(image, torch.tensor([1])).flatten().tolist()
        [2, 4, 1, 3]
    """
    if images.shape[-2] != images.shape[-1]:
        raise ValueError(
            f"Expected square images to rotate but got {tuple(images.shape[-2:])} pixels."
        )
    turned = images
    for count in (1, 2, 3):
        chosen = (turns == count).view(-1, 1, 1, 1)
        turned = torch.where(chosen, images.rot90(count, (-2, -1)), turned)
    return turned
