"""First-order flatness: the gradient of the loss with respect to the weights, at w and near it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robust_flatness.functional.checks import check_count, check_number
from robust_flatness.functional.evaluation import evaluation_context, to_float64
from robust_flatness.functional.hessian import (
    check_set,
    hessian_product,
    second_derivatives,
    weight_gradients,
)
from robust_flatness.functional.layer_weights import (
    differentiable_weights,
    layer_tensors,
    perturbed_weights,
)
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.noise import keyed_generator
from robust_flatness.functional.weight_perturbation import split_like


@dataclass(frozen=True)
class GradientNormResult:
    """Norms of the tensors that layers compute with, and of their gradients.

    Attributes:
        names: Names of the L tensors.
        weight_norms: ‖w_l‖, `(L,)`, float64.
        gradient_norms: ‖g_l‖ of the mean loss, `(L,)`, float64, in nats per unit of weight.
    """

    names: tuple[str, ...]
    weight_norms: Tensor
    gradient_norms: Tensor

    def __repr__(self) -> str:
        """One line: both norms."""
        return f"gradient norm {self.norm:.3g}, relative to the weights {self.relative_norm:.3g}"

    @property
    def norm(self) -> float:
        """‖g‖ over all tensors."""
        return self.gradient_norms.norm().item()

    @property
    def relative_norm(self) -> float:
        """Σ_l ‖w_l‖‖g_l‖, in nats."""
        return (self.weight_norms * self.gradient_norms).sum().item()


@dataclass(frozen=True)
class FirstOrderFlatnessResult:
    """Gradient norms of the iterates of an ascent in a ball around the weights.

    Attributes:
        rho: Radius ρ of the ball.
        gradient_norms: ‖∇L(w + ν)‖ of each iterate, `(K + 1,)`, float64; the first is at ν = 0.
    """

    rho: float
    gradient_norms: Tensor

    def __repr__(self) -> str:
        """One line: the value and its ascent."""
        steps = len(self.gradient_norms) - 1
        return f"first-order flatness {self.value:.3g} (radius {self.rho:g}, {steps} steps)"

    @property
    def value(self) -> float:
        """R = ρ · max ‖∇L(w + ν)‖, in nats, not finite if any gradient is; lower is flatter."""
        return self.rho * self.gradient_norms.max().item()


def gradient_norm(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 128
) -> GradientNormResult:
    """Norm of the gradient of the mean cross-entropy, over all weights and by layer.

    Tensors are those that flatness perturbs: weights and biases of convolutions and linear layers.
    The relative norm, Σ_l ‖w_l‖‖g_l‖, is invariant to the scale of layers that a BatchNorm follows;
    worst-case flatness at fixed images, divided by ξ, tends to it as ξ → 0. The norm depends on
    their scale. Images may be adversarial examples: the gradient is that of the robust loss
    (Danskin). It costs one forward and one backward to the weights for each image.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1], at least one.
        labels: `(N,)` true classes.
        batch_size: Images measured at once; changes the result by rounding only.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = gradient_norm(model, images, torch.arange(4))
        >>> result.names, result.norm > 0
        (('1.weight', '1.bias'), True)
    """
    check_set(images, labels, batch_size)
    tensors = layer_tensors(model)
    with evaluation_context(model), differentiable_weights(model, tensors) as leaves:
        # Tensors made under inference mode cannot be saved for backward, their clones can.
        images, labels = images.clone(), labels.clone()
        weights = [to_float64(tensor.value().detach()) for tensor in tensors.values()]
        totals = _mean_gradient(model, [*leaves.values()], images, labels, batch_size)
    norms = (torch.stack([tensor.norm() for tensor in part]).cpu() for part in (weights, totals))
    return GradientNormResult(tuple(tensors), *norms)


def first_order_flatness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    rho: float = 0.1,
    weight_steps: int = 10,
    seed: int = 0,
    batch_size: int = 128,
) -> FirstOrderFlatnessResult:
    """Largest gradient of the mean cross-entropy in a ball around the weights, times its radius.

    R = ρ · max over ‖ν‖ ≤ ρ of ‖∇L(w + ν)‖ (GAM, Zhang et al., CVPR 2023), with one norm over
    weights and biases of convolutions and linear layers. Each step goes to ν = ρHg/‖Hg‖, with the
    Hessian H and the gradient g at the last iterate: GAM's ascent direction, from w, and the power
    method if the loss is quadratic. The largest of all iterates counts, so the value is a lower
    bound. It depends on the scale of layers that a BatchNorm follows.

    Images may be adversarial examples, which stay those at w. It costs 2K + 1 forwards and
    backwards to the weights and K second-order backwards for each image.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1], at least one.
        labels: `(N,)` true classes.
        rho: Radius ρ, in units of weights.
        weight_steps: Number K of steps; GAM takes 1.
        seed: Seed of the direction that is taken where Hg is 0, such as at a minimum.
        batch_size: Images measured at once; changes the result by rounding only.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = first_order_flatness(model, images, torch.arange(4), weight_steps=2)
        >>> result.value >= 0.1 * result.gradient_norms[0].item()
        True
    """
    check_set(images, labels, batch_size)
    check_number("rho", rho)
    check_count("weight_steps", weight_steps, low=1)
    tensors = layer_tensors(model)
    with second_derivatives(model, images, labels) as (images, labels):
        weights = {name: tensor.value().detach() for name, tensor in tensors.items()}

        def visit(nu: Tensor, needs_product: bool) -> tuple[Tensor, Tensor | None]:
            """The gradient at w + ν, and the Hessian there times it; float64, on the CPU."""
            with (
                perturbed_weights(model, split_like(nu, weights), tensors),
                differentiable_weights(model, tensors) as leaves,
            ):
                data = (model, [*leaves.values()], images, labels)
                gradient = _mean_gradient(*data, batch_size)
                flat = torch.cat([part.flatten() for part in gradient]).cpu()
                if not needs_product:
                    return flat, None
                # Of a gradient near zero the product might underflow in float32.
                along = flat / flat.norm().clamp_min(torch.finfo(flat.dtype).tiny)
                direction = [*split_like(along, weights).values()]
                return flat, hessian_product(*data, direction, batch_size)

        size = sum(weight.numel() for weight in weights.values())
        start = torch.randn(size, generator=keyed_generator(seed, "first order")).double()
        return FirstOrderFlatnessResult(rho, largest_gradient(visit, start, rho, weight_steps))


def largest_gradient(
    visit: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]],
    start: Tensor,
    rho: float,
    steps: int,
) -> Tensor:
    """Ascends the norm of a gradient in a ball around 0.

    Args:
        visit: Maps a point, and whether the second is needed, to the gradient g and the Hessian
            times g there, or times any positive multiple of g.
        start: Direction that is taken where the product is zero or not finite.
        rho: Radius of the ball.
        steps: Number of steps.

    Returns:
        The norm of the gradient at each iterate, `(steps + 1,)`; the first is at 0.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 3.0]))
        >>> visit = lambda v, _: (matrix @ v, matrix @ matrix @ v)
        >>> round(largest_gradient(visit, torch.ones(2), 0.5, 9).max().item(), 4)
        1.5
    """
    at, norms = torch.zeros_like(start), []
    for step in range(steps + 1):
        gradient, product = visit(at, step < steps)
        norms.append(gradient.norm())
        if product is not None:
            length = product.norm()
            usable = bool(length > 0) and bool(length.isfinite())
            along = product / length if usable else start / start.norm()
            at = rho * along
    return torch.stack(norms)


def _mean_gradient(
    model: nn.Module, weights: list[Tensor], images: Tensor, labels: Tensor, batch_size: int
) -> list[Tensor]:
    totals = [torch.zeros_like(to_float64(weight)) for weight in weights]
    for batch, targets in zip(images.split(batch_size), labels.split(batch_size)):
        for parts in fitting(partial(weight_gradients, model, weights), batch, targets):
            totals = [total + to_float64(part) for total, part in zip(totals, parts)]
    return [total.detach() / len(images) for total in totals]
