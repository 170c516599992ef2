"""Boundary thickness."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.attack import PGD, Keep
from robust_flatness.functional.boundary import BoundaryThicknessResult, boundary_thickness
from robust_flatness.functional.checks import Eps, check_count, check_number, check_radius
from robust_flatness.functional.memory import fitting
from robust_flatness.measures.base import Examples, Measure


@dataclass(kw_only=True)
class BoundaryThickness(Measure):
    """How far it is, on the way to another class, from certainty to the boundary; higher is better.

    The metric is `boundary/thickness/test`, see `functional.boundary` (Yang et al., NeurIPS 2020).
    The way leads to the end of a targeted attack in `l2`, to a random class that is not the label.
    `boundary/not_reached/test` is the share of ways that do not end in that class, and
    `boundary/same_class/test` the share of images that are classified as it from the beginning,
    whose thickness is 0. The ball is not that of the other measures.

    Args:
        alpha: Lower bound of the difference of probabilities.
        beta: Upper bound.
        eps: Radius of the targeted attack in `l2`, in pixel units. Yang et al. measure in units of
            inputs that are divided by about 0.2, so that their lengths are about five times these.
        steps: Number of steps of the targeted attack.
        step_size: Length of a step.
        keep: Which iterate of the attack ends the way: `last` (Yang et al.) or `best`.
        num_points: Number of points on each way.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = BoundaryThickness()(network, images, torch.arange(4))
        >>> bool((result.thickness >= 0).all())
        True
    """

    alpha: float = 0.0
    beta: float = 0.75
    eps: Eps = 1.0
    steps: int = 20
    step_size: Eps = 0.2
    keep: Keep = "last"
    num_points: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, low=-1, high=1)
        check_number("beta", self.beta, low=self.alpha, high=1)
        check_radius("eps", self.eps, "l2")
        check_radius("step_size", self.step_size, "l2")
        check_count("steps", self.steps, low=1)
        check_count("num_points", self.num_points, low=1)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> BoundaryThicknessResult:
        attack = PGD(self.eps, self.steps, self.step_size, "l2", keep=self.keep, start="zero")

        def thickness(images: Tensor, labels: Tensor, indices: Sequence[int]) -> tuple[Tensor, ...]:
            result = boundary_thickness(
                network,
                images,
                labels,
                attack,
                indices=indices,
                seed=self.seed,
                alpha=self.alpha,
                beta=self.beta,
                num_points=self.num_points,
            )
            return result.thickness, result.reached, result.same_class

        none = examples.images.new_zeros(0)
        columns: list[tuple[Tensor, ...]] = [(none, none.bool(), none.bool())]
        for begin in range(0, len(examples), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            batch = examples.images[part], examples.labels[part], examples.indices[part]
            columns += fitting(thickness, *batch)
            examples.progress()
        return BoundaryThicknessResult(*(torch.cat(column) for column in zip(*columns)))

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        names = ("thickness", "not_reached", "same_class")
        return tuple(f"boundary/{name}/{split}" for name in names)

    @override
    def values(self, result: BoundaryThicknessResult) -> tuple[float, ...]:
        columns = (result.thickness, ~result.reached, result.same_class)
        return tuple(column.double().mean().item() for column in columns)

    @override
    def arrays(self, result: BoundaryThicknessResult, split: str) -> dict[str, Tensor]:
        columns = (result.thickness, ~result.reached, result.same_class)
        return dict(zip(self.metric_names(split), columns))

    @property
    @override
    def progress(self) -> tuple[str, int]:
        return f"boundary thickness, {self.num_points} points", 1

    @override
    def passes(self) -> tuple[int, int]:
        # Both ends of each way, and the best iterate.
        return self.num_points + self.steps + 2 + (self.keep == "best"), self.steps
