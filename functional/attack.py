"""Projected gradient descent, with the paper's choices as defaults."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import (
    check_choice,
    check_count,
    check_examples,
    check_radius,
)
from robust_flatness.functional.evaluation import (
    Mode,
    Model,
    bfloat16_autocast,
    crafts_fast,
    differentiable,
    logits_function,
    nan_unless_finite,
    predicted_classes,
    to_float32,
)
from robust_flatness.functional.noise import Norm, Start, example_starts, per_example_norm

Criterion = Callable[[Tensor, Tensor], Tensor]


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, `(N,)`: what an attack ascends by default."""
    return cross_entropy(logits, labels, reduction="none")


class Iterate(NamedTuple):
    """The iterate that an attack keeps for each example.

    Attributes:
        images: Adversarial examples `(N, C, H, W)` in [0, 1].
        losses: The attack's objective there, `(N,)`; `None` where the last iterate is kept, which
            saves the forward that would tell it.
        predictions: Predicted classes there, `(N,)`, -1 if logits are not finite; `None` likewise.
    """

    images: Tensor
    losses: Tensor | None
    predictions: Tensor | None

    def keep_higher_loss(self, images: Tensor, losses: Tensor, logits: Tensor) -> "Iterate":
        """For each example the iterate of higher loss, the earlier one on ties.

        A loss that is not a number, or that comes from logits that are not finite, is the highest.

        Args:
            images: The later iterate `(N, C, H, W)`.
            losses: Its losses `(N,)`.
            logits: Its logits `(N, K)`.
        """
        predictions, losses = predicted_classes(logits), nan_unless_finite(losses, logits)
        if self.losses is None or self.predictions is None:
            return Iterate(images, losses, predictions)
        higher = losses.nan_to_num(math.inf, math.inf) > self.losses.nan_to_num(math.inf, math.inf)
        return Iterate(
            torch.where(higher.view(-1, *[1] * (images.ndim - 1)), images, self.images),
            torch.where(higher, losses, self.losses),
            torch.where(higher, predictions, self.predictions),
        )

    @torch.no_grad()
    def reevaluated(
        self, network: Callable[[Tensor], Tensor], labels: Tensor, criterion: Criterion
    ) -> "Iterate":
        """The same images with the losses and predictions that the model has there now.

        Args:
            network: Maps images to logits.
            labels: Handed to `criterion`.
            criterion: Maps logits and labels to losses `(N,)`.

        Returns:
            Itself, if it has no losses.
        """
        if self.losses is None:
            return self
        logits = network(self.images)
        return Iterate(self.images, None, None).keep_higher_loss(
            self.images, criterion(logits, labels), logits
        )


Keep = Literal["best", "last"]


