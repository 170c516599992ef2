"""Adversarial training with rotation prediction as a second task."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import (
    check_choice,
    check_count,
    check_number,
    predicted_classes,
    upcast,
)
from robust_flatness.functional.iterate import example_losses
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
        adversarial_fraction: Share of each half, or of each rotation, that is attacked, the rest
            staying clean: 1 is the paper's text, 0.5 its code and, by its clean errors, its table.
        hidden: Units of the rotation head's hidden layer.
        args: The network, as the first argument of `AT`.
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
        *args: Any,
        lam: float = 4.0,
        rotations: Rotations = "half",
        adversarial_fraction: float = 1.0,
        hidden: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
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

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Looks at the first batch before anything is trained on it.

        Raises:
            ValueError: If processes cannot share out what one process would do with the batch.
        """
        super().on_train_batch_start(batch, batch_idx)
        world = self.trainer.world_size
        if self.batches_seen or world == 1:
            return
        parts, total = self._parts(len(batch[0])), self._parts(world * len(batch[0]))
        if any(world * part != whole for part, whole in zip(parts, total)):
            raise ValueError(
                "Expected the batch of each process to halve, and `adversarial_fraction` of a half "
                f"to be whole images, as on one process, but got {len(batch[0])} images."
            )

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images to classify, attacked ones first, then turned ones likewise."""
        classified, hit, hit_turned = self._parts(len(images))
        adversarial = self.craft(images[:hit], labels[:hit])
        turns = self._turns(images)
        turned = rotate(self._to_turn(images), turns)
        # A bound method has no modes of its own, so network and head get theirs here.
        with module_modes(self, self.pgd.mode):
            against_turns = self.craft(
                turned[:hit_turned],
                turns[:hit_turned],
                model=self.rotation_logits,
                purpose="start of rotated",
            )
        return torch.cat([adversarial, images[hit:classified], against_turns, turned[hit_turned:]])

    def objective(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy on labels plus λ times that on rotations; logits of attacked examples."""
        classified, hit, _ = self._parts(len(images))
        logits = upcast(self(adversarial[:classified]))
        loss = self.training_labels.loss(logits, labels[:classified])
        if len(adversarial) > classified:
            turns = self._turns(images)
            turn_logits = self.rotation_logits(adversarial[classified:])
            self.means.add("train/rotation_loss", example_losses(turn_logits, turns))
            self.means.add("train/rotation_error", predicted_classes(turn_logits) != turns)
            loss = loss + self.lam * cross_entropy(turn_logits, turns)
        return loss, logits[:hit]

    def _parts(self, count: int) -> tuple[int, int, int]:
        """How many images of a batch are classified, attacked among these, attacked when turned."""
        if self.rotations == "all":
            hit = round(self.fraction * count)
            return count, hit, 4 * hit
        # Halves of one image have no batch statistics: a rest that small is classified.
        turned = count // 2 if count >= 4 else 0
        classified = count - turned
        return classified, round(self.fraction * classified), round(self.fraction * turned)

    def _turns(self, images: Tensor) -> Tensor:
        """How far the turned images of a batch are turned, the same whenever it is asked."""
        count, (classified, hit, _) = len(images), self._parts(len(images))
        if self.rotations == "half":
            draws = self.draws("rotation", count - classified, 1, images.device)
            return (draws[:, 0] * 4).long()
        directions = torch.arange(4, device=images.device)
        return torch.cat([directions.repeat_interleave(part) for part in (hit, count - hit)])

    def _to_turn(self, images: Tensor) -> Tensor:
        """The images of a batch that are turned, attacked ones first, in the order of `_turns`."""
        classified, hit, _ = self._parts(len(images))
        if self.rotations == "half":
            return images[classified:]
        return torch.cat([part.repeat(4, 1, 1, 1) for part in (images[:hit], images[hit:])])
