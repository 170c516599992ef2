"""Curvature of the clean loss in weight space: extreme eigenvalues of its Hessian."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import check_count, check_examples, check_number
from robust_flatness.functional.evaluation import evaluation_context, logits_function
from robust_flatness.functional.layer_weights import (
    differentiable_weights,
    perturbed_parameters,
    weight_at,
)
from robust_flatness.functional.noise import keyed_generator
from robust_flatness.functional.weight_perturbation import split_like

Direction = dict[str, Tensor]

Product = Callable[[Tensor], Tensor]

# Lanczos needs more dimensions than vectors; a matrix this small is cheaper whole anyway.
LARGEST_DENSE = 32

RESTARTS_OF_LANCZOS = 100


@dataclass(frozen=True)
class HessianResult:
    """Extreme eigenvalues of a Hessian, with their directions.

    Attributes:
        max_eigenvalue: λ_max, in nats per squared unit of weight; NaN if it was not found.
        min_eigenvalue: λ_min, likewise.
        max_eigenvector: Direction of λ_max by parameter name, of norm 1 over all of them.
        min_eigenvector: Direction of λ_min, likewise.
    """

    max_eigenvalue: float
    min_eigenvalue: float
    max_eigenvector: Direction
    min_eigenvector: Direction

    @property
    def convexity_ratio(self) -> float:
        """|λ_min| / |λ_max|: 0 in a convex direction-by-direction bowl; NaN where λ_max is 0."""
        return abs(self.min_eigenvalue / self.max_eigenvalue) if self.max_eigenvalue else math.nan


def hessian_extreme_eigenvalues(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str] | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
    batch_size: int = 128,
) -> HessianResult:
    """Largest and smallest eigenvalue of the Hessian of the mean cross-entropy, by Lanczos.

    The network is in eval mode, and the Hessian is that with respect to the weights of its
    convolution and linear layers (of parametrised ones the tensors that they compute with),
    neither biases nor normalisation. The paper's code sums the mean
    losses of four batches, from the last 500 test images: its eigenvalues are about four times
    those of the mean loss, which these are; the convexity ratio is the same. Images may be
    adversarial examples, for the curvature of the robust loss at fixed attacks.

    A Hessian-vector product costs a forward and a backward twice through the network for each
    image; some 40 to 100 of them are needed. Nothing is left behind in the network, and one of half
    precision is measured in float32, see `evaluation_context`; frozen weights are measured like
    others.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1], at least one.
        labels: `(N,)` true classes.
        names: Parameters to restrict the Hessian to; `None` takes the weights above.
        tolerance: At which Lanczos stops, as a share of the Hessian's spread, in [1e-12, 1);
            float32 cannot go much below 1e-5. The paper takes 1e-2.
        seed: Of the vector that Lanczos starts from.
        batch_size: Images measured at once; changes the result by rounding only.

    Returns:
        Eigenvalues and eigenvectors; NaN where the loss is not finite or Lanczos ends without them.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> found = hessian_extreme_eigenvalues(model, images, torch.arange(4))
        >>> found.max_eigenvalue > 0, found.convexity_ratio < 1e-3
        (True, True)
    """
    check_examples(images, labels)
    check_count("batch_size", batch_size, low=1)
    check_number("tolerance", tolerance, low=1e-12, high=1)
    if len(images) == 0:
        raise ValueError("Expected `images` to hold an image at least but got none.")
    weights = _chosen(model, names)
    # Fused attention has no second derivative.
    with (
        evaluation_context(model),
        differentiable_weights(model, weights) as leaves,
        sdpa_kernel(SDPBackend.MATH),
    ):
        # Tensors made under inference mode cannot be saved for backward, their clones can.
        images, labels = images.clone(), labels.clone()
        parts = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]

        def product(vector: Tensor) -> Tensor:
            direction = _unflatten(vector, weights)
            total = torch.zeros_like(vector)
            for part in parts:
                total += _product(model, leaves, images[part], labels[part], direction)
            return total / len(images)

        size = sum(weight.numel() for weight in weights.values())
        start = torch.randn(size, generator=keyed_generator(seed, "lanczos"), dtype=torch.float64)
        values, vectors = _extremes(product, start, tolerance)
        directions = [_unflatten(vector, weights) for vector in vectors]
    return HessianResult(*values, *directions)


def weight_gradients(
    model: nn.Module,
    weights: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of the summed cross-entropy of a batch.

    Args:
        model: The network.
        weights: Its weights to differentiate for; zero where the loss does not depend on one.
        images: `(N, C, H, W)`.
        labels: `(N,)`.
        create_graph: Whether the gradients are to be differentiated again.
    """
    loss = cross_entropy(logits_function(model, images)(images), labels, reduction="sum")
    found = torch.autograd.grad(loss, weights, create_graph=create_graph, materialize_grads=True)
    return list(found)


