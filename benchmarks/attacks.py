"""What adversarial examples, flatness and AutoAttack cost, compared with other implementations.

python benchmarks/attacks.py crafting                 # PGD: ours, torchattacks, research code
python benchmarks/attacks.py flatness                 # ours, and the same with research code's PGD
python benchmarks/attacks.py autoattack runs/at-Digits-s0

All attacks have the same radius, number and length of steps, and a uniform start. Ours run on `AT`,
which has its network in channels_last, the others on the same network in PyTorch's layout.
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torchattacks
from jsonargparse import auto_cli
from pyautoattack import AutoAttack as OfficialAutoAttack
from timing import compare, cpu_seconds, quiet_trainer, random_images, textbook_pgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_flatness.callbacks import AutoAttack
from robust_flatness.datamodules import Digits
from robust_flatness.functional import (
    average_case_flatness,
    perturbed_weights,
    pgd_attack,
    sample_weight_perturbation,
)
from robust_flatness.lightning_modules import AT, load_checkpoint
from robust_flatness.networks import ResNet18, SmallResNet

Problem = tuple[nn.Module, Tensor, Tensor, float]
"""A network, images, labels, and the radius of attacks."""


def problems(batches: Sequence[int], width: int, digits: int) -> dict[str, Problem]:
    """The paper's network on batches of random images, and the network of Digits on its images."""
    chosen: dict[str, Problem] = {}
    for batch in batches:
        module = AT(partial(ResNet18, width=width))
        chosen[f"ResNet-18, batch of {batch}"] = module, *random_images(batch), 8 / 255
    module = AT(SmallResNet, in_channels=1, mean=[0.3], std=[0.4])
    chosen[f"Digits, batch of {digits}"] = module, *first_digits("train", digits), 0.2
    with torch.no_grad():
        # BatchNorm statistics of the images. With those of a new network, losses explode.
        for model, images, _, _ in chosen.values():
            for _ in range(20):
                model.train()(images)
            model.eval()
    return chosen


def first_digits(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images and labels of a split."""
    dataset = Digits().split_dataset(split)  # type: ignore[arg-type]
    images, labels = zip(*(dataset[index] for index in range(count)))
    return torch.stack(images), torch.tensor(labels)


def pgd_variants(
    problem: Problem, steps: int, layout: torch.memory_format
) -> dict[str, Callable[[], Tensor]]:
    """Functions that return adversarial examples."""
    model, images, labels, eps = problem
    plain = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    length = eps * 0.007 / (8 / 255)
    ours = partial(pgd_attack, model, images, labels, eps=eps, steps=steps, start="uniform")
    theirs = torchattacks.PGD(plain, eps=eps, alpha=length, steps=steps, random_start=True)
    settings = {"eps": eps, "step_size": length, "steps": steps}
    return {
        "textbook": lambda: textbook_pgd(plain, images, labels, **settings)[0],
        "torchattacks": partial(theirs, images, labels),
        "ours, best": partial(ours, keep="best"),
        "ours, last": partial(ours, keep="last"),
    }


def crafting(
    batches: Sequence[int] = (4, 8),
    width: int = 64,
    digits: int = 64,
    steps: int = 7,
    same_layout: bool = False,
    rounds: int = 7,
) -> None:
    """Times PGD. With `same_layout`, the others use channels_last, too."""
    columns = {}
    layout = torch.channels_last if same_layout else torch.contiguous_format
    for column, problem in problems(batches, width, digits).items():
        variants = pgd_variants(problem, steps, layout)
        for name, run in variants.items():
            loss = cross_entropy(problem[0](run()), problem[2]).item()
            print(f"{column}: {name} reaches a cross-entropy of {loss:.2f}")
        columns[column] = {name: cpu_seconds(run) for name, run in variants.items()}
    compare(f"PGD-{steps}, CPU time", columns, rounds)


def flatness_variants(
    problem: Problem, directions: int, steps: int
) -> dict[str, Callable[[], tuple[float, float]]]:
    """Functions that return RLoss at w and, in the mean, at w + ν, along the same directions."""
    model, images, labels, eps = problem
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def textbook_loss() -> float:
        settings = {"eps": eps, "step_size": eps * 0.007 / (8 / 255), "steps": steps}
        return textbook_pgd(plain, images, labels, **settings)[1].mean().item()

    def textbook() -> tuple[float, float]:
        reference, total = textbook_loss(), 0.0
        for k in range(directions):
            with perturbed_weights(plain, sample_weight_perturbation(plain, xi=0.5, direction=k)):
                total += textbook_loss()
        return reference, total / directions

    def ours() -> tuple[float, float]:
        settings = {"num_perturbations": directions, "steps": steps, "start": "uniform"}
        result = average_case_flatness(model, images, labels, xi=0.5, eps=eps, **settings)
        return result.reference_loss, result.perturbed_losses.mean().item()

    return {"textbook": textbook, "ours": ours}


def flatness(
    batch: int = 4,
    width: int = 64,
    digits: int = 64,
    directions: int = 2,
    steps: int = 7,
    rounds: int = 7,
) -> None:
    """Times average-case flatness."""
    columns = {}
    for column, problem in problems([batch], width, digits).items():
        variants = flatness_variants(problem, directions, steps)
        for name, run in variants.items():
            print("{}: {}, RLoss {:.2f} at w, {:.2f} at w + ν".format(column, name, *run()))
        columns[column] = {name: cpu_seconds(run) for name, run in variants.items()}
    compare(f"Flatness, {directions} directions, PGD-{steps}, CPU time", columns, rounds)


def autoattack(run: Path, images: int = 100, rounds: int = 3) -> None:
    """Times AutoAttack standard on test images of a finished run on Digits."""
    model, eps = load_checkpoint(run / "checkpoints" / "last.ckpt").eval(), Digits().eps
    pixels, labels = first_digits("test", images)

    def official(batch: int) -> float:
        attack = OfficialAutoAttack(model, eps=eps, seed=0, device="cpu")
        predicted = attack.run_standard_evaluation(pixels, labels, batch_size=batch)[1]
        return (predicted != labels).float().mean().item()

    def ours() -> float:
        trainer = quiet_trainer(callbacks=[AutoAttack(num_examples=images)])
        metrics = trainer.test(model, Digits(), verbose=False)  # type: ignore[arg-type]
        return metrics[0]["test/autoattack_error"]

    def theirs() -> float:
        attack = torchattacks.AutoAttack(model, eps=eps, n_classes=10, seed=0)
        with torch.no_grad():
            return (model(attack(pixels, labels)).argmax(1) != labels).float().mean().item()

    def timed(name: str, error: Callable[[], float]) -> float:
        begin = time.process_time()
        print(f"{name}: robust error {100 * error():.1f} %")
        return time.process_time() - begin

    variants = {
        "official, one call": partial(official, images),
        "official, batches of 10": partial(official, 10),
        "ours, in a trainer": ours,
        "torchattacks": theirs,
    }
    column = {name: partial(timed, name, error) for name, error in variants.items()}
    compare(f"AutoAttack, {images} images", {"CPU time": column}, rounds)


if __name__ == "__main__":
    auto_cli([crafting, flatness, autoattack])
