"""Projected gradient descent, with the paper's choices as defaults."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import (
    check_choice,
    check_count,
    check_examples,
    check_number,
    check_radius,
)
from robust_flatness.functional.evaluation import (
    Mode,
    Model,
    bfloat16_autocast,
    differentiable,
    has_bfloat16,
    held_scales,
    logits_function,
    predicted_classes,
    to_float32,
)
from robust_flatness.functional.noise import (
    Norm,
    Start,
    keyed_generator,
    per_example_norm,
    random_start,
)

Criterion = Callable[[Tensor, Tensor], Tensor]
Keep = Literal["best", "last"]
Precision = Literal["float32", "bfloat16"]


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example `(N,)`: the default criterion of an attack."""
    return cross_entropy(logits, labels, reduction="none")


class Iterate(NamedTuple):
    """Adversarial examples `(N, C, H, W)` with losses and predicted classes `(N,)`.

    A class is -1 if a logit is not finite. Losses and classes are `None` if the attack keeps the
    last iterate, which saves a forward.
    """

    images: Tensor
    losses: Tensor | None = None
    predictions: Tensor | None = None

    def keep_higher_loss(self, images: Tensor, losses: Tensor, logits: Tensor) -> "Iterate":
        """Takes, for each example, this or a later iterate by its loss, this one on ties.

        A loss that is NaN, or that comes from logits that are not finite, is the highest.
        """
        # `predicted_classes` and `nan_unless_finite` in fewer operations.
        finite = logits.isfinite().all(1)
        predictions = torch.where(finite, logits.argmax(1), -1)
        losses = torch.where(finite, losses, math.nan)
        if self.losses is None or self.predictions is None:
            return Iterate(images, losses, predictions)
        higher = losses.nan_to_num(math.inf, math.inf) > self.losses.nan_to_num(math.inf, math.inf)
        return Iterate(
            torch.where(_per_image(higher, images), images, self.images),
            torch.where(higher, losses, self.losses),
            torch.where(higher, predictions, self.predictions),
        )


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry et al., 2018; Sec. 3 of the paper).

    Args:
        eps: Radius of the perturbation, in pixel units of images in [0, 1].
        steps: Number of gradient steps.
        step_size: Length of a step; `None` is eps · 0.007 / (8/255), the paper's 0.007 at 8/255.
        norm: `linf`, or `l2` with per-example norms.
        keep: `best` keeps the iterate of highest loss for each example, the start included (the
            paper), at the cost of one more forward; `last` keeps the last one (Rice et al.).
        start: Where the attack starts, see `random_start`.
        mode: `eval` uses BatchNorm's running statistics (the paper); `train` uses those of the
            batch and updates the running ones (Rice et al.).
        precision: `bfloat16` searches under bfloat16 autocast on GPUs that have it, and evaluates
            the best iterate anew in float32. Perturbations are float32 in both cases.
        start_scale: Factor k on the radius of a `paper` or `uniform` start, U(-kε, kε) for `linf`.
        projection: Whether perturbations are projected onto the ball. Without, they are clamped to
            pixels in [0, 1] alone, and reach up to kε + steps · step_size: for training only.
        fold_batch_norm: Whether BatchNorm is computed with the convolution before it, which is
            faster and rounds differently. It needs `mode="eval"`. A network in which no BatchNorm
            alone uses the output of a convolution is used as it is, with a warning.

    Single-step attacks of training are, with `steps=1`, `start="uniform"` and `keep="last"`:
    FGSM-RS (Wong et al., 2020) with `step_size=1.25 * eps`, and N-FGSM (de Jorge et al., 2022) with
    `step_size=eps`, `start_scale=2` and `projection=False`; both codes take `mode="train"`.

    Raises:
        ValueError: If a number is negative, above 1 with `linf`, or a choice unknown.

    Example:
        >>> round(PGD(eps=8 / 255).length, 6)
        0.007
        >>> n_fgsm = PGD(0.1, 1, 0.1, keep="last", start="uniform", start_scale=2, projection=False)
        >>> images, start = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[-0.2, 0.1]]]])
        >>> n_fgsm.move(n_fgsm.begin(images, start), torch.ones(1, 1, 1, 2), images)
        tensor([[[[0.4000, 0.7000]]]])
    """

    eps: float
    steps: int = 7
    step_size: float | None = None
    norm: Norm = "linf"
    keep: Keep = "best"
    start: Start = "paper"
    mode: Mode = "eval"
    precision: Precision = "float32"
    start_scale: float = 1.0
    projection: bool = True
    fold_batch_norm: bool = False

    def __post_init__(self) -> None:
        choices = {"norm": Norm, "keep": Keep, "start": Start, "mode": Mode, "precision": Precision}
        for name, kind in choices.items():
            check_choice(name, getattr(self, name), get_args(kind))
        check_radius("eps", self.eps, self.norm)
        check_radius("step_size", self.length, self.norm)
        check_count("steps", self.steps)
        check_number("start_scale", self.start_scale)
        if self.fold_batch_norm:
            check_choice("mode", self.mode, ("eval",))

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
        """Runs the attack from the perturbations `start`.

        A batch costs `steps` forwards, `steps` backwards to the input alone, one forward if the
        best iterate is kept, and one more in bfloat16. Images and perturbations are in float32, or
        in float64 if the images are; the network gets them in the type of its weights. A gradient
        that is NaN moves nothing.

        Args:
            model: Maps images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.
            images: The clean images; never modified.
            labels: Passed to `criterion`: classes `(N,)`, or any target with N rows.
            start: Perturbations `(N, C, H, W)`, projected before use; ignored without steps.
            criterion: Maps logits and labels to the losses `(N,)` that the attack increases.

        Returns:
            The kept iterate of each example, without a graph.
        """
        with differentiable(model, self.mode), held_scales(model):
            network = logits_function(model, images)
            # Tensors made under inference mode cannot be saved for backward, their clones can.
            images, labels = to_float32(images.detach()).clone(), labels.clone()
            folded: AbstractContextManager[None] = nullcontext()
            if self.fold_batch_norm and self.steps and len(images):
                # Imported late: other projects load the callbacks without this option.
                from robust_flatness.functional.batch_norm import folded_batch_norm

                folded = folded_batch_norm(model, network, images[:1])
            if self.precision == "float32" or not self.steps or not has_bfloat16(images.device):
                with folded:
                    return self._search(network, images, labels, start, criterion)
            with bfloat16_autocast(images.device), folded:
                kept = self._search(network, images, labels, start, criterion)
            if kept.losses is None:
                return kept
            with torch.no_grad():
                logits = network(kept.images)
                losses = criterion(logits, labels)
            return Iterate(kept.images).keep_higher_loss(kept.images, losses, logits)

    def _search(
        self, network: Model, images: Tensor, labels: Tensor, start: Tensor, criterion: Criterion
    ) -> Iterate:
        # Without a step there is no attack, so a random start must not count as one.
        adversarial = self.begin(images, start if self.steps else torch.zeros_like(images))
        best = Iterate(adversarial)
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
            return Iterate(adversarial)
        with torch.no_grad():
            logits = network(adversarial)
            return best.keep_higher_loss(adversarial, criterion(logits, labels), logits)

    def starts(self, images: Tensor, indices: Sequence[int], *, seed: int, restart: int) -> Tensor:
        """Draws starts that depend on (seed, example index, restart) alone, whatever the batch.

        They are `(N, C, H, W)`, in the dtype of `images` but at least float32.
        """
        draws = [
            self.draw_start((1, *images.shape[1:]), keyed_generator(seed, "start", index, restart))
            for index in indices
        ]
        # Half precision is too coarse for a perturbation.
        dtype = torch.promote_types(images.dtype, torch.float32)
        starts = torch.cat(draws) if draws else torch.zeros(images.shape)
        return starts.to(images.device, dtype)

    def draw_start(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws a start of shape `(N, C, H, W)`, see `random_start`."""
        radius = self.eps * self.start_scale
        return random_start(
            shape, eps=radius, norm=self.norm, start=self.start, generator=generator
        )

    def begin(self, images: Tensor, start: Tensor) -> Tensor:
        """Returns the images `(N, C, H, W)` plus a start, projected onto the ball and the box."""
        return self._project(images + start.to(images), images)

    def move(self, adversarial: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Returns adversarial examples one step further, projected onto the ball and the box."""
        if self.norm == "linf":
            moved = adversarial.add(gradient.sign(), alpha=self.length)
        else:
            # A gradient of zeros has no direction, nor has one that is not finite: both give zeros.
            tiny = torch.finfo(gradient.dtype).tiny
            step = self.length * gradient / per_example_norm(gradient, "l2").clamp_min(tiny)
            moved = step.nan_to_num_(0.0, 0.0, 0.0).add_(adversarial)
        return self._project(moved, images)

    def _project(self, moved: Tensor, images: Tensor) -> Tensor:
        """Projects examples that nothing else holds, in place."""
        if not self.projection:
            return moved.clamp_(0, 1)
        delta = moved.sub_(images)
        if self.norm == "linf":
            delta.clamp_(-self.eps, self.eps)
        else:
            tiny = torch.finfo(delta.dtype).tiny
            length = per_example_norm(delta, "l2").clamp_min(tiny)
            delta.mul_((self.eps / length).clamp_max(1))
        # Clamping to the box moves each pixel towards the image, so the ball is kept.
        return delta.add_(images).clamp_(0, 1)


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
    fold_batch_norm: bool = False,
) -> Tensor:
    """Adversarial examples by projected gradient descent (Madry et al., 2018).

    Modes, `.grad`, BatchNorm buffers (in `eval` mode) and global random state are not changed. It
    works under `torch.no_grad` and `torch.inference_mode` too.

    Args:
        model: Maps images in [0, 1] to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1].
        labels: `(N,)` true classes.
        eps, steps, step_size, norm, keep, start, mode, fold_batch_norm: As in `PGD`.
        criterion: Maps logits and labels to the losses `(N,)` that the attack increases.
        seed: Seed of the starts; example i has its own generator, whatever the batch.

    Returns:
        Adversarial examples `(N, C, H, W)` in [0, 1], at most `eps` from the images; in float32 if
        the images have half precision, which is too coarse for a ball.

    Raises:
        ValueError: If pixels, shapes, or an argument are not as above.

    Example:
        >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> adversarial = pgd_attack(model, images, torch.arange(4), eps=8 / 255)
        >>> bool((adversarial - images).abs().max() <= 8 / 255 + 1e-7)
        True
    """
    pgd = PGD(eps, steps, step_size, norm, keep, start, mode, fold_batch_norm=fold_batch_norm)
    check_examples(images, labels)
    if eps == 0 or steps == 0:
        return to_float32(images).clone()
    starts = pgd.starts(images, range(len(images)), seed=seed, restart=0)
    return pgd.attack(model, images, labels, starts, criterion).images


@dataclass(frozen=True)
class FriendlyPGD(PGD):
    """PGD-τ: keeps the iterate that is misclassified for the (τ+1)-th time, or the last before.

    The paper's rows PGD-7-0 to PGD-7-3. As in the paper's code an example that no iterate fools
    stays clean; Zhang et al. keep its last iterate. An attack costs `steps + 1` forwards and
    `steps` backwards. Labels are classes `(N,)`, or logits or probabilities `(N, K)` of the class
    to leave.

    Args:
        tau: How many more misclassified iterates τ the attack goes through after the first.
        **kwargs: Those of `PGD`; `keep` is not used.

    Example:
        >>> FriendlyPGD(eps=0.1, tau=1).tau
        1
    """

    tau: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("tau", self.tau)

    def _search(
        self, network: Model, images: Tensor, labels: Tensor, start: Tensor, criterion: Criterion
    ) -> Iterate:
        classes = labels if labels.ndim == 1 else predicted_classes(labels)
        adversarial = self.begin(images, start)
        kept, fooled = images, torch.zeros(len(images), dtype=torch.long, device=images.device)
        for step in range(self.steps + 1 if self.steps else 0):
            last = step == self.steps
            with torch.set_grad_enabled(not last):
                adversarial.requires_grad_(not last)
                logits = network(adversarial)
            predicted = predicted_classes(logits.detach())
            # The prediction to leave may be undefined as well.
            wrong = (predicted != classes) | (predicted < 0)
            take = wrong & (fooled <= self.tau)
            kept = torch.where(_per_image(take, kept), adversarial.detach(), kept)
            fooled = fooled + wrong
            if not last:
                losses = criterion(logits, labels)
                (gradient,) = torch.autograd.grad(losses.sum(), adversarial)
                adversarial = self.move(adversarial.detach(), gradient, images)
        return Iterate(kept)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))
