"""Robust loss and robust error of a network on a fixed set of images."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from robust_flatness.functional.attack import PGD, Iterate
from robust_flatness.functional.checks import check_choice, check_count, check_examples
from robust_flatness.functional.evaluation import (
    Model,
    evaluation_context,
    to_float32,
    to_float64,
)
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.noise import Norm, Start

LossKind = Literal["robust", "clean"]

NO_ATTACK = PGD(0.0, steps=0, start="zero")
# What is known of one network on one set of images: the losses of one restart on a batch, `(N,)`,
# and whether it is classified correctly, by all that they depend on besides these two.
KnownLosses = dict[Hashable, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AttackedSet:
    """The images of a measure and how they are attacked, as in `evaluate_robustness`.

    Args:
        images, labels, restarts, seed, batch_size, indices, on_attack: As there.
        pgd: The attack, with `keep` best.
        keep_starts: Whether each start is drawn once and kept, for a set that is attacked
            repeatedly. They take as much memory as `restarts` copies of the images.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.
    """

    images: Tensor
    labels: Tensor
    pgd: PGD
    restarts: int = 1
    seed: int = 0
    batch_size: int = 128
    indices: Sequence[int] | None = None
    on_attack: Callable[[], None] | None = None
    keep_starts: bool = False
    _kept_starts: dict[tuple[int, int, int], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_examples(self.images, self.labels)
        check_count("restarts", self.restarts, low=1)
        check_count("batch_size", self.batch_size, low=1)

    def for_loss(self, loss: LossKind) -> "AttackedSet":
        """Returns this set, or for the clean loss the set without an attack."""
        check_choice("loss", loss, get_args(LossKind))
        # Without steps all restarts are the image itself.
        return self if loss == "robust" else replace(self, pgd=NO_ATTACK, restarts=1)

    @property
    def batches(self) -> list[slice]:
        """Positions of the images of each batch."""
        count = len(self.images)
        return [slice(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)]

    def units(self, per_batch: bool) -> list[tuple[int | None, list[slice]]]:
        """The units that share a weight perturbation: the set, or each batch by global index.

        A unit is the number of the batch, `None` for the set, and the positions of its images.
        """
        if not per_batch:
            return [(None, self.batches)]
        units: list[tuple[int | None, list[slice]]] = []
        begin = 0
        for batch, members in groupby(self._indices, key=lambda index: index // self.batch_size):
            end = begin + len(list(members))
            units.append((batch, [slice(begin, end)]))
            begin = end
        # Without images there is one unit without batches.
        return units or [(0, [])]

    @property
    def _indices(self) -> Sequence[int]:
        return range(len(self.images)) if self.indices is None else self.indices

    def starts(self, part: slice, restart: int) -> Tensor:
        """Starts of one restart of the attack on a batch, `(N, C, H, W)`."""
        key = (part.start, part.stop, restart)
        if key in self._kept_starts:
            return self._kept_starts[key]
        images, indices = self.images[part], self._indices[part]
        starts = self.pgd.starts(images, indices, seed=self.seed, restart=restart)
        if self.keep_starts:
            self._kept_starts[key] = starts
        return starts

    def attack(
        self,
        model: Model,
        part: slice,
        restarts: Iterable[int] | None = None,
        known: KnownLosses | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attacks one batch by restarts of these numbers, which select their starts, or by all.

        Restarts in `known`, which must be of this network with its present weights and of these
        images, are not repeated, and others are added.

        Returns:
            Highest loss over restarts, and whether none changed the class, `(N,)` each.
        """
        images, labels = self.images[part], self.labels[part]
        losses = torch.full(labels.shape, -math.inf, device=images.device)
        correct = torch.ones_like(labels, dtype=torch.bool)
        known = {} if known is None else known
        for restart in range(self.restarts) if restarts is None else restarts:
            key = (type(self), self.pgd, self.seed, tuple(self._indices[part]), restart)
            if key not in known:
                kept = self.attack_once(model, part, restart)
                if kept.losses is None or kept.predictions is None:
                    raise _refusal(self.pgd)
                known[key] = kept.losses, kept.predictions == labels
            restart_losses, restart_correct = known[key]
            losses = torch.maximum(losses.to(restart_losses), restart_losses)
            correct &= restart_correct
            if self.on_attack is not None:
                self.on_attack()
        return losses, correct

    def attack_once(self, model: Model, part: slice, restart: int) -> Iterate:
        """One restart on one batch, cut up if it does not fit into memory."""
        images = self.images[part]
        # Without a step there is no start.
        start = self.starts(part, restart) if self.pgd.steps else torch.zeros_like(images)
        batch = images, self.labels[part], start
        columns = zip(*fitting(partial(self.pgd.attack, model), *batch))
        return Iterate(*(c[0] if len(c) == 1 else torch.cat(c) for c in columns))

    def adversarial(self, model: Model, part: slice) -> Tensor:
        """Attacks one batch; returns each example of its worst restart `(N, C, H, W)`.

        Without steps these are the images, which costs no forward.
        """
        images, labels = self.images[part], self.labels[part]
        worst = to_float32(images).clone()
        highest = torch.full(labels.shape, -math.inf, device=images.device)
        for restart in range(self.restarts):
            if self.pgd.steps:
                kept = self.attack_once(model, part, restart)
                if kept.losses is None:
                    raise _refusal(self.pgd)
                losses = kept.losses.nan_to_num(math.inf, math.inf)
                higher = (losses > highest).view(-1, *[1] * (images.ndim - 1))
                worst = torch.where(higher, kept.images, worst)
                highest = torch.maximum(highest.to(losses), losses)
            if self.on_attack is not None:
                self.on_attack()
        return worst

    def losses(
        self,
        model: Model,
        parts: Sequence[slice] | None = None,
        restarts: Iterable[int] | None = None,
        known: KnownLosses | None = None,
    ) -> Tensor:
        """Robust loss of each example of some batches, `(N,)`; `None` takes all batches."""
        parts = self.batches if parts is None else parts
        losses = [self.attack(model, part, restarts, known)[0] for part in parts]
        return torch.cat(losses) if losses else self.images.new_zeros(0)


