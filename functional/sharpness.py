"""Adaptive sharpness: loss increases relative to the size of each single weight."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD, example_losses
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import (
    evaluation_context,
    logits_function,
    nan_unless_finite,
    to_float64,
)
from robust_flatness.functional.flatness import FlatnessResult
from robust_flatness.functional.layer_weights import (
    LayerTensor,
    all_tensors,
    differentiable_weights,
    layer_tensors,
    perturbed_weights,
)
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.noise import Norm, Start, keyed_generator
from robust_flatness.functional.robust_loss import AttackedSet, LossKind, estimate_text
from robust_flatness.functional.weight_perturbation import Perturbation, split_like

Case = Literal["average", "worst"]
Parameters = Literal["weights", "all"]

# From the middle of the grids of Andriushchenko et al. for ResNet-18.
DEFAULT_RHO = {
    ("average", "l2"): 0.1,
    ("average", "linf"): 0.2,
    ("worst", "l2"): 0.5,
    ("worst", "linf"): 0.002,
}
MOMENTUM = 0.75


@dataclass(frozen=True)
class SharpnessResult(FlatnessResult):
    """Adaptive sharpness, with the losses at w and at w + ν: a row for each draw, or the worst."""

    def __repr__(self) -> str:
        """One line: the value, of several draws with its standard error."""
        draws = len(self.increases)
        return (
            f"adaptive sharpness {estimate_text(self.increases.mean(dim=1))}"
            f"{f' ({draws} draws)' if draws > 1 else ''}, "
            f"loss at w {estimate_text(self.reference_losses)}"
        )


def adaptive_sharpness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    case: Case = "average",
    weight_norm: Norm = "linf",
    rho: float | None = None,
    num_perturbations: int = 20,
    weight_steps: int = 20,
    parameters: Parameters = "weights",
    normalize_logits: bool = False,
    eta: float = 0.0,
    loss: LossKind = "robust",
    eps: float = 8 / 255,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> SharpnessResult:
    """Measures how much the loss rises if each weight moves relative to its own size.

    Adaptive m-sharpness of Andriushchenko et al. (ICML 2023), of RLoss or of the clean loss. With
    T = |w| + η for each weight w, it is L(w + ν) - L(w), for

    - `average`, `l2`: the mean over ν = ρTz, z ~ N(0, 1): ρ is a relative standard deviation.
    - `average`, `linf`: the mean over ν = ρTu, u ~ U(-1, 1).
    - `worst`, `linf`: the maximum over |ν| ≤ ρT for each weight.
    - `worst`, `l2`: the maximum over ‖ν/T‖ ≤ ρ, one norm over all weights.

    Each batch has its own ν. The maximum is approximated by APGD (Croce & Hein, 2020) from ν = 0,
    with steps of 2ρ first and momentum 0.75; the best iterate counts, so it is at least 0. It moves
    u = ν/T, along sign(g) or Tg/‖Tg‖ for a gradient g, and scales u back onto the ball of `l2`. The
    authors' code steps along Tg/‖g‖ there and projects ν onto the ellipsoid.

    For η = 0 it is invariant to scaling a layer, or one filter, that a BatchNorm follows. The
    logit-normalized loss does not depend on the scale of the last layer either, at fixed images.
    As ρ → 0, `average` and `l2` tend to ρ²/2 · Σ w²H_ww plus noise of the gradient, `worst` to
    ρ‖w∘g‖_2 (`l2`) or ρ‖w∘g‖_1 (`linf`).

    For RLoss, images are attacked anew at each w + ν, also in each step of the ascent, whose
    gradient is that of the maximum over images (Danskin). With K draws or K steps, a batch costs
    K + 1 attacks; in the worst case also K + 1 forwards and K backwards to the weights; with
    normalized logits K + 1 forwards in the average case.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 1024 training images in the paper.
        labels: `(N,)` true classes.
        case: `average` or `worst`.
        weight_norm: `l2` or `linf`, see above.
        rho: Relative radius ρ; `None` takes 0.1 and 0.2 for `average`, 0.5 and 0.002 for `worst`,
            with `l2` and `linf`.
        num_perturbations: Number of draws of the average case.
        weight_steps: Number of steps of the worst case.
        parameters: `weights` are weights and biases of convolutions and linear layers, as in
            flatness; `all` also those of normalization layers (the paper), with T = |1 + w| + η for
            layers that multiply by 1 + w. A parameter of 0 does not move if η = 0.
        normalize_logits: Whether logits have mean 0 and norm 1 in the loss and in the ascent on ν.
            Images are attacked with the logits as they are.
        eta: η, in units of weights. Kwon et al. (ASAM, 2021) take 0.01; above 0 the measure is not
            invariant.
        loss: `robust`, or `clean` for the cross-entropy on the images themselves.
        eps, steps, step_size, norm, start: The attack, as in `evaluate_robustness`.
        restarts: Restarts of each attack.
        seed: Seed of all random numbers.
        batch_size: Number m of images that share ν, by global index (m-sharpness). It is part of
            the definition: larger batches have a smaller worst case.
        indices, on_attack: As in `evaluate_robustness`.

    Returns:
        Losses at w and at w + ν, one row for each draw, one in all for the worst case.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> worst = {"case": "worst", "steps": 2}
        >>> small, large = (
        ...     adaptive_sharpness(model, images, torch.arange(4), rho=rho, **worst).value
        ...     for rho in (0.01, 0.1)
        ... )
        >>> 0 < small < large
        True
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size, indices, on_attack)
    check_sharpness(case, weight_norm, rho, num_perturbations, weight_steps, eta)
    check_choice("parameters", parameters, get_args(Parameters))
    with evaluation_context(model):
        return measure_sharpness(
            model,
            attacked,
            case=case,
            weight_norm=weight_norm,
            rho=rho,
            num_perturbations=num_perturbations,
            weight_steps=weight_steps,
            parameters=parameters,
            normalize_logits=normalize_logits,
            eta=eta,
            loss=loss,
        )


