"""Adversarial weight perturbation (Wu et al., 2020)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional.checks import check_choice, check_count, check_number
from robust_flatness.functional.evaluation import Mode, differentiable, logits_function
from robust_flatness.functional.layer_weights import (
    differentiable_weights,
    perturbed_parameters,
    perturbed_weights,
)
from robust_flatness.functional.weight_perturbation import onto_ball, scale_to

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def mean_cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch: what AT-AWP's weights ascend."""
    return cross_entropy(logits_function(model, images)(images), labels)


def adversarial_weight_perturbation(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    xi: float = 0.01,
    steps: int = 1,
    objective: Objective = mean_cross_entropy,
    mode: Mode = "eval",
    reduce: Callable[[list[Tensor]], list[Tensor]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weight perturbation that raises the loss most, to first order, layer by layer.

    One step is ν_l = ξ‖w_l‖ g_l / ‖g_l‖ with g the gradient at w; each further step has the same
    length and ends on the ball ‖ν_l‖ ≤ ξ‖w_l‖. Weights of convolution and linear layers are
    perturbed, neither biases nor normalisation nor what is frozen; of a parametrised layer it is
    the tensor that it computes with. Weights, `.grad` and buffers are left as they were.

    Args:
        model: The network.
        images: Usually adversarial examples, `(N, C, H, W)`.
        labels: `(N,)`.
        xi: Relative length ξ, 0.01 in the paper.
        steps: Ascent steps, 1 in the paper.
        objective: Maps model, images and labels to the scalar loss to raise.
        mode: `eval` ascends on BatchNorm's running statistics (the paper's code), `train` on those
            of the batch (the original's).
        reduce: Averages the gradients over processes, so that all ranks take one direction.
        weights: What is perturbed, by the model's names; `None` takes all that are to be.

    Returns:
        Perturbation by parameter name; zero where the weight or its gradient is zero.

    Raises:
        ValueError: If an argument is out of range or there is nothing to perturb, or all is frozen.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
        >>> nu = adversarial_weight_perturbation(model, images, labels, xi=0.01)["1.weight"]
        >>> torch.allclose(nu.norm(), 0.01 * model[1].weight.norm())
        True
    """
    check_number("xi", xi)
    check_count("steps", steps, low=1)
    check_choice("mode", mode, get_args(Mode))
    chosen = perturbed_parameters(model, biases=False) if weights is None else weights
    weights = {name: weight for name, weight in chosen.items() if weight.requires_grad}
    if not weights:
        raise ValueError("Expected weights that are trained, to perturb, but got frozen ones only.")
    perturbation = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(steps):
        moved_weights = perturbed_weights(model, perturbation) if step else nullcontext()
        with (
            differentiable(model, mode),
            _kept_buffers(model, mode),
            moved_weights,
            differentiable_weights(model, weights) as leaves,
        ):
            loss = objective(model, images, labels)
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        directions = list(gradients) if reduce is None else reduce(list(gradients))
        for (name, weight), direction in zip(weights.items(), directions):
            moved = perturbation[name] + scale_to(direction, weight, xi)
            perturbation[name] = onto_ball(moved, weight, xi) if step else moved
    return perturbation


@contextmanager
def _kept_buffers(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Gives BatchNorm its statistics back, which forwards in train mode move."""
    buffers = list(model.buffers()) if mode == "train" else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)
