"""Adversarial training with rotation prediction as a second task."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.attack import example_losses
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import module_modes, predicted_classes, to_float32
from robust_flatness.functional.objectives import rotate
from robust_flatness.lightning_modules.at import AT
from robust_flatness.networks import RotationHead

Rotations = Literal["half", "all"]


class _Parts(NamedTuple):
    """How a rank's part of a batch is split.

    Attributes:
        classified: Images that are classified, the first ones.
        hit: Attacked ones among these.
        hit_turned: Attacked ones among the turned ones.
        weight: Of the mean over this rank's classified images in the mean over ranks.
        turned_weight: Of the mean over its turned images.
    """

    classified: int
    hit: int
    hit_turned: int
    weight: float
    turned_weight: float


class ATSelfSupervision(AT):
    """Adversarial training on labels and on rotations (Hendrycks et al., 2019; the paper, Sec. 3).

    Loss is cross-entropy on labels plus λ times that of a second head on rotations, both on
    examples attacked against their own loss, rotated before the attack. All examples go through
    the network and the second head as one batch, so that BatchNorm sees their mixture, as in the
    code of both papers. The head shares the network's features; it takes no part in what is
    measured, nor in weight perturbations. The data's augmentation comes before the rotation; in the
    paper's code it comes after.

    Args:
        lam: Weight λ of the rotation loss; 4 in Table 1, swept over 0.5, 1, 2, 4 and 8.
        rotations: `half` classifies the batch's first half and turns each image of its second half
            by one random multiple of 90° (the paper), so an epoch sees half of the labels; `all`
            classifies all and turns all by each multiple, as Hendrycks et al. do with λ = 0.5.
            Theirs has a linear head and one attack on both losses in train mode, which this has
            not.
        adversarial_fraction: Share of each half, or of each rotation, that is attacked, the rest
            staying clean: 1 is the paper's text, 0.5 its code and, by its clean errors, its table.
        hidden: Units of the rotation head's hidden layer.
        args: The network, as the first argument of `AT`.
        kwargs: Arguments of `AT`; `incorrect` has no meaning here.

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
        """Logits `(N, 4)` of how far images `(N, C, S, S)` in [0, 1] are turned."""
        return to_float32(self.rotation_head(self.features(images)))

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images to classify, attacked ones first, then turned ones likewise."""
        count = len(images)
        classified, hit, hit_turned, *_ = self._parts(count)
        adversarial = self.craft(images[:hit], labels[:hit], rows=(range(hit), count))
        turns = self._turns(images)
        turned = rotate(self._to_turn(images), turns)
        # A bound method has no modes of its own, so network and head get theirs here.
        with module_modes(self, self.pgd.mode):
            against_turns = self.craft(
                turned[:hit_turned],
                turns[:hit_turned],
                model=self.rotation_logits,
                purpose="start of rotated",
                rows=self._turned_rows(count),
            )
        return torch.cat([adversarial, images[hit:classified], against_turns, turned[hit_turned:]])

    def objective(
        self, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy on labels plus λ times that on rotations; logits of attacked examples."""
        classified, hit, _, weight, turned_weight = self._parts(len(images))
        features = self.features(adversarial)
        logits = to_float32(self.network.classifier(features[:classified]))  # type: ignore[operator]
        loss = weight * self.training_labels.loss(logits, labels[:classified])
        if len(adversarial) > classified:
            turns = self._turns(images)
            turn_logits = to_float32(self.rotation_head(features))[classified:]
            self.means.add("train/rotation_loss", example_losses(turn_logits, turns))
            self.means.add("train/rotation_error", predicted_classes(turn_logits) != turns)
            loss = loss + self.lam * turned_weight * cross_entropy(turn_logits, turns)
        return loss, logits[:hit]

    def _parts(self, count: int) -> _Parts:
        """How this rank's `count` images of a batch, every world-th of all, are split.

        The whole batch is split first, so that any number of processes does the same with it.
        """
        world, rank = self.trainer.world_size, self.trainer.global_rank
        total = world * count
        # Halves of one image have no batch statistics: a rest that small is classified.
        turned = total // 2 if self.rotations == "half" and total >= 4 else 0
        classified = total - turned
        ends = (
            classified,
            round(self.fraction * classified),
            classified + round(self.fraction * turned),
        )
        mine, hit, end = (len(range(rank, end, world)) for end in ends)
        return _Parts(
            mine,
            hit,
            end - mine if self.rotations == "half" else 4 * hit,
            mine * world / classified,
            (count - mine) * world / turned if turned else 1.0,
        )

    def _turns(self, images: Tensor) -> Tensor:
        """How far the turned images of a batch are turned, the same whenever it is asked."""
        count, parts = len(images), self._parts(len(images))
        if self.rotations == "half":
            draws = self.draws("rotation", count, 1, images.device)[parts.classified :]
            return (draws[:, 0] * 4).long()
        directions = torch.arange(4, device=images.device)
        counts = (parts.hit, count - parts.hit)
        return torch.cat([directions.repeat_interleave(part) for part in counts])

    def _to_turn(self, images: Tensor) -> Tensor:
        """The images of a batch that are turned, attacked ones first, in the order of `_turns`."""
        parts = self._parts(len(images))
        if self.rotations == "half":
            return images[parts.classified :]
        split = (images[: parts.hit], images[parts.hit :])
        return torch.cat([part.repeat(4, 1, 1, 1) for part in split])

    def _turned_rows(self, count: int) -> tuple[Sequence[int], int]:
        """Whose starts the attacked ones among the turned images take, as `craft` wants it."""
        parts = self._parts(count)
        if self.rotations == "half":
            return range(parts.classified, parts.classified + parts.hit_turned), count
        return [turn * count + row for turn in range(4) for row in range(parts.hit)], 4 * count
