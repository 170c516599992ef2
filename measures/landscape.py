"""The loss around the weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(kw_only=True)
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
    """

    directions: Sequence[DirectionKind] = ("random",)
    num_directions: int = 10
    num_steps: int = 51
    relative_to: RelativeTo = "layer"
    length: float | None = None
    loss: LossKind = "robust"
    surface_steps: int = 0
    moves_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_steps", self.num_steps, low=2)
        check_count("surface_steps", self.surface_steps, low=2 if self.surface_steps else 0)
        for kind in self.directions:
            check_choice("directions", kind, get_args(DirectionKind))
        check_direction_kind("random", self.num_directions, self.relative_to, self.length)

    @override
    def measure_set(
        self, network: nn.Module, examples: Examples, processes: Processes
    ) -> dict[str, LandscapeResult | SurfaceResult]:
        names = [*self.directions, *([SURFACE] if self.surface_steps else [])]
        return {name: self._landscape(network, examples, processes, name) for name in names}

    def _landscape(
        self, network: nn.Module, examples: Examples, processes: Processes, name: str
    ) -> LandscapeResult | SurfaceResult:
        is_surface = name == SURFACE
        kind: Any = "random" if is_surface else name
        steps = self.surface_steps if is_surface else self.num_steps
        count = {SURFACE: 2, "hessian": COUNT["hessian"]}.get(name, self.num_directions)
        points = steps**2 if is_surface else count * steps
        directions = self._directions(network, examples, processes, kind, count)
        function: Callable[..., Any] = measure_surface if is_surface else measure_landscape

        def measure(share: Examples) -> Any:
            attacked = self.attacked(share).for_loss(self.loss)
            return function(network, attacked, directions, steps_along(kind, steps, None))

        attack, attempts = ("clean", 1)
        if self.loss == "robust" and self.steps:
            attack, attempts = f"PGD-{self.steps}", self.restarts
        return processes.share_out(
            measure,
            examples,
            chunk=self.batch_size,
            progress=(f"landscape, {name}, {points} points × {attack}", points * attempts),
            common_fields=("coordinates",),
        )

    def _directions(
        self,
        network: nn.Module,
        examples: Examples,
        processes: Processes,
        kind: DirectionKind,
        count: int,
    ) -> Iterable[Direction]:
        """Directions; those that depend on the images are computed by each process on all."""
        attacks = ASCENT_STEPS * count * math.ceil(len(examples) / self.batch_size)
        text = f"{kind} directions"
        with processes.bar(text, attacks if kind == "adversarial" else 0) as advance:
            whole = replace(processes.moved(examples), progress=advance)
            attacked = self.attacked(whole).for_loss(self.loss)
            directions = make_directions(
                network, attacked, kind, count, relative_to=self.relative_to, length=self.length
            )
            if kind == "random":
                # They are made one after the other, and are the same on all processes.
                return directions
            computed = list(directions)
        # On GPUs the last digits of two processes may differ.
        processes.broadcast(computed)
        return computed

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
