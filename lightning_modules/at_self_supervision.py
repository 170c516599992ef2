"""Adversarial training with rotation prediction as a second task."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.attack import example_losses
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import module_modes, predicted_classes, to_float32
from robust_flatness.functional.objectives import rotate
from robust_flatness.lightning_modules.at import AT
from robust_flatness.lightning_modules.pgd_mixin import ObjectiveTerms
from robust_flatness.networks import RotationHead

Rotations = Literal["half", "all"]


class ATSelfSupervision(AT):
    """Adversarial training on labels and on rotations (Hendrycks et al., 2019; the paper, Sec. 3).

    The loss is cross-entropy on labels plus λ times that of a second head on rotations. Each is
    attacked on its own, images being rotated before the attack. All examples pass the network and
    the second head as one batch, so that BatchNorm sees their mixture, as in the code of both
    papers. The head shares the network's features; measures and weight perturbations leave it out.
    Augmentation comes before the rotation; in the paper's code it comes after.

    Args:
        lam: Weight λ of the rotation loss; 4 in Table 1, swept over 0.5, 1, 2, 4 and 8.
        rotations: `half` classifies the batch's first half and rotates each image of its second
            half by a random multiple of 90° (the paper), so an epoch sees half of the labels; `all`
            classifies all and rotates all by each multiple, as Hendrycks et al. do with λ = 0.5,
            but they have a linear head and one attack on both losses in train mode.
        adversarial_fraction: Share of each half, or of each rotation, that is attacked; the rest
            stays clean. 1 is the paper's text, 0.5 its code and, by its clean errors, its table.
        hidden: Units of the rotation head's hidden layer.
        args, kwargs: Arguments of `AT`; `incorrect` has no meaning here.

    Raises:
        ValueError: If an argument is out of range, or the network lacks `features`,
            `num_features` or `classifier`.

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
        parts = ("features", "classifier")
        if not isinstance(size, int) or not all(hasattr(self.network, part) for part in parts):
            raise ValueError(
                "Expected `network` to have `features`, `num_features` and `classifier` for the "
                f"rotation head but got {type(self.network).__name__}."
            )
        self.lam, self.rotations, self.fraction = lam, rotations, adversarial_fraction
        self.rotation_head = RotationHead(size, hidden)

    def features(self, images: Tensor) -> Tensor:
        """What both heads see of images `(N, C, S, S)` in [0, 1]."""
        features: Tensor = self.network.features(self.normalize(images))  # type: ignore[operator]
        return features

    def rotation_logits(self, images: Tensor) -> Tensor:
        """Logits `(N, 4)` of the rotation of images `(N, C, S, S)` in [0, 1]."""
        return to_float32(self.rotation_head(self.features(images)))

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images to classify, attacked ones first, then rotated ones likewise."""
        split, (rows, turns) = self._split(len(images)), self._rotations(images)
        attacked = slice(split.attacked)
        starts = self.noise.starts(self.pgd, images.shape, "start", images.device)
        adversarial = self.craft(images[attacked], labels[attacked], start=starts[attacked])
        rotated = rotate(images[rows % len(images)], turns)
        attacked = slice(split.attacked_rotated)
        shape = (len(images) * (1 if self.rotations == "half" else 4), *images.shape[1:])
        starts = self.noise.starts(self.pgd, shape, "start of rotated", images.device)[rows]
        # A bound method has no modes of its own, so network and head get theirs here.
        with module_modes(self, self.pgd.mode):
            against_turns = self.craft(
                rotated[attacked],
                turns[attacked],
                model=self.rotation_logits,
                start=starts[attacked],
            )
        clean = images[split.attacked : split.classified]
        return torch.cat([adversarial, clean, against_turns, rotated[split.attacked_rotated :]])

    def objective(self, images: Tensor, adversarial: Tensor, labels: Tensor) -> ObjectiveTerms:
        """Cross-entropy on labels plus λ times that on rotations."""
        split = self._split(len(images))
        features = self.features(adversarial)
        classified = features[: split.classified]
        logits = to_float32(self.network.classifier(classified))  # type: ignore[operator]
        loss = split.weight * self.training_labels.loss(logits, labels[: split.classified])
        if len(adversarial) == split.classified:
            return loss, logits[: split.attacked], {}
        _, turns = self._rotations(images)
        turn_logits = to_float32(self.rotation_head(features))[split.classified :]
        terms = {
            "train/rotation_loss": example_losses(turn_logits, turns),
            "train/rotation_error": predicted_classes(turn_logits) != turns,
        }
        loss = loss + self.lam * split.rotated_weight * cross_entropy(turn_logits, turns)
        return loss, logits[: split.attacked], terms

    def _split(self, count: int) -> "_Split":
        """How this process's `count` images of a batch, every N-th of all, are split.

        The global batch is split first, so that any number of processes does the same with it.
        """
        world, rank = self.trainer.world_size, self.trainer.global_rank
        total = world * count
        # Halves of one image have no batch statistics: a rest that small is classified.
        rotated = total // 2 if self.rotations == "half" and total >= 4 else 0
        classified = total - rotated
        ends = (
            classified,
            round(self.fraction * classified),
            classified + round(self.fraction * rotated),
        )
        mine, attacked, end = (len(range(rank, end, world)) for end in ends)
        return _Split(
            mine,
            attacked,
            end - mine if self.rotations == "half" else 4 * attacked,
            mine * world / classified,
            (count - mine) * world / rotated if rotated else 1.0,
        )

    def _rotations(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Which images are rotated, attacked ones first, and by how many quarter turns.

        The same whenever it is called for a batch. With `all`, row `turn * N + i` is image i.
        """
        count, split = len(images), self._split(len(images))
        if self.rotations == "half":
            rows = torch.arange(split.classified, count, device=images.device)
            draws = self.noise.uniform("rotation", count, 1, images.device)
            return rows, (draws[split.classified :, 0] * 4).long()
        rows = torch.arange(4 * count, device=images.device).view(4, count)
        rows = torch.cat([part.flatten() for part in rows.tensor_split([split.attacked], dim=1)])
        return rows, rows // count


class _Split(NamedTuple):
    """How a process's part of a batch is split.

    Attributes:
        classified: Number of images that are classified, the first ones.
        attacked: Number of attacked ones among these.
        attacked_rotated: Number of attacked ones among the rotated ones.
        weight: Weight of this process's mean over classified images in the mean over processes.
        rotated_weight: Likewise of its mean over rotated images.
    """

    classified: int
    attacked: int
    attacked_rotated: int
    weight: float
    rotated_weight: float
