"""What makes PGD in a measure faster: memory layout, folded BatchNorm, larger batches?

python benchmarks/speed.py --batches 8 32 128

Variants take turns and their order is reversed every round, so that a machine that slows down does
so for all of them; times are CPU seconds of this process. Printed are the medians, the ratio of
each to the plain network in the same round (median, smallest, largest), and how far the found mean
loss is from the plain network's.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.optimization import fuse

from robust_flatness.functional import robust_loss
from robust_flatness.networks import ResNet18

EPS = 8 / 255
Crafted = Callable[[], Tensor]


def losses(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The measure's own code."""
    return robust_loss(model, images, labels, eps=EPS, steps=steps, restarts=1)


def variants(images: Tensor, labels: Tensor, steps: int) -> dict[str, Crafted]:
    """The same attack on the same images by name."""
    torch.manual_seed(0)
    plain = ResNet18(10, norm="batch").requires_grad_(False)
    # Statistics of real activations: with those of a new network its losses explode.
    plain.train()(images)
    plain.eval()
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
    seconds: dict[str, list[float]] = {variant: [] for variant in tried}
    found = {variant: run() for variant, run in tried.items()}  # also warms up
    for number in range(rounds):
        for variant in list(tried)[:: -1 if number % 2 else 1]:
            start = time.process_time()
            tried[variant]()
            seconds[variant].append(time.process_time() - start)
    first = next(iter(tried))
    print(f"\n{name}\n| | CPU s an image | ratio | losses differ by |\n|---|---|---|---|")
    for variant, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times, seconds[first])]
        differ = (found[variant].mean() / found[first].mean() - 1).abs().item()
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {variant} | {median(times) / images:.4f} | {spread} | {100 * differ:.2f} % |")


def batched_restarts(
    images: Tensor, labels: Tensor, steps: int, restarts: int
) -> dict[str, Crafted]:
    """Restarts one after another, or all of them as one larger batch."""
    torch.manual_seed(0)
    model = ResNet18(10).eval().requires_grad_(False)
    many, same = images.repeat(restarts, 1, 1, 1), labels.repeat(restarts)

    def in_turn() -> Tensor:
        return torch.stack([losses(model, images, labels, steps) for _ in range(restarts)])

    return {"in turn": in_turn, "one batch": lambda: losses(model, many, same, steps)}


def batched_directions(images: Tensor, labels: Tensor, directions: int) -> dict[str, Crafted]:
    """A forward and an input backward for several perturbed weights, in turn or by vmap."""
    torch.manual_seed(0)
    models = [ResNet18(10).eval().requires_grad_(False) for _ in range(directions)]
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


def main() -> None:
    """Runs all comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for batch in given.batches:
        torch.manual_seed(0)
        images, labels = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
        work = batch * given.steps
        named = f"ResNet-18, PGD-{given.steps}, batch of {batch}"
        compare(named, variants(images, labels, given.steps), work, given.rounds)
    images, labels = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
    restarts = batched_restarts(images, labels, given.steps, 4)
    compare("4 restarts of 8 images", restarts, 32 * given.steps, given.rounds)
    directions = batched_directions(images, labels, 4)
    compare("4 directions of 8 images, one step", directions, 32, given.rounds)


if __name__ == "__main__":
    main()