def _product(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    direction: Direction,
) -> Tensor:
    """The Hessian of a batch's summed loss times a direction, flat, float64, on the CPU."""
    inputs = list(weights.values())
    gradients = weight_gradients(model, inputs, images, labels, create_graph=True)
    slopes = [(g * direction[name]).sum() for name, g in zip(weights, gradients)]
    products = torch.autograd.grad(torch.stack(slopes).sum(), inputs, materialize_grads=True)
    return torch.cat([found.double().flatten().cpu() for found in products])


def _extremes(
    product: Product, start: Tensor, tolerance: float
) -> tuple[tuple[float, float], tuple[Tensor, Tensor]]:
    """Eigenvalues λ_max, λ_min and their vectors."""
    try:
        if len(start) <= LARGEST_DENSE:
            identity = torch.eye(len(start), dtype=start.dtype)
            matrix = torch.stack([_finite(product(row)) for row in identity])
            every, columns = torch.linalg.eigh((matrix + matrix.T) / 2)
            return (every[-1].item(), every[0].item()), (columns[:, -1], columns[:, 0])
        high, upper = _largest(product, start, tolerance)
        # λ_max - H has its largest eigenvalue at λ_min, and a tolerance relative to the spread:
        # in float32 a λ_min near zero cannot be told to a share of itself.
        spread, lower = _largest(lambda v: high * v - product(v), start, tolerance)
        return (high, high - spread), (upper, lower)
    except ArithmeticError as error:
        warnings.warn(f"No eigenvalues of the Hessian: {error}.", stacklevel=3)
        nothing = torch.full_like(start, math.nan)
        return (math.nan, math.nan), (nothing, nothing)


def _largest(product: Product, start: Tensor, tolerance: float) -> tuple[float, Tensor]:
    # Imported late: only this measure needs it.
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def matvec(vector: object) -> object:
        return _finite(product(torch.as_tensor(vector, dtype=torch.float64).flatten())).numpy()

    size = len(start)
    if not _finite(product(start)).any():
        # Where a random vector is mapped to zero everything is, which ARPACK takes for an error.
        return 0.0, start / start.norm()
    operator = LinearOperator((size, size), matvec=matvec, dtype="float64")
    settings = {"k": 1, "which": "LA", "tol": tolerance, "maxiter": RESTARTS_OF_LANCZOS}
    try:
        values, vectors = eigsh(operator, v0=start.numpy(), **settings)
    except ArpackNoConvergence as error:
        raise ArithmeticError(f"Lanczos did not converge to `tolerance` {tolerance:g}") from error
    return float(values[0]), torch.from_numpy(vectors[:, 0].copy())


def _finite(vector: Tensor) -> Tensor:
    if not vector.isfinite().all():
        raise ArithmeticError("the loss or its derivatives are not finite")
    return vector


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    if names is None:
        return perturbed_parameters(model, biases=False)
    chosen, unknown = {}, []
    for name in names:
        try:
            chosen[name] = weight_at(model, name)
        except ValueError:
            unknown.append(name)
    if unknown or not names:
        first = next(iter(perturbed_parameters(model)))
        raise ValueError(
            f"Expected `names` to be parameters of the network such as {first} "
            f"but got {', '.join(unknown) or 'none'}."
        )
    return chosen


def _unflatten(vector: Tensor, weights: Mapping[str, Tensor]) -> Direction:
    return {
        name: part.to(weights[name].device) for name, part in split_like(vector, weights).items()
    }
