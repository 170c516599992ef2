"""Attacks of other radii, of more steps and without gradients, against gradient masking."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import check_count
from robust_flatness.functional.robust_loss import AttackedSet, estimate_text
from robust_flatness.measures.autoattack import FEWEST_PIXELS_OF_SQUARE_L2, AutoAttackError
from robust_flatness.measures.base import AttackMeasure, Examples
from robust_flatness.measures.robust_loss import PREFIX

# Radii are ε/2 and this number of radii from ε to the diameter of the box, by a constant factor.
_RADII = 5
# Forwards of Square besides its queries, for an image that nothing changes.
_SQUARE = 13


@dataclass(frozen=True)
class AttackChecksResult:
    """Which images are classified correctly, clean and under each attack.

    Attributes:
        eps: Radius ε of the other attacks.
        radii: Radii R of the curve.
        correct: Under PGD of each radius, `(R, N)`.
        correct_more_steps: Under PGD with more steps at ε, `(N,)`.
        correct_square: Under Square and both PGD attacks at ε, `(N,)`; None without Square.
    """

    eps: float
    radii: tuple[float, ...]
    correct: Tensor
    correct_more_steps: Tensor
    correct_square: Tensor | None

    def __repr__(self) -> str:
        """One line: RErr with its standard errors over examples."""
        verdicts = {f"at ε = {r:.3g}": row for r, row in zip(self.radii, self.correct)}
        verdicts["with more steps"] = self.correct_more_steps
        if self.correct_square is not None:
            verdicts["and Square"] = self.correct_square
        texts = (f"{name} {estimate_text(~c, percent=True)}" for name, c in verdicts.items())
        return f"RErr {', '.join(texts)} ({len(self.correct_more_steps)} examples)"


@dataclass(kw_only=True)
class AttackChecks(AttackMeasure):
    """RErr for other radii, with more steps and without gradients (Carlini et al., 2019).

    A network may be hard to attack because its gradients mislead, not because it is robust. Then
    RErr does not rise with the radius or with steps, is not 100 % at a radius that reaches every
    image, or an attack without gradients changes more predictions. `run_folder.attack_checks` has
    the rules.

    Metrics are RErr under these attacks: `attack/largest_eps_error/test` at the diameter of [0, 1]
    (1 in `linf`), `attack/more_steps_error/test` and `attack/square_error/test`. Radii of the curve
    are ε/2 and five from ε to that diameter. An attack of another radius has no part in the verdict
    on the next: larger balls contain smaller ones, but attacks may fail in them.

    Square (Andriushchenko et al., 2020) is the official package's, on the images that PGD with more
    steps does not change. It is left out for `l2` and images below five pixels a side.

    `passes` counts Square's for images that no attack changes.

    Args:
        more_steps: Number of steps of the longer attack, at the same step size and starts.
        square_queries: Number of queries of Square, at most; 0 leaves it out. AutoAttack has 5000.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = AttackChecks(eps=0.1)(network, images, torch.arange(4))
        >>> [round(radius, 2) for radius in result.radii]
        [0.05, 0.1, 0.18, 0.32, 0.56, 1.0]
    """

    more_steps: int = 50
    square_queries: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("more_steps", self.more_steps)
        check_count("square_queries", self.square_queries)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> AttackChecksResult:
        attacked, pgd, known = self.attacked(examples), self.pgd, examples.known

        def correct(chosen: AttackedSet) -> Tensor:
            verdicts = [chosen.attack(network, p, known=known)[1] for p in chosen.batches]
            return torch.cat([chosen.labels.new_zeros(0).bool(), *verdicts])

        clean = correct(attacked.for_loss("clean"))
        size = math.prod(examples.images.shape[1:])
        radii = _radii(pgd.eps, 1.0 if self.norm == "linf" else math.sqrt(size))
        attacks = [self._of_radius(radius) for radius in radii]
        curve = torch.stack([clean & correct(replace(attacked, pgd=a)) for a in attacks])
        longer = replace(pgd, steps=self.more_steps)
        more = clean & correct(replace(attacked, pgd=longer))
        square = None
        if self._has_square(examples.images):
            square = self._square(network, examples, more & curve[1])
        return AttackChecksResult(pgd.eps, radii, curve, more, square)

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        names = ("largest_eps", "more_steps", "square")
        return tuple(f"attack/{name}_error/{split}" for name in names)

    @override
    def values(self, result: AttackChecksResult) -> tuple[float | None, ...]:
        columns = (result.correct[-1], result.correct_more_steps, result.correct_square)
        return tuple(None if c is None else 1 - c.double().mean().item() for c in columns)

    @override
    def arrays(self, result: AttackChecksResult, split: str) -> dict[str, Tensor]:
        own, prefix = f"{result.eps:.6g}", f"{PREFIX[split]}/correct_at_eps/"
        arrays = {f"{prefix}{radius:.6g}": row for radius, row in zip(result.radii, result.correct)}
        arrays[f"{prefix}{own}/more_steps"] = result.correct_more_steps
        if result.correct_square is not None:
            arrays[f"{prefix}{own}/square"] = result.correct_square
        return arrays

    @property
    @override
    def progress(self) -> tuple[str, int]:
        # The images, the radii, more steps; Square is one call.
        attacks = self.restarts * (_RADII + 2) + 1 + (self.square_queries > 0)
        return f"checks of the attack, PGD-{self.steps}", attacks

    @override
    def passes(self) -> tuple[int, int]:
        radii, more = (_RADII + 1) * self.restarts, self.restarts
        forward = radii * (self.steps + 1) + more * (self.more_steps + 1) + 1
        if self.square_queries:
            forward += self.square_queries + _SQUARE
        return forward, radii * self.steps + more * self.more_steps

    def _of_radius(self, radius: float) -> PGD:
        pgd = self.pgd
        if radius == pgd.eps or self.step_size is None:
            return replace(pgd, eps=radius)
        relative = min(1.0, self.step_size / pgd.eps) if pgd.eps else 1.0
        return replace(pgd, eps=radius, step_size=relative * radius)

    def _has_square(self, images: Tensor) -> bool:
        large = min(images.shape[2:]) >= FEWEST_PIXELS_OF_SQUARE_L2
        return self.square_queries > 0 and (self.norm == "linf" or large)

    def _square(self, network: nn.Module, examples: Examples, correct: Tensor) -> Tensor:
        attack = AutoAttackError(
            attacks=["square"], eps=self.pgd.eps, norm=self.norm, seed=self.seed
        )
        attack.square_queries, correct = self.square_queries, correct.clone()
        for begin in range(0, len(correct), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            left = correct[part].nonzero()[:, 0] + begin
            if len(left):
                correct[left] = attack.attack(network, examples.images[left], examples.labels[left])
            examples.progress()
        return correct


def _radii(eps: float, diameter: float) -> tuple[float, ...]:
    """Half the radius, the radius, and larger ones up to the diameter of the box."""
    low = eps or diameter / 2**_RADII
    ratio = max(1.0, diameter / low)
    larger = [low * ratio ** (k / (_RADII - 1)) for k in range(1, _RADII)]
    return (eps / 2, eps, *(min(radius, max(eps, diameter)) for radius in larger))
