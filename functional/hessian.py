"""Curvature of the loss in weight space: extreme eigenvalues and the trace of its Hessian."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import check_count, check_examples, check_number
from robust_flatness.functional.evaluation import (
    evaluation_context,
    logits_function,
    to_float64,
)
from robust_flatness.functional.flatness import standard_error
from robust_flatness.functional.layer_weights import (
    LayerTensor,
    differentiable_weights,
    layer_tensor,
    layer_tensors,
)
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.noise import keyed_generator
from robust_flatness.functional.weight_perturbation import Perturbation, split_like

Product = Callable[[Tensor], Tensor]

# Lanczos needs more dimensions than vectors; a matrix this small is cheaper as a whole anyway.
LARGEST_DENSE = 32
RESTARTS_OF_LANCZOS = 100


@dataclass(frozen=True)
class HessianResult:
    """Extreme eigenvalues of a Hessian, with their directions.

    Attributes:
        max_eigenvalue: λ_max, in nats per squared unit of weight; NaN if it was not computed.
        min_eigenvalue: λ_min, likewise.
        max_eigenvector: Direction of λ_max by parameter name, of norm 1 over all of them.
        min_eigenvector: Direction of λ_min, likewise.
    """

    max_eigenvalue: float
    min_eigenvalue: float
    max_eigenvector: Perturbation
    min_eigenvector: Perturbation

    def __repr__(self) -> str:
        """One line, without the eigenvectors."""
        return (
            f"Hessian eigenvalues {self.min_eigenvalue:.3g} to {self.max_eigenvalue:.3g}, "
            f"convexity {self.convexity_ratio:.3g}"
        )

    @property
    def convexity_ratio(self) -> float:
        """|λ_min| / |λ_max|, 0 if the loss is convex; NaN if λ_max is 0."""
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

    The network is in eval mode, and the Hessian is with respect to the weights of its convolution
    and linear layers, frozen ones included, without biases and normalization layers. The paper's
    code sums the mean losses of four batches: its eigenvalues are about four times these; the
    convexity ratio is the same. Images may be adversarial examples, for the curvature of the robust
    loss at fixed attacks. It takes 40 to 100 Hessian-vector products, each of which costs two
    forwards and two backwards for each image.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1], at least one.
        labels: `(N,)` true classes.
        names: Parameters to restrict the Hessian to; `None` takes the weights above.
        tolerance: Tolerance of Lanczos as a share of the Hessian's spread, in [1e-12, 1); float32
            cannot go much below 1e-5. The paper takes 1e-2.
        seed: Seed of the vector that Lanczos starts from.
        batch_size: Images measured at once; changes the result by rounding only.

    Returns:
        Eigenvalues and eigenvectors; NaN if the loss is not finite or Lanczos does not converge.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = hessian_extreme_eigenvalues(model, images, torch.arange(4))
        >>> result.max_eigenvalue > 0, result.convexity_ratio < 1e-3
        (True, True)
    """
    check_set(images, labels, batch_size)
    check_number("tolerance", tolerance, low=1e-12, high=1)
    tensors = _hessian_tensors(model, names)
    weights = {name: tensor.value() for name, tensor in tensors.items()}
    with (
        second_derivatives(model, images, labels) as (images, labels),
        differentiable_weights(model, tensors) as leaves,
    ):
        inputs = list(leaves.values())

        def product(vector: Tensor) -> Tensor:
            """The Hessian times a vector, float64, on the CPU."""
            direction = [*split_like(vector, weights).values()]
            return hessian_product(model, inputs, images, labels, direction, batch_size)

        size = sum(weight.numel() for weight in weights.values())
        start = torch.randn(size, generator=keyed_generator(seed, "lanczos"), dtype=torch.float64)
        values, vectors = _extremes(product, start, tolerance)
        directions = [split_like(vector, weights) for vector in vectors]
    return HessianResult(*values, *directions)


@dataclass(frozen=True)
class HessianTraceResult:
    """Estimates of the trace of a Hessian, one for each random vector.

    Attributes:
        estimates: vᵀHv for each v, `(K,)`, float64, in nats per squared unit of weight.
        scale_free_estimates: vᵀSHSv, `(K,)`, with S = ‖w_l‖/√n_l for the weights of tensor l, in
            nats.
    """

    estimates: Tensor
    scale_free_estimates: Tensor

    def __repr__(self) -> str:
        """One line: both traces with their standard errors over vectors."""
        return (
            f"Hessian trace {self.trace:.3g} ± {self.trace_standard_error:.2g}, scale-free "
            f"{self.scale_free_trace:.3g} ± {self.scale_free_standard_error:.2g} "
            f"({len(self.estimates)} random vectors)"
        )

    @property
    def trace(self) -> float:
        """Mean of the estimates."""
        return self.estimates.mean().item()

    @property
    def trace_standard_error(self) -> float:
        """Standard error of `trace`; NaN for one vector."""
        return standard_error(self.estimates)

    @property
    def scale_free_trace(self) -> float:
        """T_w = Σ_l ‖w_l‖²/n_l · tr H_ll, the mean of the scale-free estimates."""
        return self.scale_free_estimates.mean().item()

    @property
    def scale_free_standard_error(self) -> float:
        """Standard error of `scale_free_trace`; NaN for one vector."""
        return standard_error(self.scale_free_estimates)


