"""Worst-case flatness of the robust loss in weight space (Stutz et al., ICCV 2021)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD, Keep, example_losses
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import (
    evaluation_context,
    logits_function,
    nan_unless_finite,
    to_float32,
)
from robust_flatness.functional.flatness import LossIncrease, standard_error
from robust_flatness.functional.layer_weights import (
    LayerTensor,
    differentiable_weights,
    layer_tensors,
    perturbed_weights,
)
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.noise import Norm, Start, keyed_generator
from robust_flatness.functional.robust_loss import AttackedSet, KnownLosses, LossKind, estimate_text
from robust_flatness.functional.weight_perturbation import onto_ball, scale_to, split_like


@dataclass(frozen=True)
class Sharing:
    """How processes share out the batches of one set, dealt out in turn.

    Gradients of all batches are added in the order of the batches, so that one and many processes
    agree bit for bit.

    Attributes:
        rounds: Number of batches of the process that has most of them.
        gather: Maps a tensor to those of all processes, by rank.
    """

    rounds: int
    gather: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class WorstCaseFlatnessResult(LossIncrease):
    """Worst-case flatness, with the losses at w and at w + ν and x + δ of each restart."""

    def __repr__(self) -> str:
        """One line: the value with its standard error over examples."""
        return (
            f"worst-case flatness {estimate_text(self.increases[self.worst_restart])} (worst of "
            f"{len(self.increases)} restarts), loss at w {estimate_text(self.reference_losses)}"
        )

    @property
    def value(self) -> float:
        """Mean loss of the worst restart minus reference RLoss, in nats; lower is flatter."""
        return self.increases.mean(dim=1).max().item()

    @property
    def worst_restart(self) -> int:
        """Number of the restart with the highest mean loss."""
        return int(self.increases.mean(dim=1).argmax())

    @property
    def worst_losses(self) -> Tensor:
        """Losses of the examples in the worst restart, `(N,)`."""
        return self.perturbed_losses[self.worst_restart]

    @property
    def standard_error_examples(self) -> float:
        """Standard error of `value` over the N examples, for this ν; NaN for one example."""
        return standard_error(self.increases[self.worst_restart])


def worst_case_flatness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    xi: float = 0.003,
    eps: float = 8 / 255,
    steps: int = 20,
    restarts: int = 10,
    weight_step: float = 0.01,
    loss: LossKind = "robust",
    keep: Keep | None = None,
    per_batch: bool = False,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    sharing: Sharing | None = None,
    on_attack: Callable[[], None] | None = None,
) -> WorstCaseFlatnessResult:
    """Measures how much RLoss rises when weights move in the worst direction.

    max over ‖ν_l‖ ≤ ξ‖w_l‖ of the mean over examples of max over δ of the loss at w + ν and x + δ,
    minus RLoss at w. Joint ascent on ν and δ approximates both maxima, and the worst restart
    counts; RLoss at w has as many restarts, the worst for each example, from the same starts. At
    ξ = 0 the joint ascent is the plain attack, and with its last iterate the value is ≤ 0: what the
    reference gains by keeping the best iterate and restart of each example. The measure is
    invariant to the scale of layers that a BatchNorm follows.

    A batch costs `2 · restarts · (steps + 1)` forwards and `2 · restarts · steps` backwards, half
    of them to the weights too; on clean images half of it and one forward. A loss that is not
    finite counts as the highest.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 1000 in the paper.
        labels: `(N,)` true classes.
        xi: Relative radius ξ in each layer; 0.003 in the paper's tables, 0.00075 in its figures.
        eps, step_size, norm, start: The attack, as in `evaluate_robustness`.
        steps: Steps of the joint ascent and of the reference attack, at least 1.
        restarts: Restarts of both.
        weight_step: Length of a step on ν_l relative to ‖w_l‖: 0.01 (the paper's code), with which
            every step ends on the ball's surface; the paper's text prints 0.001.
        loss: `robust`, or `clean` for the cross-entropy on the images themselves, with ascent on ν
            alone.
        keep: `last` iterate of the ascent, or the `best` by the mean over the set; `None` is the
            paper's: last for the robust loss, best for the clean one.
        per_batch: Whether each batch of `batch_size` images by global index has its own ν (the
            paper's text), or the whole set shares one (its code, though that moves ν after each
            batch instead of after each pass).
        seed: Seed of all random numbers.
        batch_size, indices: As in `evaluate_robustness`.
        sharing: How other processes, which hold the rest of the set, take part in ν; the losses of
            the result are those of this process's images.
        on_attack: Called twice for each restart on each batch, for progress.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> small, large = (
        ...     worst_case_flatness(model, images, torch.arange(4), xi=xi, restarts=2).value
        ...     for xi in (0.01, 0.1)
        ... )
        >>> 0 < small < large
        True
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size, indices, on_attack)
    check_count("steps", steps, low=1)
    check_number("xi", xi)
    check_number("weight_step", weight_step)
    if keep is not None:
        check_choice("keep", keep, get_args(Keep))
    measured = (xi, weight_step, loss, keep, per_batch, sharing)
    with evaluation_context(model):
        return measure_worst_case_flatness(model, attacked, *measured)


