"""What adversarial examples cost: ours, torchattacks, and the textbook's loop.

python benchmarks/crafting.py
python benchmarks/crafting.py --same_layout   # the others with channels_last, too

All attacks have the same radius, number and length of steps, and a uniform random start. Ours is
run on `AT`, which holds its network in channels_last, the others on the same network as PyTorch
makes it. The loss that each attack reaches is shown beside its time.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torchattacks
from problems import Problem, digits, resnet
from rounds import Goal, Rounds, begin, benchmark_parser, print_goals
from textbook import TEXTBOOK, textbook_pgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional.attack import PGD, Keep
from robust_flatness.functional.noise import random_start

THEIRS = "torchattacks"


def variants(problem: Problem, steps: int, same_layout: bool) -> dict[str, Callable[[], Tensor]]:
    """The attacks by name; each returns its adversarial examples."""
    ours, images, labels, eps = problem
    layout = torch.channels_last if same_layout else torch.contiguous_format
    plain = copy.deepcopy(ours).to(memory_format=layout)
    length = PGD(eps, steps).length
    generator = torch.Generator().manual_seed(0)

    def mine(keep: Keep) -> Tensor:
        pgd = PGD(eps, steps, length, keep=keep, start="uniform")
        start = random_start(images.shape, eps=eps, start="uniform", generator=generator)
        return pgd.attack(ours, images, labels, start).images

    theirs = torchattacks.PGD(plain, eps=eps, alpha=length, steps=steps, random_start=True)
    settings = {"eps": eps, "step_size": length, "steps": steps}
    return {
        TEXTBOOK: lambda: textbook_pgd(plain, images, labels, **settings)[0],
        THEIRS: lambda: theirs(images, labels),
        "ours, best": partial(mine, "best"),
        "ours, last": partial(mine, "last"),
    }


@torch.no_grad()
def reached(model: nn.Module, adversarial: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy of adversarial examples."""
    return cross_entropy(model(adversarial), labels).item()


def compare(title: str, problem: Problem, steps: int, rounds: int, same_layout: bool) -> list[Goal]:
    """Prints one table and returns what was to be reached."""
    model, _, labels, _ = problem
    tried = variants(problem, steps, same_layout)
    losses = {name: f"{reached(model, run(), labels):.2f}" for name, run in tried.items()}
    found = Rounds.of(tried, rounds)
    found.print_table(title, "CPU s", columns={"cross-entropy": losses})
    goals = []
    for name in ("ours, best", "ours, last"):
        for against, limit in ((TEXTBOOK, 0.58), (THEIRS, 0.90)):
            figure = f"{title}: {name} / {against}"
            goals.append(Goal(figure, found.ratios(name, against), limit))
    return goals


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all comparisons."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8], help="of ResNet-18")
    parser.add_argument("--width", type=int, default=64, help="of ResNet-18")
    parser.add_argument("--digits_batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--same_layout", action="store_true", help="channels_last for all")
    given = parser.parse_args(arguments)
    begin(given)
    name = f"ResNet-18 of width {given.width}, PGD-{given.steps}, batch of"
    problems = {f"{name} {batch}": resnet(batch, given.width) for batch in given.batches}
    small = f"Digits, SmallResNet, PGD-{given.steps}, batch of {given.digits_batch}"
    # Ratios on the small network are shown, but goals are on the paper's.
    goals = []
    for title, problem in problems.items():
        goals += compare(title, problem, given.steps, given.rounds, given.same_layout)
    compare(small, digits(given.digits_batch), given.steps, given.rounds, given.same_layout)
    print_goals(goals)


if __name__ == "__main__":
    main()
