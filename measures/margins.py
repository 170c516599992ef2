"""Margins of clean and of adversarial images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.evaluation import logits_function, nan_unless_finite
from robust_flatness.functional.margins import margins
from robust_flatness.functional.robust_loss import estimate_text
from robust_flatness.measures.base import AttackMeasure, Examples

_STATISTICS = ("mean", "median", "percentile_10", "probability")


@dataclass(frozen=True)
class MarginsResult:
    """Margins of each example `(N,)`, NaN if its logits are not finite.

    Attributes:
        clean: Logit margins of the images.
        clean_probabilities: Their probability margins.
        robust: Logit margins of the adversarial examples.
        robust_probabilities: Their probability margins.
    """

    clean: Tensor
    clean_probabilities: Tensor
    robust: Tensor
    robust_probabilities: Tensor

    def __repr__(self) -> str:
        """One line: mean logit margins with their standard errors over examples."""
        return (
            f"mean margin {estimate_text(self.clean)}, under PGD {estimate_text(self.robust)} "
            f"({len(self.clean)} examples)"
        )


@dataclass(kw_only=True)
class Margins(AttackMeasure):
    """How far the true class is ahead, z_y - max over j ≠ y of z_j; higher is more robust.

    Metrics are `margin/mean/test`, `margin/median/test`, `margin/percentile_10/test` and, for the
    mean margin of probabilities, `margin/probability/test`; of adversarial examples,
    `margin/robust_mean/test` and so on. The 10th percentile has its sign: the inverse margin 1/γ²
    (Jiang et al., 2020) means nothing if γ < 0, which is so if RErr is above 10 %. Adversarial
    examples are those of the highest cross-entropy.

    Margins do not change with the scale of layers that a BatchNorm follows, but those of logits
    grow with the scale of the last layer.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = Margins(eps=0.1)(network, images, torch.arange(4))
        >>> bool((result.robust <= result.clean).all())
        True
    """

    @override
    def measure(self, network: nn.Module, examples: Examples) -> MarginsResult:
        attacked, logits_of = self.attacked(examples), logits_function(network, examples.images)
        columns = [[examples.images.new_zeros(0)] * 4]
        for part in attacked.batches:
            labels = examples.labels[part]
            values: list[Tensor] = []
            for images in (examples.images[part], attacked.adversarial(network, part)):
                with torch.no_grad():
                    logits = logits_of(images)
                for scores in (logits, logits.softmax(1)):
                    values.append(nan_unless_finite(margins(scores, labels), logits))
            columns.append(values)
        return MarginsResult(*(torch.cat(column) for column in zip(*columns)))

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        prefixes = ("margin/", "margin/robust_")
        return tuple(f"{p}{name}/{split}" for p in prefixes for name in _STATISTICS)

    @override
    def values(self, result: MarginsResult) -> tuple[float, ...]:
        values: list[float] = []
        for margin, probability in (
            (result.clean, result.clean_probabilities),
            (result.robust, result.robust_probabilities),
        ):
            values.append(margin.double().mean().item())
            values += [_quantile(margin, 0.5), _quantile(margin, 0.1)]
            values.append(probability.double().mean().item())
        return tuple(values)

    @override
    def arrays(self, result: MarginsResult, split: str) -> dict[str, Tensor]:
        return {f"margin/mean/{split}": result.clean, f"margin/robust_mean/{split}": result.robust}

    @property
    @override
    def progress(self) -> tuple[str, int]:
        return f"margins, PGD-{self.steps} × {self.restarts} restarts", self.restarts

    @override
    def passes(self) -> tuple[int, int]:
        # Without steps nothing is attacked; images and adversarial examples are evaluated.
        forward, backward = super().passes() if self.steps else (0, 0)
        return forward + 2, backward


def _quantile(values: Tensor, share: float) -> float:
    return values.double().quantile(share).item() if len(values) else math.nan
