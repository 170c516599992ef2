"""Adversarial weight perturbation in a training loop."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_flatness.functional.batch_noise import BatchNoise
from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import Mode
from robust_flatness.functional.layer_weights import LayerTensor, layer_tensors, perturbed_weights
from robust_flatness.functional.weight_perturbation import (
    adversarial_perturbation,
    mean_over_ranks,
    random_perturbation,
)

Order = Literal["sam", "awp"]
Direction = Literal["adversarial", "random"]


class AWP:
    """Holds weights at w + ν for a forward and its backward, ν_l = ξ‖w_l‖ g_l / ‖g_l‖.

    Call `find` once, then for each batch `perturb`, forward, backward and `restore`, and
    `shift_decay` after gradients are clipped, before the optimizer's step. `exchange` after the
    forward, and again before the backward, hides w + ν from code between the two.

    Weights of convolution and linear layers move. If a layer has spectral norm, weight norm or
    another parametrization, the tensor that it computes with is moved, and the gradient goes on to
    the parameters behind it.

    Args:
        xi: Relative length ξ; the paper's AT-AWP takes 0.01.
        steps: Ascent steps on the weights; the paper takes 1.
        mode: `eval` ascends on running BatchNorm statistics (the paper's code), `train` on those of
            the batch (the original's).
        direction: `adversarial`, or `random` for one drawn on the sphere for each batch.
        order: `sam` decays the restored weights (the paper); `awp` decays the perturbed ones, as
            the original code does by stepping before restoring.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> network, awp = nn.Linear(2, 1, bias=False), AWP(xi=0.5)
        >>> awp.find(network)
        >>> before = network.weight.clone()
        >>> awp.perturb(network, lambda: network(torch.ones(1, 2)).sum(), BatchNoise(0, 0))
        >>> torch.allclose((network.weight - before).norm(), 0.5 * before.norm())
        True
        >>> awp.restore()
        >>> torch.equal(network.weight, before)
        True
    """

    def __init__(
        self,
        xi: float = 0.01,
        steps: int = 1,
        mode: Mode = "eval",
        direction: Direction = "adversarial",
        order: Order = "sam",
    ) -> None:
        check_number("xi", xi)
        check_count("steps", steps, low=1)
        check_choice("mode", mode, get_args(Mode))
        check_choice("direction", direction, get_args(Direction))
        check_choice("order", order, get_args(Order))
        self.xi, self.steps = xi, steps
        self.mode, self.direction, self.order = mode, direction, order
        self._tensors: dict[str, LayerTensor] = {}
        self._perturbed = ExitStack()
        # Parameters, and what `exchange` exchanges them for.
        self._moved: list[tuple[Tensor, Tensor]] = []
        self._exchanged = False
        self.forget()

    def forget(self) -> None:
        """Forgets the steps of an earlier training."""
        # ν by parameter, of the steps since the last update, and ‖ν_l‖ / ‖w_l‖, of the epoch.
        self._decay_shifts: list[dict[int, Tensor]] = []
        self._relative_norms: list[Tensor] = []

    def find(self, network: nn.Module) -> None:
        """Finds the weights to perturb.

        Raises:
            ValueError: If it is not certain what tensors a layer computes with, or there are none.
        """
        self._tensors = layer_tensors(network, biases=False)

    def perturb(self, model: nn.Module, objective: Callable[[], Tensor], noise: BatchNoise) -> None:
        """Moves the weights to w + ν, the same on all processes.

        Args:
            model: Contains the network that was passed to `find`.
            objective: Returns the scalar loss to increase.
            noise: Draws a random direction.
        """
        self.restore()
        values = {name: tensor.value() for name, tensor in self._tensors.items()}
        weights = {name: value for name, value in values.items() if value.requires_grad}
        if self.direction == "random" and weights:
            device = next(iter(weights.values())).device
            perturbation = random_perturbation(weights, self.xi, noise.generator("weights", device))
        else:
            perturbation = adversarial_perturbation(
                model,
                self._tensors,
                objective,
                xi=self.xi,
                steps=self.steps,
                mode=self.mode,
                reduce=mean_over_ranks,
            )
        moved_weights = [weights[name].detach() for name in perturbation]
        norms = torch.stack(torch._foreach_norm([*perturbation.values(), *moved_weights]))
        lengths, radii = norms.chunk(2)
        self._relative_norms.append(lengths / radii.clamp_min(torch.finfo(radii.dtype).tiny))
        if self.order == "awp":
            shifts = ((self._tensors[name].own(), nu) for name, nu in perturbation.items())
            # What is computed decays only through the parameters behind it, which are not moved.
            self._decay_shifts.append({id(w): nu for w, nu in shifts if w is not None})
        moved = perturbed_weights(model, perturbation, self._tensors)
        self._moved = self._perturbed.enter_context(moved)

    def exchange(self) -> None:
        """Exchanges parameters at w + ν for those at w, or back, unseen by autograd."""
        for parameter, other in self._moved:
            parameter.data, other.data = other.data, parameter.data
        self._exchanged = not self._exchanged

    def restore(self) -> None:
        """Restores the weights bit for bit; without a perturbation nothing happens."""
        if self._exchanged:
            self.exchange()
        self._moved = []
        self._perturbed.close()

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raises a ValueError if `order` does not suit the optimizer's weight decay."""
        decoupled = any(
            group.get("weight_decay") and group.get("decoupled_weight_decay")
            for group in optimizer.param_groups
        )
        if self.order == "awp" and decoupled:
            raise ValueError(
                "Expected an optimizer with coupled weight decay for `order` awp but got "
                f"{type(optimizer).__name__}."
            )

    def shift_decay(self, optimizer: Optimizer) -> None:
        """With `order` awp, turns the decay of w into that of w + ν by adding wd · ν."""
        shifts, self._decay_shifts = self._decay_shifts, []
        for group in optimizer.param_groups if shifts else ():
            decay = group.get("weight_decay", 0.0)
            for parameter in group["params"]:
                for shift in shifts:
                    if id(parameter) in shift and parameter.grad is not None:
                        parameter.grad.add_(shift[id(parameter)], alpha=decay / len(shifts))

    def take_relative_norms(self) -> tuple[Tensor, Tensor] | None:
        """The extremes of ‖ν_l‖ / ‖w_l‖ since the last call, or `None` if nothing was moved."""
        norms, self._relative_norms = self._relative_norms, []
        if not norms:
            return None
        low, high = torch.cat(norms).aminmax()
        return low, high


def skips_backward(trainer: Any) -> bool:
    """Whether a Lightning trainer runs forwards for BatchNorm statistics alone.

    `StochasticWeightAveraging` ends with such an epoch, whose statistics are for the weights as
    they are.
    """
    return bool(trainer.fit_loop._skip_backward)
