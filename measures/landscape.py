"""The loss around the weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import nn
from typing_extensions import override

from robust_flatness.functional.checks import check_choice, check_count
from robust_flatness.functional.landscape import (
    ASCENT_STEPS,
    COUNT,
    LENGTH,
    Direction,
    DirectionKind,
    LandscapeResult,
    SurfaceResult,
    check_direction_kind,
    make_directions,
    measure_landscape,
    measure_surface,
    steps_along,
)
from robust_flatness.functional.robust_loss import LossKind
from robust_flatness.functional.weight_perturbation import RelativeTo
from robust_flatness.measures.base import AttackMeasure, Examples, Processes

SURFACE = "surface"


class LossLandscape(AttackMeasure):
    """RLoss along directions through the weights, and on a plane (Fig. 4); it has no metric.

    The result is a dictionary of landscapes by kind of direction, and `surface`. It costs
    `num_directions · num_steps` attacks on each image for each kind of direction, and
    `surface_steps²` for a surface.

    Args:
        directions: Kinds of directions, `random`, `adversarial` or `hessian`, see
            `functional.weight_directions`. Each is a panel of the figure.
        num_directions: Number of random and of adversarial directions; of `hessian` there is one,
            the eigenvector of λ_max.
        num_steps: Number of steps along each direction.
        relative_to: `layer`, `filter` or `network`: what the length of directions is relative to.
        length: That relative length; None takes the paper's 0.5, or 0.025 for `adversarial`.
        loss: `robust`, or `clean` without attacks.
        surface_steps: Number of steps a side of a surface along two random directions; 0 leaves
            the surface out.
        **kwargs: Arguments of `AttackMeasure`.

    Raises:
        ValueError: If an argument is out of range.
    """

    moves_weights = True

    def __init__(
        self,
        *,
        directions: Sequence[DirectionKind] = ("random",),
        num_directions: int = 10,
        num_steps: int = 51,
        relative_to: RelativeTo = "layer",
        length: float | None = None,
        loss: LossKind = "robust",
        surface_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_count("num_steps", num_steps, low=2)
        check_choice("loss", loss, get_args(LossKind))
        check_count("surface_steps", surface_steps, low=2 if surface_steps else 0)
        for kind in directions:
            check_choice("directions", kind, get_args(DirectionKind))
        check_direction_kind("random", num_directions, relative_to, length)
        self.directions, self.num_directions = list(directions), num_directions
        self.num_steps, self.surface_steps = num_steps, surface_steps
        self.relative_to, self.length, self.loss = relative_to, length, loss

    @override
    def measure_set(
        self, network: nn.Module, examples: Examples, processes: Processes
    ) -> dict[str, LandscapeResult | SurfaceResult]:
        share_out = partial(
            processes.share_out,
            examples=examples,
            chunk=self.batch_size,
            common_fields=("coordinates",),
        )
        attack = f"PGD-{self.pgd.steps}" if self.loss == "robust" else "clean"
        attempts = self.restarts if self.loss == "robust" else 1
        landscapes: dict[str, LandscapeResult | SurfaceResult] = {}
        for kind in self.directions:
            count = COUNT[kind] if kind == "hessian" else self.num_directions
            directions = None
            if kind != "random":
                directions = self._agreed_directions(network, examples, processes, kind, count)
            text = f"landscape, {count} {kind} × {self.num_steps} × {attack}"
            landscapes[kind] = share_out(
                partial(self._landscape, network, kind, directions),
                progress=(text, count * self.num_steps * attempts),
            )
        if self.surface_steps:
            side = self.surface_steps
            landscapes[SURFACE] = share_out(
                partial(self._surface, network),
                progress=(f"surface, {side} × {side} × {attack}", side**2 * attempts),
            )
        return landscapes

    def _landscape(
        self,
        network: nn.Module,
        kind: DirectionKind,
        directions: Iterable[Direction] | None,
        share: Examples,
    ) -> LandscapeResult:
        return measure_landscape(
            network,
            self.attacked(share).for_loss(self.loss),
            directions or self._directions(network, share, kind, self.num_directions),
            steps_along(kind, self.num_steps, None),
        )

    def _surface(self, network: nn.Module, share: Examples) -> SurfaceResult:
        return measure_surface(
            network,
            self.attacked(share).for_loss(self.loss),
            self._directions(network, share, "random", 2),
            steps_along("random", self.surface_steps, None),
        )

    def _agreed_directions(
        self,
        network: nn.Module,
        examples: Examples,
        processes: Processes,
        kind: DirectionKind,
        count: int,
    ) -> list[Direction]:
        """Directions that depend on the images: each process computes them on the whole set."""
        batches = math.ceil(len(examples) / self.batch_size)
        attacks = count * ASCENT_STEPS * batches if kind == "adversarial" else 0
        with processes.bar(f"{kind} directions", attacks) as advance:
            whole = replace(processes.moved(examples), progress=advance)
            directions = list(self._directions(network, whole, kind, count))
        # On GPUs the last digits of two processes may differ.
        processes.broadcast(directions)
        return directions

    def _directions(
        self, network: nn.Module, examples: Examples, kind: DirectionKind, count: int
    ) -> Iterable[Direction]:
        return make_directions(
            network,
            self.attacked(examples).for_loss(self.loss),
            kind,
            count,
            relative_to=self.relative_to,
            length=self.length,
        )

    def length_of(self, name: str) -> float:
        """Relative length of the directions of a landscape."""
        kind = "random" if name == SURFACE else name
        return LENGTH[kind] if self.length is None else self.length

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        return ()

    @override
    def values(self, result: Any) -> tuple[float | None, ...]:
        return ()
