"""Adversarial training with pseudo-labeled images beside the labeled ones."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from robust_flatness.functional.checks import check_choice
from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.pgd_mixin import ObjectiveTerms
from robust_flatness.lightning_modules.trades import TRADES

Loss = Literal["at", "trades"]


class ATUnlabeled(TRADES):
    """Robust self-training (Carmon et al., 2019): batches are mixed of labels and pseudo-labels.

    The data mixes them (`--data.unlabeled_share 0.5`). Any variant trains on such batches; this one
    requires them, logs the share as `unlabeled/share`, and has the two losses of the literature.

    Args:
        loss: `at` treats pseudo-labels as labels in plain AT (the paper), `trades` takes TRADES'
            loss and attack (Carmon et al.).
        args, kwargs: Arguments of `TRADES`; `lam` is used with `loss="trades"` only.

    Raises:
        ValueError: If `loss` is unknown; before the first step, if the data mixes nothing in.

    Example:
        >>> ATUnlabeled(loss="trades").lam
        6.0
    """

    def __init__(self, *args: Any, loss: Loss = "at", **kwargs: Any) -> None:
        check_choice("loss", loss, get_args(Loss))
        self.loss = loss
        super().__init__(*args, **kwargs)

    def check_attack(self) -> None:
        """Refuses what means nothing to TRADES' attack, if that is the attack."""
        if self.loss == "trades":
            super().check_attack()

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Checks that batches contain which images are pseudo-labeled."""
        super().on_train_batch_start(batch, batch_idx)
        if len(batch) < 3:
            raise ValueError(
                "Expected batches `(images, labels, unlabeled)` for ATUnlabeled but got "
                f"{len(batch)} parts; set `data.unlabeled_share`, 0.5 in the paper."
            )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """A step on the whole batch, pseudo-labels as labels."""
        self.means.add({"unlabeled/share": batch[2]})
        return super().training_step(batch, batch_idx)

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """PGD on cross-entropy, or on TRADES' divergence."""
        variant = TRADES if self.loss == "trades" else AT
        return variant.attack(self, images, labels)

    def objective(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> ObjectiveTerms:
        """Cross-entropy under attack, or TRADES' objective."""
        variant = TRADES if self.loss == "trades" else AT
        return variant.objective(self, images, adversarial, labels)
