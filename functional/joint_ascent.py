"""Joint ascent on weights and images, over a set that may be shared out to processes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD, Keep
from robust_flatness.functional.checks import losses_of_finite, upcast
from robust_flatness.functional.iterate import example_losses
from robust_flatness.functional.layer_weights import differentiable_weights, perturbed_parameters
from robust_flatness.functional.logits import logits_function
from robust_flatness.functional.noise import stream
from robust_flatness.functional.weight_perturbation import (
    onto_ball,
    perturbed_weights,
    scale_to,
    split_like,
)

Perturbation = dict[str, Tensor]


class Batch(NamedTuple):
    """Images `(N, C, H, W)` in [0, 1], labels `(N,)`, and global indices."""

    images: Tensor
    labels: Tensor
    indices: Sequence[int]


@dataclass(frozen=True)
class Sharing:
    """How processes share out the batches of one set, dealt out in turn.

    Gradients of all batches are added in the order of the batches, so that one and many processes
    agree bit for bit.

    Attributes:
        rounds: Batches of the process that has most of them.
        gather: Maps a tensor to those of all processes, by rank.
    """

    rounds: int
    gather: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class JointAscent:
    """Raises the mean cross-entropy of a set in ν and δ together (Stutz et al., ICCV 2021).

    A step moves each example as the attack does and each layer by `weight_step · ‖w_l‖` along its
    gradient, and projects both, ν onto ‖ν_l‖ ≤ ξ‖w_l‖. One ν serves all batches.

    Attributes:
        model: The network, in `evaluation_context` while this runs; left as it was.
        batches: Of this process.
        pgd: The attack on images.
        xi: Relative radius ξ in each layer.
        weight_step: Relative length of a step in each layer.
        keep: `last` iterate, or the `best` by the mean over the set.
        seed: Of the starts.
        number: Of the batch that has ν to itself; `None` where the set shares it.
        sharing: With which other processes ν is shared.
    """

    model: nn.Module
    batches: Sequence[Batch]
    pgd: PGD
    xi: float
    weight_step: float
    keep: Keep = "last"
    seed: int = 0
    number: int | None = None
    sharing: Sharing | None = None

    def run(self, restart: int) -> Tensor:
        """Losses `(N,)` at the iterate that is kept, from the restart's own starts.

        Costs `steps + 1` forwards and `steps` backwards to weights and images for each batch.
        """
        weights = perturbed_parameters(self.model)
        perturbation = self._start(weights, restart)
        adversarial = [self._attacked(batch, restart) for batch in self.batches]
        iterates: list[tuple[float, Tensor]] = []
        for _ in range(self.pgd.steps):
            height, losses, slope = self._pass(weights, perturbation, adversarial)
            iterates.append((height, losses))
            perturbation = self._moved(weights, perturbation, slope)
        height, losses, _ = self._pass(weights, perturbation, adversarial, ascend=False)
        iterates.append((height, losses))
        if self.keep == "last":
            return losses
        # An iterate whose loss is not a number is the worst.
        return max(iterates, key=lambda found: math.inf if math.isnan(found[0]) else found[0])[1]

    def _start(self, weights: dict[str, Tensor], restart: int) -> Perturbation:
        """Directions uniform, lengths U(0, 1) · ξ‖w_l‖: the start of the paper's code."""
        key = () if self.number is None else ("batch", self.number)
        found = {}
        for position, (name, weight) in enumerate(weights.items()):
            numbers = stream(self.seed, "weight start", restart, position, *key)
            direction = torch.randn(weight.shape, generator=numbers).to(weight)
            length = self.xi * torch.rand((), generator=numbers).item()
            found[name] = scale_to(direction, weight, length)
        return found

    def _attacked(self, batch: Batch, restart: int) -> Tensor:
        start = self.pgd.starts(batch.images, batch.indices, seed=self.seed, restart=restart)
        return self.pgd.begin(upcast(batch.images), start)

    def _pass(
        self,
        weights: dict[str, Tensor],
        perturbation: Perturbation,
        adversarial: list[Tensor],
        *,
        ascend: bool = True,
    ) -> tuple[float, Tensor, Tensor]:
        """One pass over the set at w + ν, which moves the adversarial examples if it ascends.

        Returns:
            Sum of the losses over the whole set, this process's losses `(N,)`, and the gradient
            for all weights over the whole set as one vector; empty if it does not ascend.
        """
        like = next(iter(weights.values()))
        exact = any(weight.dtype == torch.float64 for weight in weights.values())
        size = 1 + sum(weight.numel() for weight in weights.values()) * ascend
        total = like.new_zeros(size, dtype=torch.float64 if exact else torch.float32)
        sharing = self.sharing if self.number is None else None
        sharing = sharing or Sharing(len(self.batches), lambda part: [part])
        found = []
        with (
            perturbed_weights(self.model, perturbation),
            differentiable_weights(self.model, weights) as leaves,
        ):
            for turn in range(sharing.rounds):
                part = torch.zeros_like(total)
                if turn < len(self.batches):
                    losses, gradient = self._visit(turn, adversarial, leaves, ascend)
                    found.append(losses)
                    part = torch.cat([losses.sum()[None], *gradient]).to(total)
                for other in sharing.gather(part):
                    total += other
        own = torch.cat(found) if found else total.new_zeros(0)
        return total[0].item(), own, total[1:]

    def _visit(
        self,
        turn: int,
        adversarial: list[Tensor],
        weights: dict[str, Tensor],
        ascend: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses of a batch and its gradients for the weights, flat; moves its examples."""
        images, labels, _ = self.batches[turn]
        with torch.set_grad_enabled(ascend):
            moving = adversarial[turn].detach().requires_grad_(ascend)
            logits = logits_function(self.model, images)(moving)
            losses = losses_of_finite(example_losses(logits, labels), logits)
            if not ascend:
                return losses, []
            inputs = [moving, *weights.values()]
            slope, *gradients = torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)
        adversarial[turn] = self.pgd.move(moving.detach(), slope, images)
        return losses.detach(), [gradient.flatten() for gradient in gradients]

    def _moved(
        self, weights: dict[str, Tensor], perturbation: Perturbation, gradient: Tensor
    ) -> Perturbation:
        gradients = split_like(gradient, weights)
        return {
            name: onto_ball(
                perturbation[name] + scale_to(gradients[name], weight, self.weight_step),
                weight,
                self.xi,
            )
            for name, weight in weights.items()
        }
