"""Adversarial training with rotation prediction as a second task."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.attack import example_losses
from robust_flatness.functional.checks import check_choice, check_count, check_number, upcast
from robust_flatness.functional.modes import module_modes
from robust_flatness.functional.rotation import rotate
from robust_flatness.lightning_modules.at import AT
from robust_flatness.networks.rotation_head import RotationHead

Rotations = Literal["half", "all"]


class ATSelfSupervision(AT):
    """Adversarial training on labels and on rotations (Hendrycks et al., 2019; the paper, Sec. 3).

    Loss is cross-entropy on labels plus λ times that of a second head on rotations, both on
    examples attacked against their own loss, rotated before the attack. The head shares the
    network's features; it takes no part in what is measured, nor in weight perturbations. The
    data's augmentation comes before the rotation; in the paper's code it comes after.

    Args:
        lam: Weight λ of the rotation loss; 4 in Table 1, swept over 0.5, 1, 2, 4 and 8.
        rotations: `half` classifies the batch's first half and turns each image of its second half
            by one random multiple of 90° (the paper), so an epoch sees half of the labels; `all`
            classifies all and turns all by each multiple (Hendrycks et al., with λ = 0.5).
        adversarial_fraction: Share of each half that is attacked, the rest staying clean: 1 is the
            paper's text, 0.5 its code and, by its clean errors, its table.
        hidden: Units of the rotation head's hidden layer.
        kwargs: Arguments of `AT`; `incorrect` has no meaning here.

    Raises:
        ValueError: If an argument is out of range, or the network has no `features`.

    Example:
        >>> from functools import partial
        >>> from robust_flatness.networks import ResNet18
        >>> ATSelfSupervision(network=partial(ResNet18, width=4)).lam
        4.0
    """

    def __init__(
        self,
        *,
        lam: float = 4.0,
        rotations: Rotations = "half",
        adversarial_fraction: float = 1.0,
        hidden: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_number("lam", lam)
        check_choice("rotations", rotations, get_args(Rotations))
        check_number("adversarial_fraction", adversarial_fraction, high=1.0)
        check_count("hidden", hidden, low=1)
        if self.incorrect != "attack":
            raise ValueError(
                "Expected `incorrect` to be attack for ATSelfSupervision, where half of the images "
                f"are not classified, but got {self.incorrect}."
            )
        size = getattr(self.network, "num_features", None)
        if not isinstance(size, int) or not hasattr(self.network, "features"):
            raise ValueError(
                "Expected `network` to have `features` and `num_features` for the rotation head "
                f"but got {type(self.network).__name__}."
            )
        self.lam, self.rotations, self.fraction = lam, rotations, adversarial_fraction
        self.rotation_head = RotationHead(size, hidden)

    def rotation_logits(self, images: Tensor) -> Tensor:
        """Logits `(N, 4)` of how far images `(N, C, S, S)` in [0, 1] are turned."""
        features = self.network.features(self.normalize(images))  # type: ignore[operator]
        return upcast(self.rotation_head(features))

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Examples to classify, then rotated ones, each attacked against its own loss."""
        count = self._classified(len(images))
        turns = self._turns(images)
        source = images.repeat(4, 1, 1, 1) if self.rotations == "all" else images[count:]
        turned = rotate(source, turns)
        first, second = self._attacked_of(count), self._attacked_of(len(turned))
        adversarial = self.craft(images[:first], labels[:first])
        # A bound method has no modes of its own, so network and head get theirs here.
        with module_modes(self, self.pgd.mode):
            against_turns = self.craft(
                turned[:second],
                turns[:second],
                model=self.rotation_logits,
                purpose="start of rotated",
            )
        return torch.cat([adversarial, images[first:count], against_turns, turned[second:]])

    def objective(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy on labels plus λ times that on rotations; logits of attacked examples."""
        count = self._classified(len(images))
        logits = upcast(self(adversarial[:count]))
        turns = self._turns(images)
        turn_logits = self.rotation_logits(adversarial[count:])
        self.means.add("train/rotation_loss", example_losses(turn_logits, turns))
        self.means.add("train/rotation_error", turn_logits.argmax(1) != turns)
        loss = self.training_labels.loss(logits, labels[:count])
        return loss + self.lam * cross_entropy(turn_logits, turns), logits[
            : self._attacked_of(count)
        ]

    def _classified(self, count: int) -> int:
        return count if self.rotations == "all" else (count + 1) // 2

    def _attacked_of(self, count: int) -> int:
        return round(self.fraction * count)

    def _turns(self, images: Tensor) -> Tensor:
        """How far the rotated images of this batch are turned, the same whenever it is asked."""
        if self.rotations == "all":
            return torch.arange(4, device=images.device).repeat_interleave(len(images))
        count = len(images) - self._classified(len(images))
        return (self.draws("rotation", count, 1, images.device)[:, 0] * 4).long()