@dataclass(frozen=True)
class PGD:
    """How projected gradient descent is run (Madry et al., 2018; Sec. 3 of the paper).

    Args:
        eps: Radius of the perturbation, in pixel units of images in [0, 1].
        steps: Number of gradient steps.
        step_size: Length of a step; `None` takes eps · 0.007 / (8/255), the paper's 0.007 at 8/255.
        norm: `linf`, or `l2` with per-example norms.
        keep: `best` keeps the iterate of highest loss for each example, the start included (the
            paper), at one more forward; `last` keeps the last one (Rice et al., torchattacks).
        start: Where the attack starts, see `random_start`.
        mode: `eval` uses and leaves BatchNorm's running statistics (the paper); `train` crafts on
            batch statistics and moves the running ones (Rice et al.).

    Raises:
        ValueError: If a number is negative, above 1 with `linf`, or a choice unknown.

    Example:
        >>> round(PGD(eps=8 / 255).length, 6)
        0.007
    """

    eps: float
    steps: int = 7
    step_size: float | None = None
    norm: Norm = "linf"
    keep: Keep = "best"
    start: Start = "paper"
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, get_args(Norm))
        check_radius("eps", self.eps, self.norm)
        check_count("steps", self.steps)
        if self.step_size is not None:
            check_radius("step_size", self.step_size, self.norm)
        check_choice("keep", self.keep, get_args(Keep))
        check_choice("start", self.start, get_args(Start))
        check_choice("mode", self.mode, get_args(Mode))

    @property
    def length(self) -> float:
        """Length of one step, in pixel units."""
        return self.eps * 0.007 / (8 / 255) if self.step_size is None else self.step_size

    def attack(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        criterion: Criterion = example_losses,
    ) -> Iterate:
        """Runs the attack from given perturbations.

        A batch costs `steps` forwards and `steps` backwards to the input alone, plus one forward
        where the best iterate is kept, and one more inside `fast_crafting`. Images and
        perturbations are in float32, or in float64 if the images are; the network gets them in the
        type of its weights. A gradient that is not a number moves nothing.

        Args:
            model: Maps images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
            images: The clean images; never modified.
            labels: Handed to `criterion`: classes `(N,)`, or any target with N rows.
            start: Perturbations `(N, C, H, W)`, projected before use; ignored without steps.
            criterion: Maps logits and labels to the losses `(N,)` to be raised.

        Returns:
            The kept iterate of each example, without a graph.
        """
        with differentiable(model, self.mode):
            network = logits_function(model, images)
            # Tensors made under inference mode cannot be saved for backward, their clones can.
            images, labels = to_float32(images.detach()).clone(), labels.clone()
            if not (self.steps and crafts_fast(images.device)):
                return self._kept(network, images, labels, start, criterion)
            with bfloat16_autocast(images.device):
                found = self._kept(network, images, labels, start, criterion)
            return found.reevaluated(network, labels, criterion)

    def _kept(
        self,
        network: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        criterion: Criterion,
    ) -> Iterate:
        # Without a step there is no attack, so a random start must not count as one.
        adversarial = self.begin(images, start if self.steps else torch.zeros_like(images))
        best = Iterate(adversarial, None, None)
        for _ in range(self.steps):
            adversarial.requires_grad_()
            logits = network(adversarial)
            losses = criterion(logits, labels)
            (gradient,) = torch.autograd.grad(losses.sum(), adversarial)
            adversarial = adversarial.detach()
            if self.keep == "best":
                best = best.keep_higher_loss(adversarial, losses.detach(), logits.detach())
            adversarial = self.move(adversarial, gradient, images)
        if self.keep == "last":
            return Iterate(adversarial, None, None)
        with torch.no_grad():
            logits = network(adversarial)
            return best.keep_higher_loss(adversarial, criterion(logits, labels), logits)

    def starts(self, images: Tensor, indices: Sequence[int], *, seed: int, restart: int) -> Tensor:
        """Starts `(N, C, H, W)` that depend on (seed, example index, restart) alone.

        Args:
            images: `(N, C, H, W)`; gives shape, dtype and device.
            indices: Global index of each image in the measured set.
            seed: The measure's seed.
            restart: Number of the restart.
        """
        return example_starts(
            images,
            indices,
            eps=self.eps,
            norm=self.norm,
            start=self.start,
            seed=seed,
            restart=restart,
        )

    def begin(self, images: Tensor, start: Tensor) -> Tensor:
        """Images `(N, C, H, W)` moved by a start, within the ball and the box."""
        return self._project(images + start.to(images), images)

    def move(self, adversarial: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Adversarial examples `(N, C, H, W)` one step further, within the ball and the box."""
        return self._project(adversarial + self._step(gradient), images)

    def _step(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return self.length * gradient.sign()
        # A gradient of zeros has no direction, nor has one that is not finite: both give zeros.
        tiny = torch.finfo(gradient.dtype).tiny
        step = self.length * gradient / per_example_norm(gradient, "l2").clamp_min(tiny)
        return step.nan_to_num(0.0, 0.0, 0.0)

    def _project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        delta = adversarial - images
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            tiny = torch.finfo(delta.dtype).tiny
            length = per_example_norm(delta, "l2").clamp_min(tiny)
            delta = delta * (self.eps / length).clamp_max(1)
        # Clamping to the box moves each pixel towards the image, so the ball is kept.
        return (images + delta).clamp(0, 1)


def pgd_attack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 7,
    step_size: float | None = None,
    norm: Norm = "linf",
    keep: Keep = "best",
    start: Start = "paper",
    mode: Mode = "eval",
    criterion: Criterion = example_losses,
    seed: int = 0,
) -> Tensor:
    """Adversarial examples by projected gradient descent (Madry et al., 2018).

    Modes of the modules, `.grad`, BatchNorm buffers (in `eval` mode) and global random state are
    left as they were, unless `forward` itself moves them in eval mode; works under `torch.no_grad`
    and `torch.inference_mode` too.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps: Radius of the perturbation, say 8/255; 0 returns the images.
        steps: Number of gradient steps; 0 returns the images.
        step_size: Length of a step; `None` is the paper's 0.007 at 8/255, in proportion elsewhere.
        norm: `linf` or `l2`.
        keep: `best` (the paper) or `last` iterate.
        start: `paper`, `uniform`, `gaussian` or `zero`, see `random_start`.
        mode: `eval` (the paper) or `train`.
        criterion: What the attack raises, per example.
        seed: Of the starts; example i has a generator of its own, whatever the batch.

    Returns:
        Adversarial examples `(N, C, H, W)` in [0, 1], at most `eps` from the images; in float32 if
        the images are of half precision, which is too coarse for a ball.

    Raises:
        ValueError: If pixels, shapes, or an argument are not as above.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> adversarial = pgd_attack(model, images, torch.arange(4), eps=8 / 255)
        >>> bool((adversarial - images).abs().max() <= 8 / 255 + 1e-7)
        True
    """
    pgd = PGD(eps, steps, step_size, norm, keep, start, mode)
    check_examples(images, labels)
    if eps == 0 or steps == 0:
        return to_float32(images).clone()
    starts = pgd.starts(images, range(len(images)), seed=seed, restart=0)
    return pgd.attack(model, images, labels, starts, criterion).images


@dataclass(frozen=True)
class FriendlyPGD(PGD):
    """PGD-τ: keeps the iterate that is misclassified for the (τ+1)-th time, or the last before.

    The paper's rows PGD-7-0 to PGD-7-3. As in the paper's code an example that no iterate fools
    stays clean; Zhang et al. keep its last iterate.

    Args:
        tau: How many more misclassified iterates τ are gone through after the first.

    Other args are those of `PGD`; `keep` is not used.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> FriendlyPGD(eps=0.1, tau=1).tau
        1
    """

    tau: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("tau", self.tau)

    def attack(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        criterion: Criterion = example_losses,
    ) -> Iterate:
        """Runs the attack from given perturbations; n steps cost n + 1 forwards, n backwards.

        Args:
            model: Maps images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
            images: The clean images; never modified.
            labels: Classes `(N,)`, or logits or probabilities `(N, K)` of the class to leave.
            start: Perturbations `(N, C, H, W)`, projected before use.
            criterion: Maps logits and labels to the losses `(N,)` to be raised.

        Returns:
            The kept iterate of each example, without a graph.
        """
        with differentiable(model, self.mode):
            network = logits_function(model, images)
            images, labels = to_float32(images.detach()).clone(), labels.clone()
            classes = labels if labels.ndim == 1 else predicted_classes(labels)
            adversarial = self.begin(images, start)
            kept, fooled = images, torch.zeros(len(images), dtype=torch.long, device=images.device)
            for _ in range(self.steps):
                adversarial.requires_grad_()
                logits = network(adversarial)
                (gradient,) = torch.autograd.grad(criterion(logits, labels).sum(), adversarial)
                adversarial = adversarial.detach()
                kept, fooled = self._keep(kept, fooled, adversarial, logits, classes)
                adversarial = self.move(adversarial, gradient, images)
            if self.steps:
                with torch.no_grad():
                    logits = network(adversarial)
                kept, fooled = self._keep(kept, fooled, adversarial, logits, classes)
            return Iterate(kept, None, None)

    def _keep(
        self, kept: Tensor, fooled: Tensor, adversarial: Tensor, logits: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        predicted = predicted_classes(logits.detach())
        # The prediction to leave may be undefined as well.
        wrong = (predicted != classes) | (predicted < 0)
        take = wrong & (fooled <= self.tau)
        shape = (-1, *[1] * (kept.ndim - 1))
        return torch.where(take.view(shape), adversarial, kept), fooled + wrong
