"""The loss around a network's weights, on fixed images and any number of processes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.callbacks.progress import measuring
from robust_flatness.functional.directions import (
    ASCENT_STEPS,
    COUNT,
    LENGTH,
    Direction,
    DirectionKind,
    weight_directions,
)
from robust_flatness.functional.landscape import loss_landscape, loss_surface, steps_along
from robust_flatness.run_folder.files import Landscape

SURFACE = "surface"


class LossAround(Measurement):
    """Measures landscapes along kinds of directions, and a surface; logs nothing.

    Args:
        kinds: Kinds of directions.
        num_directions: Of random and of adversarial ones.
        num_steps: Steps along each direction.
        surface_steps: Steps a side of a surface along two random directions; 0 leaves it out.
        relative_to: As in `functional.weight_directions`.
        length: As in `functional.weight_directions`.
        loss: `robust` or `clean`.
        **kwargs: Those of `Measurement`.

    Attributes:
        found: For each time it measured, landscapes by kind; the surface is called `surface`.
    """

    moves_weights = True

    def __init__(
        self,
        *,
        kinds: Sequence[DirectionKind],
        num_directions: int,
        num_steps: int,
        surface_steps: int,
        relative_to: str,
        length: float | None,
        loss: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.kinds, self.num_directions, self.num_steps = list(kinds), num_directions, num_steps
        self.surface_steps, self.loss = surface_steps, loss
        self.scale: dict[str, Any] = {"relative_to": relative_to, "length": length}
        self.found: list[dict[str, Landscape]] = []

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Adds to `found`; there is no figure to log."""
        with self.network(trainer, pl_module) as network:
            found: dict[str, Landscape] = {
                kind: self._landscape(trainer, pl_module, network, kind) for kind in self.kinds
            }
            if self.surface_steps:
                found[SURFACE] = self._surface(trainer, pl_module, network)
        self.found.append(found)
        return {}

    def count(self, kind: DirectionKind) -> int:
        """Number of directions of a kind."""
        return COUNT[kind] if kind == "hessian" else self.num_directions

    def length_of(self, kind: DirectionKind) -> float:
        """Relative length of directions of a kind."""
        return LENGTH[kind] if self.scale["length"] is None else float(self.scale["length"])

    def _landscape(
        self, trainer: Trainer, module: LightningModule, network: nn.Module, kind: DirectionKind
    ) -> Landscape:
        settings, count = self._settings(trainer), self.count(kind)
        directions: Any = kind
        if kind == "random":
            settings |= {"num_directions": count, **self.scale}
        else:
            directions = self._directions(trainer, module, network, kind)
        points = steps_along(kind, self.num_steps, None)
        values = self.sharded(
            trainer,
            module,
            lambda images, labels, indices, on_attack: loss_landscape(
                network,
                images,
                labels,
                directions=directions,
                num_steps=self.num_steps,
                extent=(points[0], points[-1]),
                indices=indices,
                on_attack=on_attack,
                **settings,
            ).losses.flatten(0, 1),
            what=f"landscape {self.split}: {count} {kind} × {self.num_steps} × PGD-{self.steps}",
            attacks_per_batch=count * self.num_steps * self._attempts,
        )
        return Landscape(
            torch.tensor(points, dtype=torch.float64).numpy(),
            values.unflatten(0, (count, self.num_steps)).numpy(),
        )

    def _surface(self, trainer: Trainer, module: LightningModule, network: nn.Module) -> Landscape:
        settings, side = self._settings(trainer) | self.scale, self.surface_steps
        values = self.sharded(
            trainer,
            module,
            lambda images, labels, indices, on_attack: loss_surface(
                network,
                images,
                labels,
                num_steps=side,
                indices=indices,
                on_attack=on_attack,
                **settings,
            ).losses.flatten(0, 1),
            what=f"surface {self.split}: {side} × {side} × PGD-{self.steps}",
            attacks_per_batch=side**2 * self._attempts,
        )
        points = torch.tensor(steps_along("random", side, None), dtype=torch.float64)
        return Landscape(points.numpy(), values.unflatten(0, (side, side)).numpy())

    def _settings(self, trainer: Trainer) -> dict[str, Any]:
        return {**self.attack_settings(trainer), "loss": self.loss}

    @property
    def _attempts(self) -> int:
        return self.restarts if self.loss == "robust" and self.steps else 1

    def _directions(
        self, trainer: Trainer, module: LightningModule, network: nn.Module, kind: DirectionKind
    ) -> list[Direction]:
        """Directions that depend on the images: of the whole set, and rank 0's on all ranks."""
        examples, count = self.examples(trainer, module), self.count(kind)
        settings = self.attack_settings(trainer)
        del settings["restarts"]
        if self.loss == "clean":
            settings["steps"] = 0
        batches = math.ceil(len(examples) / self.batch_size)
        attacks = count * ASCENT_STEPS * batches if kind == "adversarial" else 0
        with measuring(trainer, f"{kind} directions", attacks) as on_attack:
            found: list[Direction] = list(
                weight_directions(
                    network,
                    examples.images.to(module.device),
                    examples.labels.to(module.device),
                    kind=kind,
                    num_directions=count,
                    on_attack=on_attack,
                    **self.scale,
                    **settings,
                )
            )
        if trainer.world_size > 1:
            # On a GPU two ranks may differ in the last digits.
            for tensor in (tensor for direction in found for tensor in direction.values()):
                torch.distributed.broadcast(tensor, src=0)
        return found
