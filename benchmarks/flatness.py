"""What average-case flatness costs: our measure, and the same done with the textbook's loop.

python benchmarks/flatness.py

Both take the same directions of the same lengths, and the attack at w and at each w + ν has the
same radius, number and length of steps. Ours is run on `AT`, which holds its network in
channels_last, the other on the same network as PyTorch makes it.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from problems import Problem, digits, resnet
from rounds import Goal, Rounds, begin, benchmark_parser, print_goals
from textbook import TEXTBOOK, textbook_pgd
from torch import Tensor

from robust_flatness.functional import (
    average_case_flatness,
    perturbed_weights,
    sample_weight_perturbation,
)
from robust_flatness.functional.attack import PGD

XI = 0.5


def variants(
    problem: Problem, directions: int, steps: int
) -> dict[str, Callable[[], tuple[float, float]]]:
    """The measure by name; each returns RLoss at w and, in the mean, at w + ν."""
    ours, images, labels, eps = problem
    plain = copy.deepcopy(ours).to(memory_format=torch.contiguous_format)
    length = PGD(eps, steps).length

    def textbook_loss() -> Tensor:
        settings = {"eps": eps, "step_size": length, "steps": steps}
        return textbook_pgd(plain, images, labels, **settings)[1].mean()

    def theirs() -> tuple[float, float]:
        reference, perturbed = textbook_loss(), []
        for k in range(directions):
            with perturbed_weights(plain, sample_weight_perturbation(plain, xi=XI, direction=k)):
                perturbed.append(textbook_loss())
        return reference.item(), torch.stack(perturbed).mean().item()

    def mine() -> tuple[float, float]:
        settings = {"num_perturbations": directions, "steps": steps, "step_size": length}
        found = average_case_flatness(
            ours, images, labels, xi=XI, eps=eps, start="uniform", **settings
        )
        return found.reference_loss, found.perturbed_losses.mean().item()

    return {TEXTBOOK: theirs, "ours": mine}


def compare(title: str, problem: Problem, directions: int, steps: int, rounds: int) -> Goal:
    """Prints one table and returns what was to be reached."""
    tried = variants(problem, directions, steps)
    losses = {name: "{:.2f}, {:.2f}".format(*run()) for name, run in tried.items()}
    found = Rounds.of(tried, rounds)
    named = f"{title}, {directions} directions, PGD-{steps}"
    found.print_table(named, "CPU s", columns={"RLoss at w, at w + ν": losses})
    return Goal(f"{named}: ours / {TEXTBOOK}", found.ratios("ours"), 0.58)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both comparisons."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batch", type=int, default=4, help="images of ResNet-18")
    parser.add_argument("--width", type=int, default=64, help="of ResNet-18")
    parser.add_argument("--digits_batch", type=int, default=64)
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    given = parser.parse_args(arguments)
    begin(given)
    settings = (given.directions, given.steps, given.rounds)
    large = f"ResNet-18 of width {given.width}, {given.batch} images"
    goal = compare(large, resnet(given.batch, given.width), *settings)
    # The ratio on the small network is shown, but the goal is on the paper's.
    compare(
        f"Digits, SmallResNet, {given.digits_batch} images", digits(given.digits_batch), *settings
    )
    print_goals([goal])


if __name__ == "__main__":
    main()
