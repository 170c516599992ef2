"""What makes PGD in a measure faster: memory layout, folded BatchNorm, larger batches?

python benchmarks/speed.py --batches 8 32 128

Each variant is compared with the plain network; beside its time stands how far the mean loss that
it finds is from the plain network's.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from problems import random_images, warmed
from rounds import Rounds, begin, benchmark_parser
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.optimization import fuse

from robust_flatness.functional import robust_loss
from robust_flatness.networks import ResNet18

EPS = 8 / 255
Crafted = Callable[[], Tensor]
Network = Callable[[], ResNet18]


def losses(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The measure's own code."""
    return robust_loss(model, images, labels, eps=EPS, steps=steps, restarts=1)


def variants(network: Network, images: Tensor, labels: Tensor, steps: int) -> dict[str, Crafted]:
    """The same attack on the same images by name."""
    torch.manual_seed(0)
    plain = network().requires_grad_(False)
    # Statistics of real activations: with those of a new network its losses explode.
    warmed(plain, images)
    layout = torch.channels_last
    last = copy.deepcopy(plain).to(memory_format=layout)
    folded = copy.deepcopy(plain)
    folded.body = fuse(folded.body)
    folded_last = copy.deepcopy(folded).to(memory_format=layout)
    wide = images.contiguous(memory_format=layout)
    return {
        "plain": lambda: losses(plain, images, labels, steps),
        "channels_last": lambda: losses(last, wide, labels, steps),
        "BN folded": lambda: losses(folded, images, labels, steps),
        "BN folded, channels_last": lambda: losses(folded_last, wide, labels, steps),
    }


def compare(name: str, tried: dict[str, Crafted], images: int, rounds: int) -> None:
    """Prints one table."""
    first = next(iter(tried.values()))().mean()
    differ = {
        variant: f"{100 * (run().mean() / first - 1).abs().item():.2f} %"
        for variant, run in tried.items()
    }
    found = Rounds.of(tried, rounds)
    columns = {"losses differ by": differ}
    found.print_table(name, "CPU s an image", lambda s: s / images, digits=4, columns=columns)


def batched_restarts(
    network: Network, images: Tensor, labels: Tensor, steps: int, restarts: int
) -> dict[str, Crafted]:
    """Restarts one after another, or all of them as one larger batch."""
    torch.manual_seed(0)
    model = network().eval().requires_grad_(False)
    many, same = images.repeat(restarts, 1, 1, 1), labels.repeat(restarts)

    def in_turn() -> Tensor:
        return torch.stack([losses(model, images, labels, steps) for _ in range(restarts)])

    return {"in turn": in_turn, "one batch": lambda: losses(model, many, same, steps)}


def batched_directions(
    network: Network, images: Tensor, labels: Tensor, directions: int
) -> dict[str, Crafted]:
    """A forward and an input backward for several perturbed weights, in turn or by vmap."""
    torch.manual_seed(0)
    models = [network().eval().requires_grad_(False) for _ in range(directions)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = models[0]

    def loss(weights: dict[str, Tensor], state: dict[str, Tensor], inputs: Tensor) -> Tensor:
        logits = functional_call(base, (weights, state), (inputs,))
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def in_turn() -> Tensor:
        found = []
        for model in models:
            inputs = images.clone().requires_grad_()
            outputs = nn.functional.cross_entropy(model(inputs), labels, reduction="sum")
            found.append(torch.autograd.grad(outputs, inputs)[0])
        return torch.stack(found).abs()

    def together() -> Tensor:
        inputs = images.expand(directions, *images.shape).clone().requires_grad_()
        total = vmap(loss)(parameters, buffers, inputs).sum()
        return torch.autograd.grad(total, inputs)[0].abs()

    return {"in turn": in_turn, "vmap": together}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all comparisons."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args(arguments)
    begin(given)
    network = partial(ResNet18, 10, width=given.width)
    for batch in given.batches:
        images, labels = random_images(batch)
        named = f"ResNet-18, PGD-{given.steps}, batch of {batch}"
        tried = variants(partial(network, norm="batch"), images, labels, given.steps)
        compare(named, tried, batch * given.steps, given.rounds)
    images, labels = random_images(8)
    restarts = batched_restarts(network, images, labels, given.steps, 4)
    compare("4 restarts of 8 images", restarts, 32 * given.steps, given.rounds)
    directions = batched_directions(network, images, labels, 4)
    compare("4 directions of 8 images, one step", directions, 32, given.rounds)


if __name__ == "__main__":
    main()
