"""What AutoAttack costs: the callback, the official package in one call, and torchattacks.

python benchmarks/autoattack.py runs/at-Digits-s0

All attack the same images of the run's test split with AutoAttack standard; their robust errors
are shown beside their times.
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torchattacks
from measures import EPS, images_of, load
from pyautoattack import AutoAttack as Official
from rounds import Rounds, begin, benchmark_parser
from timed_trainers import quiet_trainer
from torch import Tensor, nn

from robust_flatness.callbacks import AutoAttack
from robust_flatness.datamodules import Digits

Attacked = Callable[[], float]


def official(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """Robust error by the official package."""
    attack = Official(model, eps=EPS, norm="Linf", version="standard", seed=0, device="cpu")
    _, predicted = attack.run_standard_evaluation(images, labels, batch_size=batch)
    return (predicted != labels).float().mean().item()


def theirs(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Robust error by torchattacks."""
    attack = torchattacks.AutoAttack(model, eps=EPS, n_classes=10, version="standard", seed=0)
    with torch.no_grad():
        return (model(attack(images, labels)).argmax(1) != labels).float().mean().item()


def ours(model: nn.Module, count: int) -> float:
    """Robust error by the callback in `trainer.test`."""
    callback = AutoAttack(num_examples=count)
    trainer = quiet_trainer(callbacks=[callback])
    figures = trainer.test(model, Digits(), verbose=False)  # type: ignore[arg-type]
    return figures[0]["test/autoattack_error"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("run", type=Path, help="a finished run on Digits")
    parser.add_argument("--images", type=int, default=100)
    given = parser.parse_args(arguments)
    for name in ("auto-attack", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    begin(given)
    model, (images, labels) = load(given.run).eval(), images_of("test", given.images)
    count = given.images
    tried: dict[str, Attacked] = {
        "official, one call": partial(official, model, images, labels, count),
        "official, batches of 10": partial(official, model, images, labels, 10),
        "ours, in a trainer": partial(ours, model, count),
        "torchattacks": partial(theirs, model, images, labels),
    }
    errors: dict[str, str] = {}

    def told(name: str) -> float:
        started = time.process_time()
        errors[name] = f"{100 * tried[name]():.1f} %"
        return time.process_time() - started

    found = Rounds.told({name: partial(told, name) for name in tried}, given.rounds)
    title = f"AutoAttack standard on {count} test images of {given.run.name}"
    found.print_table(title, "CPU s", digits=1, columns={"robust error": errors})


if __name__ == "__main__":
    main()