def check_sharpness(
    case: str,
    weight_norm: str,
    rho: float | None,
    num_perturbations: int,
    weight_steps: int,
    eta: float,
) -> None:
    """Raises if an argument of `adaptive_sharpness` is out of range."""
    check_choice("case", case, get_args(Case))
    check_choice("weight_norm", weight_norm, get_args(Norm))
    if rho is not None:
        check_number("rho", rho)
    check_count("num_perturbations", num_perturbations, low=1)
    check_count("weight_steps", weight_steps, low=1)
    check_number("eta", eta)


def measure_sharpness(
    model: nn.Module,
    attacked: AttackedSet,
    *,
    case: Case,
    weight_norm: Norm,
    rho: float | None,
    num_perturbations: int,
    weight_steps: int,
    parameters: Parameters,
    normalize_logits: bool,
    eta: float,
    loss: LossKind,
) -> SharpnessResult:
    """`adaptive_sharpness` with checked arguments, inside `evaluation_context`."""
    # Raises, before anything is measured, if a weight cannot be perturbed.
    tensors = all_tensors(model) if parameters == "all" else layer_tensors(model)
    radius = DEFAULT_RHO[case, weight_norm] if rho is None else rho
    attacked = attacked.for_loss(loss)
    sizes = {name: _size(tensor, eta) for name, tensor in tensors.items()}
    units = [(number, part) for number, parts in attacked.units(True) for part in parts]
    reference, perturbed = [], []
    for number, part in units:
        unit = _Unit(model, tensors, sizes, attacked, part, normalize_logits)
        if case == "worst":
            first, best = ascend(unit.evaluate, unit.size, radius, weight_norm, weight_steps)
            reference.append(first)
            perturbed.append(best[None])
        else:
            reference.append(unit.losses({}))
            rows = []
            for draw in range(num_perturbations):
                key = (attacked.seed, draw, number or 0)
                rows.append(unit.losses(_noise(sizes, radius, weight_norm, key)))
            perturbed.append(torch.stack(rows))
    if not units:
        none = attacked.images.new_zeros(0)
        return SharpnessResult(none, none.expand(1 if case == "worst" else num_perturbations, 0))
    return SharpnessResult(torch.cat(reference), torch.cat(perturbed, dim=1))


@torch.no_grad()
def _size(tensor: LayerTensor, eta: float) -> Tensor:
    """T = |w| + η, or |1 + w| + η for the scale of a normalization layer that starts at 0."""
    offset = getattr(tensor.layer, "weight_offset", 0.0) if tensor.name == "weight" else 0.0
    return (tensor.value().detach() + offset).abs() + eta


def _noise(
    sizes: Mapping[str, Tensor], rho: float, norm: Norm, key: tuple[int, int, int]
) -> Perturbation:
    seed, draw, batch = key
    noise = {}
    for position, (name, size) in enumerate(sizes.items()):
        generator = keyed_generator(seed, "adaptive sharpness", draw, position, batch)
        if norm == "l2":
            values = torch.randn(size.shape, generator=generator)
        else:
            values = 2 * torch.rand(size.shape, generator=generator) - 1
        noise[name] = rho * size * values.to(size)
    return noise