def _refusal(pgd: PGD) -> ValueError:
    return ValueError(f"Expected `keep` to be best for a measure but got {pgd.keep}.")


@dataclass(frozen=True)
class RobustnessResult:
    """Losses and predictions of each example of a set, clean and under PGD, `(N,)` each.

    An example whose logits are not finite, clean or attacked, is incorrect, and its loss there is
    not finite: so are RLoss and its parts.

    Attributes:
        clean_losses: Cross-entropy on the clean images.
        clean_correct: Whether the clean image is classified correctly.
        losses: Cross-entropy on the worst restart's adversarial example.
        robust_correct: Whether the clean image and the adversarial examples of all restarts are
            classified correctly.
    """

    clean_losses: Tensor
    clean_correct: Tensor
    losses: Tensor
    robust_correct: Tensor

    def __repr__(self) -> str:
        """One line: errors and RLoss with their standard errors over examples."""
        error, robust_error = (
            estimate_text(~correct, percent=True)
            for correct in (self.clean_correct, self.robust_correct)
        )
        return (
            f"error {error}, RErr {robust_error}, RLoss {estimate_text(self.losses)} "
            f"({len(self.losses)} examples)"
        )

    @property
    def error(self) -> float:
        """Share of clean images that are misclassified, in [0, 1]."""
        return 1 - _mean(self.clean_correct)

    @property
    def robust_loss(self) -> float:
        """RLoss: mean cross-entropy on adversarial examples, in nats (Sec. 2)."""
        return _mean(self.losses)

    @property
    def robust_error(self) -> float:
        """RErr: share of examples misclassified clean or under attack, in [0, 1]."""
        return 1 - _mean(self.robust_correct)

    @property
    def robust_loss_correct(self) -> float:
        """RLoss of the examples that are correct when clean (Fig. 2); NaN if there are none."""
        return _mean(self.losses[self.clean_correct])

    @property
    def robust_loss_incorrect(self) -> float:
        """RLoss of the examples that are incorrect when clean (Fig. 2); NaN if there are none."""
        return _mean(self.losses[~self.clean_correct])