def measure_worst_case_flatness(
    model: nn.Module,
    attacked: AttackedSet,
    xi: float,
    weight_step: float,
    loss: LossKind,
    keep: Keep | None,
    per_batch: bool,
    sharing: Sharing | None = None,
    known: KnownLosses | None = None,
) -> WorstCaseFlatnessResult:
    """`worst_case_flatness` with checked arguments, inside `evaluation_context`.

    With `known` as in `AttackedSet.attack`, for the losses at w.
    """
    keep = keep or ("best" if loss == "clean" else "last")
    ascended = attacked
    if loss == "clean":
        ascended = replace(attacked, pgd=PGD(0.0, attacked.pgd.steps, start="zero"))
    # Raises, before anything is measured, if a weight cannot be perturbed.
    ascent = _JointAscent(model, layer_tensors(model), ascended, xi, weight_step, keep, sharing)
    reference, perturbed = [], []
    for number, parts in attacked.units(per_batch):
        reference.append(attacked.for_loss(loss).losses(model, parts, known=known))
        losses = []
        for restart in range(attacked.restarts):
            losses.append(ascent.losses(parts, restart, number))
            for _ in parts:
                if attacked.on_attack is not None:
                    attacked.on_attack()
        perturbed.append(torch.stack(losses))
    return WorstCaseFlatnessResult(torch.cat(reference), torch.cat(perturbed, dim=1))


@dataclass(frozen=True)
class _JointAscent:
    """Increases the mean cross-entropy of batches in ν and δ together.

    A step moves each example as the attack does and each layer by `weight_step · ‖w_l‖` along its
    gradient, and projects both, ν onto ‖ν_l‖ ≤ ξ‖w_l‖.
    """

    model: nn.Module
    tensors: Mapping[str, LayerTensor]
    attacked: AttackedSet
    xi: float
    weight_step: float
    keep: Keep
    sharing: Sharing | None

    def losses(self, parts: Sequence[slice], restart: int, number: int | None) -> Tensor:
        """Losses `(N,)` of batches, which share one ν, also with other processes.

        `number` is that of a batch with its own ν.
        """
        attacked, pgd = self.attacked, self.attacked.pgd
        # Labels made under inference mode cannot be saved for backward, their clones can.
        batches = [(attacked.images[part], attacked.labels[part].clone()) for part in parts]
        starts = [attacked.starts(part, restart) for part in parts]
        adversarial = [pgd.begin(to_float32(x), start) for (x, _), start in zip(batches, starts)]
        sharing = self.sharing
        if sharing is None or number is not None:
            sharing = Sharing(len(batches), lambda total: [total])
        weights = {name: tensor.value() for name, tensor in self.tensors.items()}
        perturbation = {}
        key = () if number is None else ("batch", number)
        for position, (name, weight) in enumerate(weights.items()):
            # Directions uniform, lengths U(0, 1) · ξ‖w_l‖: the start of the paper's code.
            generator = keyed_generator(attacked.seed, "weight start", restart, position, *key)
            direction = torch.randn(weight.shape, generator=generator).to(weight)
            length = self.xi * torch.rand((), generator=generator).item()
            perturbation[name] = scale_to(direction, weight, length)
        iterates = []
        for step in range(pgd.steps + 1):
            ascend = step < pgd.steps
            with (
                perturbed_weights(self.model, perturbation, self.tensors),
                differentiable_weights(self.model, self.tensors) as leaves,
            ):
                inputs = [*leaves.values()]
                total, losses = self._pass(inputs, batches, adversarial, sharing, ascend)
            # A view would keep the gradient of all weights.
            iterates.append((total[0].clone(), losses))
            if ascend:
                for name, gradient in split_like(total[1:], weights).items():
                    weight = weights[name]
                    moved = perturbation[name] + scale_to(gradient, weight, self.weight_step)
                    perturbation[name] = onto_ball(moved, weight, self.xi)
        if self.keep == "last":
            return losses
        # An iterate whose loss is NaN is the worst.
        sums = torch.stack([total for total, _ in iterates]).nan_to_num(math.inf, math.inf).tolist()
        return iterates[sums.index(max(sums))][1]

    def _pass(
        self,
        weights: Sequence[Tensor],
        batches: Sequence[tuple[Tensor, Tensor]],
        adversarial: list[Tensor],
        sharing: Sharing,
        ascend: bool,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the set at w + ν, which moves the adversarial examples if it ascends.

        Returns the sum of the losses over the whole set, followed if it ascends by its gradient for
        all weights, and the losses `(N,)` of this process.
        """
        exact = any(weight.dtype == torch.float64 for weight in weights)
        total = weights[0].new_zeros(
            1 + sum(weight.numel() for weight in weights) * ascend,
            dtype=torch.float64 if exact else torch.float32,
        )
        losses = []
        for turn in range(sharing.rounds):
            summand = torch.zeros_like(total)
            if turn < len(batches):
                images, labels = batches[turn]
                moved = []
                visit = partial(self._visit, weights, ascend)
                for moving, batch_losses, sums in fitting(visit, adversarial[turn], images, labels):
                    moved.append(moving)
                    losses.append(batch_losses)
                    summand += sums.to(total)
                adversarial[turn] = torch.cat(moved)
            for other in sharing.gather(summand):
                total += other
        return total, torch.cat(losses) if losses else total.new_zeros(0)

    def _visit(
        self,
        weights: Sequence[Tensor],
        ascend: bool,
        moving: Tensor,
        images: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adversarial examples after a step, if it ascends, their losses before it, and sums."""
        moving, gradients = moving.detach().requires_grad_(ascend), []
        with torch.set_grad_enabled(ascend):
            logits = logits_function(self.model, images)(moving)
            losses = nan_unless_finite(example_losses(logits, labels), logits)
        if ascend:
            gradient, *gradients = torch.autograd.grad(
                losses.sum(), [moving, *weights], materialize_grads=True
            )
            moving = self.attacked.pgd.move(moving.detach(), gradient, images)
        losses = losses.detach()
        return moving, losses, torch.cat([losses.sum()[None], *(g.flatten() for g in gradients)])