class _Unit:
    """A batch of images that share ν."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, LayerTensor],
        sizes: Mapping[str, Tensor],
        attacked: AttackedSet,
        part: slice,
        normalize: bool,
    ) -> None:
        self.model, self.tensors, self.sizes = model, tensors, sizes
        # All ν share their starts.
        self.attacked = replace(attacked, keep_starts=True)
        self.part, self.normalize = part, normalize
        # Tensors made under inference mode cannot be saved for backward, their clones can.
        self.labels = attacked.labels[part].clone()
        self.size = torch.cat([size.flatten() for size in sizes.values()])

    def losses(self, perturbation: Perturbation) -> Tensor:
        """Losses of the examples at w + ν, `(N,)`."""
        with perturbed_weights(self.model, perturbation, self.tensors):
            if not self.normalize:
                return self.attacked.losses(self.model, [self.part])
            adversarial = self.attacked.adversarial(self.model, self.part)
            with torch.no_grad():
                return self._losses(adversarial, self.labels)

    def evaluate(self, relative: Tensor, ascend: bool) -> tuple[Tensor, Tensor | None]:
        """Losses at ν = Tu, `(N,)`, and the gradient of their mean with respect to u."""
        perturbation = split_like(relative * self.size, self.sizes)
        with perturbed_weights(self.model, perturbation, self.tensors):
            adversarial = self.attacked.adversarial(self.model, self.part)
            if not ascend:
                with torch.no_grad():
                    return self._losses(adversarial, self.labels), None
            with differentiable_weights(self.model, self.tensors) as leaves:

                def visit(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                    losses = self._losses(images, labels)
                    mean = losses.sum() / len(self.labels)
                    gradients = torch.autograd.grad(
                        mean, [*leaves.values()], materialize_grads=True
                    )
                    return losses.detach(), torch.cat([g.flatten() for g in gradients])

                losses, gradients = zip(*fitting(visit, adversarial, self.labels))
        return torch.cat(losses), sum(gradients[1:], gradients[0]) * self.size

    def _losses(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = logits_function(self.model, images)(images)
        compared = normalized_logits(logits) if self.normalize else logits
        return nan_unless_finite(example_losses(compared, labels), logits)


def normalized_logits(logits: Tensor) -> Tensor:
    """Logits `(N, K)` with mean 0 and norm 1 for each example.

    Example:
        >>> normalized_logits(torch.tensor([[1.0, 3.0]]))
        tensor([[-0.7071,  0.7071]])
    """
    logits = logits - logits.mean(1, keepdim=True)
    return logits / torch.linalg.vector_norm(logits, dim=1, keepdim=True).clamp_min(1e-10)


class _Iterate(NamedTuple):
    value: float
    at: Tensor
    losses: Tensor
    gradient: Tensor | None


def ascend(
    evaluate: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]],
    like: Tensor,
    radius: float,
    norm: Norm,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Maximizes a mean of losses over a ball around 0 by APGD (Croce & Hein, 2020, Algorithm 1).

    It costs `steps + 1` evaluations, all but one with a gradient.

    Args:
        evaluate: Maps a vector, and whether a gradient is needed, to losses `(N,)` and the gradient
            of their mean.
        like: A vector of the shape, type and device of the search.
        radius: Radius of the ball.
        norm: The ball's norm.
        steps: Number of steps, at least 1.

    Returns:
        The losses at 0, and those at the best iterate, `(N,)` each.
    """

    def project(u: Tensor) -> Tensor:
        if norm == "linf":
            return u.clamp(-radius, radius)
        return u * (radius / _length(u)).clamp_max(1)

    def visit(u: Tensor, needs_gradient: bool) -> _Iterate:
        losses, gradient = evaluate(u, needs_gradient)
        value = to_float64(losses).mean().item()
        # A loss that is not finite is the highest.
        return _Iterate(math.inf if math.isnan(value) else value, u, losses, gradient)

    here = first = best = visit(torch.zeros_like(like), True)
    before, step = here.at, 2 * radius
    # Checkpoints at 22 % of the steps and then after ever fewer, at least 6 %.
    interval, least = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
    shrink = max(int(0.03 * steps), 1)
    taken = increases = 0
    best_before, was_halved = best.value, False
    for k in range(steps):
        assert here.gradient is not None  # All iterates but the last have one.
        along = here.gradient.sign() if norm == "linf" else here.gradient / _length(here.gradient)
        target = project(here.at + step * along.nan_to_num(0.0, 0.0, 0.0))
        share = MOMENTUM if k else 1.0
        moved = here.at + share * (target - here.at) + (1 - share) * (here.at - before)
        last, before = here.value, here.at
        here = visit(project(moved), k < steps - 1)
        taken, increases = taken + 1, increases + (here.value > last)
        if here.value > best.value:
            best = here
        if taken == interval:
            stuck = not was_halved and best.value <= best_before
            was_halved = increases <= MOMENTUM * interval or stuck
            if was_halved and k < steps - 1:
                step, here = step / 2, best
            best_before, taken, increases = best.value, 0, 0
            interval = max(interval - shrink, least)
    return first.losses, best.losses


def _length(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector).clamp_min(torch.finfo(vector.dtype).tiny)