def hessian_trace(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str] | None = None,
    num_probes: int = 50,
    seed: int = 0,
    batch_size: int = 128,
) -> HessianTraceResult:
    """Trace of the Hessian of the mean cross-entropy, by Hutchinson's estimator.

    The mean of vᵀHv over random signs v, as in PyHessian (Yao et al., 2020), with a fixed number of
    them: its rule, to stop when the running mean changes by less than 1e-3, stops by chance. The
    variance is 2Σ_{i≠j} H_ij²/K, so that one v is exact for a diagonal Hessian. The trace depends
    on the scale of layers that a BatchNorm follows. T_w does not: by definition it weights the
    trace of each tensor by ‖w_l‖²/n_l, with n_l weights. As ξ → 0, average-case flatness of the
    clean loss tends to ξ²/2 · T_w over the tensors that it perturbs.

    Network, loss, and weights are those of `hessian_extreme_eigenvalues`. Images may be adversarial
    examples: the curvature at fixed attacks, which is not that of the robust loss. It costs a
    forward, a backward and 2K second-order backwards for each image; each of the latter costs about
    one forward and two backwards to the weights.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1], at least one.
        labels: `(N,)` true classes.
        names: Parameters to restrict the Hessian to; `None` takes the weights of convolutions and
            linear layers.
        num_probes: Number K of random vectors.
        seed: Seed of the random vectors.
        batch_size: Images measured at once; changes the result by rounding only.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = hessian_trace(model, images, torch.arange(4), num_probes=8)
        >>> result.trace > 0, result.estimates.shape
        (True, torch.Size([8]))
    """
    check_set(images, labels, batch_size)
    check_count("num_probes", num_probes, low=1)
    tensors = _hessian_tensors(model, names)
    totals = torch.zeros(2, num_probes, dtype=torch.float64)
    with (
        second_derivatives(model, images, labels) as (images, labels),
        differentiable_weights(model, tensors) as leaves,
    ):
        inputs = list(leaves.values())
        weights = [tensor.value().detach() for tensor in tensors.values()]
        scales = [weight.norm() / math.sqrt(weight.numel()) for weight in weights]
        for batch, targets in zip(images.split(batch_size), labels.split(batch_size)):

            def products(images: Tensor, labels: Tensor) -> Tensor:
                """vᵀHv and vᵀSHSv of the summed loss for each v, `(2, K)`, on the CPU."""
                gradients = weight_gradients(model, inputs, images, labels, create_graph=True)
                sums = []
                for k in range(num_probes):
                    signs = [
                        _signs(weight, keyed_generator(seed, "trace", k, position))
                        for position, weight in enumerate(weights)
                    ]
                    scaled = [scale * sign for scale, sign in zip(scales, signs)]
                    for probe in (signs, scaled):
                        slopes = torch.stack([(g * v).sum() for g, v in zip(gradients, probe)])
                        parts = torch.autograd.grad(
                            slopes.sum(), inputs, retain_graph=True, materialize_grads=True
                        )
                        terms = [to_float64(part * v).sum() for part, v in zip(parts, probe)]
                        sums.append(torch.stack(terms).sum())
                return torch.stack(sums).cpu().view(num_probes, 2).T

            for summand in fitting(products, batch, targets):
                totals += summand
    return HessianTraceResult(*(totals / len(images)))


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, weight.shape, generator=generator) - 1).to(weight)


def check_set(images: Tensor, labels: Tensor, batch_size: int) -> None:
    """Raises if the images of a mean loss, or their number in a batch, are not as they must be."""
    check_examples(images, labels)
    check_count("batch_size", batch_size, low=1)
    if len(images) == 0:
        raise ValueError("Expected `images` to hold at least one image but got none.")


@contextmanager
def second_derivatives(
    model: nn.Module, images: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """`evaluation_context` with second derivatives, and images and labels that can take part."""
    # Fused attention has no second derivative.
    with evaluation_context(model), sdpa_kernel(SDPBackend.MATH):
        # Tensors made under inference mode cannot be saved for backward, their clones can.
        yield images.clone(), labels.clone()


def hessian_product(
    model: nn.Module,
    weights: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    direction: Sequence[Tensor],
    batch_size: int,
) -> Tensor:
    """The Hessian of the mean cross-entropy times a direction: one vector, float64, on the CPU."""
    total = torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.float64)
    for batch, targets in zip(images.split(batch_size), labels.split(batch_size)):

        def product(images: Tensor, labels: Tensor) -> Tensor:
            gradients = weight_gradients(model, weights, images, labels, create_graph=True)
            slopes = torch.stack([(g * d).sum() for g, d in zip(gradients, direction)])
            parts = torch.autograd.grad(slopes.sum(), weights, materialize_grads=True)
            return torch.cat([part.flatten().cpu().double() for part in parts])

        for summand in fitting(product, batch, targets):
            total += summand
    return total / len(images)


def weight_gradients(
    model: nn.Module,
    weights: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of the summed cross-entropy of a batch, zero for weights that it does not use."""
    loss = cross_entropy(logits_function(model, images)(images), labels, reduction="sum")
    return list(
        torch.autograd.grad(loss, weights, create_graph=create_graph, materialize_grads=True)
    )


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
        # float32 does not resolve a share of a λ_min near zero.
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
        # If a random vector is mapped to zero all are, which ARPACK takes for an error.
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


def _hessian_tensors(model: nn.Module, names: Sequence[str] | None) -> dict[str, LayerTensor]:
    if names is None:
        return layer_tensors(model, biases=False)
    tensors, unknown = {}, []
    for name in names:
        try:
            tensors[name] = layer_tensor(model, name)
        except ValueError:
            unknown.append(name)
    if unknown or not names:
        first = next(iter(layer_tensors(model)))
        raise ValueError(
            f"Expected `names` to be parameters of the network such as {first} "
            f"but got {', '.join(unknown) or 'none'}."
        )
    return tensors
