"""Worst-case flatness of the robust loss in weight space (Stutz et al., ICCV 2021)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD, Keep, example_losses
from robust_flatness.functional.checks import (
    check_choice,
    check_count,
    check_examples,
    check_number,
)
from robust_flatness.functional.evaluation import (
    evaluation_context,
    logits_function,
    nan_unless_finite,
    to_float32,
)
from robust_flatness.functional.flatness import NO_ATTACK, LossKind, perturbed_units
from robust_flatness.functional.layer_weights import (
    differentiable_weights,
    perturbed_parameters,
    perturbed_weights,
)
from robust_flatness.functional.noise import Norm, Start, keyed_generator
from robust_flatness.functional.robust_loss import worst_losses
from robust_flatness.functional.weight_perturbation import onto_ball, scale_to, split_like

Perturbation = dict[str, Tensor]


class Batch(NamedTuple):
    """Images `(N, C, H, W)` in [0, 1], labels `(N,)`, and global indices."""

    images: Tensor
    labels: Tensor
    indices: Sequence[int]


@dataclass(frozen=True)
class Sharing:
    """How processes share out the batches of one set, dealt out in turn.

    Gradients of all batches are added in the order of the batches, so that one and many processes
    agree bit for bit.

    Attributes:
        rounds: Batches of the process that has most of them.
        gather: Maps a tensor to those of all processes, by rank.
    """

    rounds: int
    gather: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class JointAscent:
    """Raises the mean cross-entropy of a set in ν and δ together (Stutz et al., ICCV 2021).

    A step moves each example as the attack does and each layer by `weight_step · ‖w_l‖` along its
    gradient, and projects both, ν onto ‖ν_l‖ ≤ ξ‖w_l‖. One ν serves all batches.

    Attributes:
        model: The network, in `evaluation_context` while this runs; left as it was.
        batches: Of this process.
        pgd: The attack on images.
        xi: Relative radius ξ in each layer.
        weight_step: Relative length of a step in each layer.
        keep: `last` iterate, or the `best` by the mean over the set.
        seed: Of the starts.
        number: Of the batch that has ν to itself; `None` where the set shares it.
        sharing: With which other processes ν is shared.
    """

    model: nn.Module
    batches: Sequence[Batch]
    pgd: PGD
    xi: float
    weight_step: float
    keep: Keep = "last"
    seed: int = 0
    number: int | None = None
    sharing: Sharing | None = None

    def run(self, restart: int) -> Tensor:
        """Losses `(N,)` at the iterate that is kept, from the restart's own starts.

        Costs `steps + 1` forwards and `steps` backwards to weights and images for each batch.
        """
        weights = perturbed_parameters(self.model)
        perturbation = self._start(weights, restart)
        adversarial = [self._attacked(batch, restart) for batch in self.batches]
        iterates: list[tuple[float, Tensor]] = []
        for _ in range(self.pgd.steps):
            height, losses, slope = self._pass(weights, perturbation, adversarial)
            iterates.append((height, losses))
            perturbation = self._moved(weights, perturbation, slope)
        height, losses, _ = self._pass(weights, perturbation, adversarial, ascend=False)
        iterates.append((height, losses))
        if self.keep == "last":
            return losses
        # An iterate whose loss is not a number is the worst.
        return max(iterates, key=lambda found: math.inf if math.isnan(found[0]) else found[0])[1]

    def _start(self, weights: dict[str, Tensor], restart: int) -> Perturbation:
        """Directions uniform, lengths U(0, 1) · ξ‖w_l‖: the start of the paper's code."""
        key = () if self.number is None else ("batch", self.number)
        found = {}
        for position, (name, weight) in enumerate(weights.items()):
            numbers = keyed_generator(self.seed, "weight start", restart, position, *key)
            direction = torch.randn(weight.shape, generator=numbers).to(weight)
            length = self.xi * torch.rand((), generator=numbers).item()
            found[name] = scale_to(direction, weight, length)
        return found

    def _attacked(self, batch: Batch, restart: int) -> Tensor:
        start = self.pgd.starts(batch.images, batch.indices, seed=self.seed, restart=restart)
        return self.pgd.begin(to_float32(batch.images), start)

    def _pass(
        self,
        weights: dict[str, Tensor],
        perturbation: Perturbation,
        adversarial: list[Tensor],
        *,
        ascend: bool = True,
    ) -> tuple[float, Tensor, Tensor]:
        """One pass over the set at w + ν, which moves the adversarial examples if it ascends.

        Returns:
            Sum of the losses over the whole set, this process's losses `(N,)`, and the gradient
            for all weights over the whole set as one vector; empty if it does not ascend.
        """
        like = next(iter(weights.values()))
        exact = any(weight.dtype == torch.float64 for weight in weights.values())
        size = 1 + sum(weight.numel() for weight in weights.values()) * ascend
        total = like.new_zeros(size, dtype=torch.float64 if exact else torch.float32)
        sharing = self.sharing if self.number is None else None
        sharing = sharing or Sharing(len(self.batches), lambda part: [part])
        found = []
        with (
            perturbed_weights(self.model, perturbation),
            differentiable_weights(self.model, weights) as leaves,
        ):
            for turn in range(sharing.rounds):
                part = torch.zeros_like(total)
                if turn < len(self.batches):
                    losses, gradient = self._visit(turn, adversarial, leaves, ascend)
                    found.append(losses)
                    part = torch.cat([losses.sum()[None], *gradient]).to(total)
                for other in sharing.gather(part):
                    total += other
        own = torch.cat(found) if found else total.new_zeros(0)
        return total[0].item(), own, total[1:]

    def _visit(
        self,
        turn: int,
        adversarial: list[Tensor],
        weights: dict[str, Tensor],
        ascend: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses of a batch and its gradients for the weights, flat; moves its examples."""
        images, labels, _ = self.batches[turn]
        with torch.set_grad_enabled(ascend):
            moving = adversarial[turn].detach().requires_grad_(ascend)
            logits = logits_function(self.model, images)(moving)
            losses = nan_unless_finite(example_losses(logits, labels), logits)
            if not ascend:
                return losses, []
            inputs = [moving, *weights.values()]
            slope, *gradients = torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)
        adversarial[turn] = self.pgd.move(moving.detach(), slope, images)
        return losses.detach(), [gradient.flatten() for gradient in gradients]

    def _moved(
        self, weights: dict[str, Tensor], perturbation: Perturbation, gradient: Tensor
    ) -> Perturbation:
        gradients = split_like(gradient, weights)
        return {
            name: onto_ball(
                perturbation[name] + scale_to(gradients[name], weight, self.weight_step),
                weight,
                self.xi,
            )
            for name, weight in weights.items()
        }


@dataclass(frozen=True)
class WorstCaseFlatnessResult:
    """Worst-case flatness with what it was computed from.

    Attributes:
        reference_losses: Robust loss of each example at the weights w, `(N,)`.
        perturbed_losses: LossKind of each example at w + ν and x + δ of each restart, `(R, N)`.
    """

    reference_losses: Tensor
    perturbed_losses: Tensor

    @property
    def increases(self) -> Tensor:
        """Perturbed minus reference loss of each example, `(R, N)`, float64."""
        return self.perturbed_losses.double() - self.reference_losses.double()

    @property
    def value(self) -> float:
        """Mean loss of the worst restart minus reference RLoss, in nats; lower is flatter."""
        return self.increases.mean(dim=1).max().item()

    @property
    def reference_loss(self) -> float:
        """RLoss at w, in nats."""
        return self.reference_losses.double().mean().item()

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
        rises = self.increases[self.worst_restart]
        return (rises.std() / math.sqrt(len(rises))).item() if len(rises) > 1 else math.nan


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
    minus RLoss at w. Both maxima are sought by joint ascent on ν and δ, and the worst restart
    counts; RLoss at w has as many restarts, the worst for each example, from the same starts. At
    ξ = 0 the joint ascent is the plain attack, and with its last iterate the value is ≤ 0: what the
    reference gains by keeping the best iterate and restart of each example. The measure is
    invariant to the scale of layers that a BatchNorm follows.

    A batch costs `2 · restarts · (steps + 1)` forwards and `2 · restarts · steps` backwards, half
    of them to the weights too; on clean images half of it and one forward. Nothing is left behind
    in the network, and one of half precision is measured in float32, see `evaluation_context`. A
    loss that is not finite counts as the highest.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1]; 1000 in the paper.
        labels: `(N,)` true classes.
        xi: Relative radius ξ in each layer; 0.003 in the paper's tables, 0.00075 in its figures.
        eps: Radius of the attack.
        steps: Steps of the joint ascent and of the reference attack, at least 1.
        restarts: Restarts of both.
        weight_step: Length of a step on ν_l relative to ‖w_l‖: 0.01 (the paper's code), with which
            every step ends on the ball's surface; the paper's text prints 0.001.
        loss: `robust`, or `clean` for the cross-entropy on the images themselves, where ascent is
            on ν alone and what is said of the attack is ignored.
        keep: `last` iterate of the ascent, or the `best` by the mean over the set, at no further
            cost; `None` is the paper's: last for the robust loss, best for the clean one.
        per_batch: Whether each batch of `batch_size` images by global index has a ν of its own (the
            paper's text), so that the value depends on `batch_size`, or the whole set shares one
            (its code, though that moves ν after each batch instead of after each pass). The restart
            is chosen by the mean over the set in both cases.
        step_size: As in `pgd_attack`.
        norm: As in `pgd_attack`.
        start: As in `pgd_attack`.
        seed: Of the starts of ν and δ.
        batch_size: Images measured at once; if the set shares ν it changes the value by rounding
            only.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        sharing: How other processes, which hold the rest of the set, take part in ν; the losses of
            the result are those of this process's images.
        on_attack: Called twice for each restart on each batch, for progress.

    Returns:
        Value, and the losses behind it.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> flat = {"steps": 5, "restarts": 2}
        >>> found = [worst_case_flatness(model, images, torch.arange(4), xi=xi, **flat).value
        ...          for xi in (0.01, 0.1)]
        >>> 0 < found[0] < found[1]
        True
    """
    attack = PGD(eps, steps, step_size, norm, "best", start)
    check_examples(images, labels)
    check_number("xi", xi)
    check_number("weight_step", weight_step)
    for name, count in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        check_count(name, count, low=1)
    check_choice("loss", loss, get_args(LossKind))
    clean = loss == "clean"
    keep = keep or ("best" if clean else "last")
    check_choice("keep", keep, get_args(Keep))
    # What cannot be perturbed is refused before anything is measured.
    perturbed_parameters(model)
    moving = PGD(eps, steps, step_size, norm, start=start)
    if clean:
        attack, moving = NO_ATTACK, PGD(0.0, steps, start="zero")
    where = range(len(images)) if indices is None else list(indices)
    report = on_attack or (lambda: None)
    first = range(1 if clean else restarts)
    reference: list[Tensor] = []
    perturbed: list[Tensor] = []
    with evaluation_context(model):
        for number, parts in perturbed_units(where, batch_size, per_batch):
            # Labels made under inference mode cannot be saved for backward, their clones can.
            batches = [Batch(images[p], labels[p].clone(), where[p]) for p in parts]
            reference += [_losses(model, batch, attack, first, seed, report) for batch in batches]
            ascent = JointAscent(
                model, batches, moving, xi, weight_step, keep, seed, number, sharing
            )
            perturbed.append(_ascents(ascent, restarts, report))
    if not reference:
        return WorstCaseFlatnessResult(images.new_zeros(0), images.new_zeros(restarts, 0))
    return WorstCaseFlatnessResult(torch.cat(reference), torch.cat(perturbed, dim=1))


def _losses(
    model: nn.Module,
    batch: Batch,
    attack: PGD,
    restarts: range,
    seed: int,
    report: Callable[[], None],
) -> Tensor:
    """Losses `(N,)` at w."""
    return worst_losses(
        model,
        batch.images,
        batch.labels,
        attack,
        restarts=restarts,
        seed=seed,
        indices=batch.indices,
        on_attack=report,
    )[0]


def _ascents(ascent: JointAscent, restarts: int, report: Callable[[], None]) -> Tensor:
    """Losses `(R, N)` at the end of each restart."""
    rows = []
    for restart in range(restarts):
        rows.append(ascent.run(restart))
        for _ in ascent.batches:
            report()
    return torch.stack(rows)
