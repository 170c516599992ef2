"""Local Lipschitz constant of the logits, and divergence under attack."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.attack import PGD, Keep
from robust_flatness.functional.checks import check_count
from robust_flatness.functional.evaluation import logits_function, nan_unless_finite
from robust_flatness.functional.lipschitz import local_lipschitz
from robust_flatness.functional.memory import fitting
from robust_flatness.functional.objectives import divergences
from robust_flatness.functional.robust_loss import estimate_text
from robust_flatness.measures.base import AttackMeasure, Examples


@dataclass(frozen=True)
class LocalLipschitzResult:
    """Values of each example `(N,)`, NaN if its logits are not finite.

    Attributes:
        quotients: Largest ‖z(x) - z(x')‖₁ / ‖x - x'‖ that the search reaches.
        divergences: KL(p(x) ‖ p(x_adv)), in nats.
    """

    quotients: Tensor
    divergences: Tensor

    def __repr__(self) -> str:
        """One line: means with their standard errors over examples."""
        return (
            f"local Lipschitz constant {estimate_text(self.quotients)}, KL under PGD "
            f"{estimate_text(self.divergences)} ({len(self.quotients)} examples)"
        )


@dataclass(kw_only=True)
class LocalLipschitz(AttackMeasure):
    """How much logits and probabilities change around the images; lower is more robust.

    Metrics are `lipschitz/logits/test`, the mean over images of the largest change of the logits,
    see `functional.lipschitz`, and `lipschitz/kl/test`, the mean of KL(p(x) ‖ p(x_adv)) for the
    adversarial example x_adv of the highest cross-entropy (Yang et al., NeurIPS 2020). The first is
    a lower bound, and grows with the scale of the last layer.

    Args:
        search_steps: Number of steps of the search for the largest change, eps/3 each.
        original: Whether to search as Yang et al.'s code does, which is lower: the last instead of
            the best iterate, with the gradient of the distance, see `functional.lipschitz`.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> measure = LocalLipschitz(eps=0.1)
        >>> measure.metrics(measure(network, images, torch.arange(4)), "test").keys()
        dict_keys(['lipschitz/logits/test', 'lipschitz/kl/test'])
    """

    search_steps: int = 10
    original: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("search_steps", self.search_steps, low=1)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> LocalLipschitzResult:
        attacked, logits_of = self.attacked(examples), logits_function(network, examples.images)
        eps, norm = attacked.pgd.eps, self.norm
        keep: Keep = "last" if self.original else "best"
        search = PGD(eps, self.search_steps, eps / 3, norm, keep=keep, start="gaussian")

        def largest(images: Tensor, start: Tensor) -> Tensor:
            return local_lipschitz(network, images, search, start, through_distance=self.original)

        quotients = [examples.images.new_zeros(0)]
        values = [examples.images.new_zeros(0)]
        for part in attacked.batches:
            images, indices = examples.images[part], examples.indices[part]
            start = search.starts(images, indices, seed=self.seed, restart=0)
            quotients += fitting(largest, images, start)
            adversarial = attacked.adversarial(network, part)
            with torch.no_grad():
                clean, logits = logits_of(images), logits_of(adversarial)
            both = torch.cat([clean, logits], 1)
            values.append(nan_unless_finite(divergences(logits, clean), both))
        return LocalLipschitzResult(torch.cat(quotients), torch.cat(values))

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        return f"lipschitz/logits/{split}", f"lipschitz/kl/{split}"

    @override
    def values(self, result: LocalLipschitzResult) -> tuple[float, ...]:
        return result.quotients.double().mean().item(), result.divergences.double().mean().item()

    @override
    def arrays(self, result: LocalLipschitzResult, split: str) -> dict[str, Tensor]:
        return dict(zip(self.metric_names(split), (result.quotients, result.divergences)))

    @property
    @override
    def progress(self) -> tuple[str, int]:
        return f"Lipschitz constant, PGD-{self.steps} × {self.restarts} restarts", self.restarts

    @override
    def passes(self) -> tuple[int, int]:
        # Without steps nothing is attacked.
        forward, backward = super().passes() if self.steps else (0, 0)
        # The search, the images, and both again for the divergence.
        return forward + self.search_steps + 4, backward + self.search_steps
