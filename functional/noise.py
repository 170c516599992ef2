"""Random numbers that belong to an example or a direction, not to a machine or a batch."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]

Start = Literal["paper", "uniform", "gaussian", "zero"]


def keyed_generator(
    seed: int, *key: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator of its own for each key.

    Args:
        seed: The measure's or the run's seed.
        key: What the numbers are for, say `("start", example index, restart)`.
        device: Where they are drawn; measures draw on the CPU, so that every machine agrees.

    Returns:
        A generator that gives the same numbers whatever was drawn before.

    Example:
        >>> first = torch.rand(1, generator=keyed_generator(0, "a", 3))
        >>> first == torch.rand(1, generator=keyed_generator(0, "a", 3))
        tensor([True])
        >>> first == torch.rand(1, generator=keyed_generator(0, "a", 4))
        tensor([False])
    """
    return torch.Generator(device).manual_seed(keyed_seed(seed, *key))


def keyed_seed(seed: int, *key: int | str) -> int:
    """A seed of its own for each key, where a generator cannot be handed over.

    Args:
        seed: The measure's or the run's seed.
        key: What the numbers are for.

    Example:
        >>> keyed_seed(0, "a", 3) == keyed_seed(0, "a", 3), keyed_seed(0, "a", 3) < 2**63
        (True, True)
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    # manual_seed takes 64 bits, but a sign bit would make it negative.
    return int.from_bytes(digest, "big") >> 1


def per_example_norm(values: Tensor, norm: Norm) -> Tensor:
    """The norm of each example, shaped to broadcast against `values`.

    Args:
        values: `(N, ...)`.
        norm: `linf` or `l2`.

    Returns:
        `(N, 1, ...)`.

    Example:
        >>> per_example_norm(torch.tensor([[3.0, -4.0]]), "l2")
        tensor([[5.]])
    """
    order = torch.inf if norm == "linf" else 2
    flat = torch.linalg.vector_norm(values.flatten(1), ord=order, dim=1)
    return flat.view(-1, *[1] * (values.ndim - 1))


def random_start(
    shape: Sequence[int],
    *,
    eps: float,
    norm: Norm = "linf",
    start: Start = "paper",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the perturbations from which an attack starts.

    Args:
        shape: `(N, C, H, W)`.
        eps: Radius of the ball, in pixel units.
        norm: The ball's norm.
        start: `paper` draws a direction (a Gaussian vector over its own norm) and a radius uniform
            in [0, eps]: Stutz et al.'s code, close to the centre more often than `uniform`, which
            fills the ball. `gaussian` is TRADES' 0.001 · N(0, 1); `zero` is the image itself.
        generator: Where the numbers come from; its device is that of the result.

    Returns:
        Float32 perturbations of shape `shape`, within the ball, except for `gaussian`, which is
        clamped to the ball by the attack.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> random_start((2, 1, 4, 4), eps=0.1, generator=generator).abs().amax() <= 0.1
        tensor(True)
    """
    device = generator.device if generator is not None else torch.device("cpu")
    if start == "zero":
        return torch.zeros(*shape, device=device)
    if start == "uniform" and norm == "linf":
        return (2 * torch.rand(*shape, generator=generator, device=device) - 1) * eps
    direction = torch.randn(*shape, generator=generator, device=device)
    if start == "gaussian":
        return 0.001 * direction
    radius = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator, device=device)
    if start == "uniform":
        radius = radius ** (1 / direction[0].numel())
    return direction / per_example_norm(direction, norm) * radius * eps


def example_starts(
    images: Tensor,
    indices: Sequence[int],
    *,
    eps: float,
    norm: Norm,
    start: Start,
    seed: int,
    restart: int,
) -> Tensor:
    """Starts that depend on (seed, example index, restart) alone.

    Args:
        images: `(N, C, H, W)`; gives shape, dtype and device.
        indices: Global index of each image in the measured set.
        eps: Radius of the ball.
        norm: The ball's norm.
        start: As in `random_start`.
        seed: The measure's seed.
        restart: Number of the restart.

    Returns:
        `(N, C, H, W)`, the same on one process and on many, whatever the batch; of the images' type
        but float32 at least.
    """
    shape = (1, *images.shape[1:])
    draws = [
        random_start(
            shape,
            eps=eps,
            norm=norm,
            start=start,
            generator=keyed_generator(seed, "start", i, restart),
        )
        for i in indices
    ]
    # Half precision is too coarse for a perturbation.
    dtype = torch.promote_types(images.dtype, torch.float32)
    starts = torch.cat(draws) if draws else torch.zeros(images.shape)
    return starts.to(images.device, dtype)
