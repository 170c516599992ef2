"""The loss around the weights."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from torch import nn

from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.directions import (
    ASCENT_STEPS,
    COUNT,
    LENGTH,
    Direction,
    DirectionKind,
    weight_directions,
)
from robust_flatness.functional.flatness import LossKind
from robust_flatness.functional.landscape import (
    LandscapeResult,
    SurfaceResult,
    loss_landscape,
    loss_surface,
    steps_along,
)
from robust_flatness.functional.weight_perturbation import RelativeTo
from robust_flatness.measures.base import AttackMeasure
from robust_flatness.measures.processes import Examples, Processes

SURFACE = "surface"
Landscapes = dict[str, LandscapeResult | SurfaceResult]


class LossLandscape(AttackMeasure):
    """RLoss along directions through the weights, and on a plane (Fig. 4); it has no metric.

    Costs `num_directions · num_steps` attacks on each image for each kind of direction, and
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
        check_count("num_directions", num_directions, low=1)
        check_count("num_steps", num_steps, low=2)
        check_choice("relative_to", relative_to, get_args(RelativeTo))
        check_choice("loss", loss, get_args(LossKind))
        check_count("surface_steps", surface_steps, low=2 if surface_steps else 0)
        check_number("length", 0.0 if length is None else length)
        for kind in directions:
            check_choice("directions", kind, get_args(DirectionKind))
        self.directions, self.num_directions = list(directions), num_directions
        self.num_steps, self.surface_steps = num_steps, surface_steps
        self.relative_to, self.length, self.loss = relative_to, length, loss

    def measure_set(
        self, network: nn.Module, examples: Examples, processes: Processes
    ) -> Landscapes:
        """Landscapes by kind of direction; the surface is called `surface`."""
        attempts = self.restarts if self.loss == "robust" and self.steps else 1
        attack = f"PGD-{self.steps}" if self.loss == "robust" else "clean"
        share_out = partial(
            processes.share_out,
            examples=examples,
            chunk=self.batch_size,
            common_fields=("coordinates",),
        )
        landscapes: Landscapes = {}
        for kind in self.directions:
            count = COUNT[kind] if kind == "hessian" else self.num_directions
            chosen: DirectionKind | list[Direction] = kind
            if kind != "random":
                chosen = self._directions(network, examples, processes, kind, count)
            landscapes[kind] = share_out(
                partial(self._along, network, kind, chosen),
                text=f"landscape, {count} {kind} × {self.num_steps} × {attack}",
                attacks=count * self.num_steps * attempts,
            )
        if self.surface_steps:
            side = self.surface_steps
            landscapes[SURFACE] = share_out(
                partial(self._surface, network),
                text=f"surface, {side} × {side} × {attack}",
                attacks=side**2 * attempts,
            )
        return landscapes

    def _along(
        self,
        network: nn.Module,
        kind: DirectionKind,
        directions: DirectionKind | list[Direction],
        examples: Examples,
    ) -> LandscapeResult:
        steps = steps_along(kind, self.num_steps, None)
        return loss_landscape(
            network,
            examples.images,
            examples.labels,
            directions=directions,
            num_directions=self.num_directions,
            relative_to=self.relative_to,
            length=self.length,
            num_steps=self.num_steps,
            extent=(steps[0], steps[-1]),
            loss=self.loss,
            **self.settings(examples),
        )

    def _surface(self, network: nn.Module, examples: Examples) -> SurfaceResult:
        return loss_surface(
            network,
            examples.images,
            examples.labels,
            relative_to=self.relative_to,
            length=self.length,
            num_steps=self.surface_steps,
            loss=self.loss,
            **self.settings(examples),
        )

    def _directions(
        self,
        network: nn.Module,
        examples: Examples,
        processes: Processes,
        kind: DirectionKind,
        count: int,
    ) -> list[Direction]:
        """Directions that depend on the images: each process computes them on the whole set."""
        settings = self.settings(examples)
        del settings["restarts"]
        if self.loss == "clean":
            settings["steps"] = 0
        batches = math.ceil(len(examples) / self.batch_size)
        attacks = count * ASCENT_STEPS * batches if kind == "adversarial" else 0
        with processes.progress(f"{kind} directions", attacks) as settings["on_attack"]:
            directions: list[Direction] = list(
                weight_directions(
                    network,
                    *processes.moved(examples.images, examples.labels),
                    kind=kind,
                    num_directions=count,
                    relative_to=self.relative_to,
                    length=self.length,
                    **settings,
                )
            )
        # On GPUs the last digits of two processes may differ.
        processes.broadcast(directions)
        return directions

    def length_of(self, kind: str) -> float:
        """Relative length of directions of a kind."""
        kind = "random" if kind == SURFACE else kind
        return LENGTH[kind] if self.length is None else self.length

    def metric_names(self, split: str) -> tuple[str, ...]:
        """None."""
        return ()

    def values(self, result: Landscapes) -> tuple[float | None, ...]:
        """None."""
        return ()