def estimate_text(values: Tensor, *, percent: bool = False) -> str:
    """The mean of values `(N,)` with its standard error, as results print it.

    Example:
        >>> estimate_text(torch.tensor([1.0, 2.0, 3.0]))
        '2.000 ± 0.577'
        >>> estimate_text(torch.tensor([True, False]), percent=True)
        '50.0 ± 50.0 %'
    """
    values = to_float64(values) * (100 if percent else 1)
    decimals = 1 if percent else 3
    text = f"{_mean(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {(values.std() / math.sqrt(len(values))).item():.{decimals}f}"
    return f"{text} %" if percent else text


def _mean(values: Tensor) -> float:
    return to_float64(values).mean().item() if len(values) else math.nan


def evaluate_robustness(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    restarts: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
    indices: Sequence[int] | None = None,
    on_attack: Callable[[], None] | None = None,
) -> RobustnessResult:
    """RLoss and RErr as the paper estimates them: PGD-20 with 10 restarts (Sec. 3).

    The loss of an example is that of its worst restart. A batch costs `restarts · (steps + 1) + 1`
    forwards and `restarts · steps` backwards to the input. The network is measured and restored as
    `evaluation_context` says.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps: Radius of the attack, such as 8/255.
        steps: Steps of each restart.
        restarts: Number of restarts.
        step_size: Length of a step, as in `PGD`.
        norm: `linf` or `l2`.
        start: Where the attack starts, see `noise.random_start`.
        seed: Seed of the starts, which depend on (seed, example index, restart).
        batch_size: Images measured at once; changes the result by rounding only.
        indices: Global index of each image in the whole measured set; `None` numbers them.
        on_attack: Called after each restart on each batch, for progress.

    Raises:
        ValueError: If pixels, shapes, or an argument are out of range.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> result = evaluate_robustness(model, images, torch.arange(4), eps=0.1, restarts=2)
        >>> result.robust_error >= result.error
        True
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size, indices, on_attack)
    with evaluation_context(model):
        return measure_robustness(model, attacked)


def measure_robustness(
    model: Model, attacked: AttackedSet, known: KnownLosses | None = None
) -> RobustnessResult:
    """`evaluate_robustness` inside `evaluation_context`; `known` is as in `AttackedSet.attack`."""
    clean = replace(attacked.for_loss("clean"), on_attack=None)
    columns: list[tuple[Tensor, ...]] = []
    for part in attacked.batches:
        clean_losses, clean_correct = clean.attack(model, part, known=known)
        losses, correct = attacked.attack(model, part, known=known)
        columns.append((clean_losses, clean_correct, losses, clean_correct & correct))
    if not columns:
        none = attacked.images.new_zeros(0)
        return RobustnessResult(none, none.bool(), none, none.bool())
    return RobustnessResult(*(torch.cat(column) for column in zip(*columns)))


def robust_loss(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    restarts: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    start: Start = "paper",
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Robust loss of each example: its cross-entropy under the worst of the restarts.

    Arguments and errors are those of `evaluate_robustness`, which also returns errors and clean
    losses. The mean of the result `(N,)`, in nats, is the paper's RLoss.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> robust_loss(model, images, torch.arange(4), eps=0.1, restarts=2).shape
        torch.Size([4])
    """
    pgd = PGD(eps, steps, step_size, norm, start=start)
    attacked = AttackedSet(images, labels, pgd, restarts, seed, batch_size)
    with evaluation_context(model):
        return attacked.losses(model)
