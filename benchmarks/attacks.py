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

from robust_flatness import functional
from robust_flatness.callbacks import AutoAttack
from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import AT, load_checkpoint
from robust_flatness.networks import ResNet18

EPS, STEP_SIZE = 8 / 255, 0.007


def resnet(images: Tensor, width: int, layout: torch.memory_format) -> tuple[nn.Module, nn.Module]:
    """The paper's network in the layout of `AT`, and in the layout of the others."""
    model = AT(partial(ResNet18, width=width))
    with torch.no_grad():
        # BatchNorm statistics of the images. With those of a new network, losses explode.
        for _ in range(20):
            model.train()(images)
    return model.eval(), copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]


def pgd_variants(
    images: Tensor,
    labels: Tensor,
    width: int,
    steps: int,
    layout: torch.memory_format,
    compiled: bool,
) -> dict[str, Callable[[], Tensor]]:
    """Functions that return adversarial examples, each called once."""
    model, plain = resnet(images, width, layout)
    attack = partial(functional.pgd_attack, eps=EPS, steps=steps, start="uniform")
    ours = partial(attack, model, images, labels)
    theirs = torchattacks.PGD(plain, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=True)
    settings = {"eps": EPS, "step_size": STEP_SIZE, "steps": steps}
    variants: dict[str, Callable[[], Tensor]] = {
        "textbook": lambda: textbook_pgd(plain, images, labels, **settings)[0],
        "torchattacks": partial(theirs, images, labels),
        "ours, best": partial(ours, keep="best"),
        "ours, last": partial(ours, keep="last"),
        "ours, best, folded": partial(ours, keep="best", fold_batch_norm=True),
        "ours, last, folded": partial(ours, keep="last", fold_batch_norm=True),
    }
    if compiled:
        faster = copy.deepcopy(model)
        faster.network.compile()  # type: ignore[operator, union-attr]
        variants["ours, last, compiled"] = partial(attack, faster, images, labels, keep="last")
    for name, run in variants.items():
        begin = time.perf_counter()
        reached = cross_entropy(model(run()), labels).item()
        seconds = time.perf_counter() - begin
        print(f"{name}: cross-entropy {reached:.2f}, first call {seconds:.1f} s")
    return variants


def crafting(
    batches: Sequence[int] = (4, 8),
    width: int = 64,
    steps: int = 7,
    same_layout: bool = False,
    compiled: bool = False,
    rounds: int = 7,
) -> None:
    """Times PGD. With `same_layout`, the others use channels_last, too.

    With `compiled`, ours also runs with `torch.compile`, which takes a minute for each batch size.
    """
    columns = {}
    layout = torch.channels_last if same_layout else torch.contiguous_format
    for batch in batches:
        variants = pgd_variants(*random_images(batch), width, steps, layout, compiled)
        columns[f"batch of {batch}"] = {name: cpu_seconds(run) for name, run in variants.items()}
    compare(f"PGD-{steps}, CPU time", columns, rounds)


def flatness(
    batch: int = 4, width: int = 64, directions: int = 2, steps: int = 7, rounds: int = 7
) -> None:
    """Times average-case flatness along the same directions."""
    images, labels = random_images(batch)
    model, plain = resnet(images, width, torch.contiguous_format)

    def textbook_loss() -> float:
        settings = {"eps": EPS, "step_size": STEP_SIZE, "steps": steps}
        return textbook_pgd(plain, images, labels, **settings)[1].mean().item()

    def textbook() -> tuple[float, float]:
        reference, total = textbook_loss(), 0.0
        for k in range(directions):
            nu = functional.sample_weight_perturbation(plain, xi=0.5, direction=k)
            with functional.perturbed_weights(plain, nu):
                total += textbook_loss()
        return reference, total / directions

    def ours(fold: bool) -> tuple[float, float]:
        settings = {"num_perturbations": directions, "steps": steps, "start": "uniform"}
        flatness = partial(functional.average_case_flatness, fold_batch_norm=fold)
        result = flatness(model, images, labels, xi=0.5, eps=EPS, **settings)
        return result.reference_loss, result.perturbed_losses.mean().item()

    variants = {
        "textbook": textbook,
        "ours": partial(ours, False),
        "ours, folded": partial(ours, True),
    }
    for name, run in variants.items():
        print("{}: RLoss {:.2f} at w, {:.2f} at w + ν".format(name, *run()))
    column = {name: cpu_seconds(run) for name, run in variants.items()}
    compare(f"Flatness, {directions} directions, PGD-{steps}", {"CPU time": column}, rounds)


def autoattack(run: Path, images: int = 100, rounds: int = 3) -> None:
    """Times AutoAttack standard on test images of a finished run on Digits."""
    model, data = load_checkpoint(run / "checkpoints" / "last.ckpt").eval(), Digits()
    pairs = [data.split_dataset("test")[index] for index in range(images)]
    pixels, labels = torch.stack([image for image, _ in pairs]), torch.tensor([y for _, y in pairs])

    def official(batch: int) -> float:
        attack = OfficialAutoAttack(model, eps=data.eps, seed=0, device="cpu")
        predicted = attack.run_standard_evaluation(pixels, labels, batch_size=batch)[1]
        return (predicted != labels).float().mean().item()

    def ours() -> float:
        trainer = quiet_trainer(callbacks=[AutoAttack(num_examples=images)])
        metrics = trainer.test(model, Digits(), verbose=False)  # type: ignore[arg-type]
        return metrics[0]["test/autoattack_error"]

    def theirs() -> float:
        attack = torchattacks.AutoAttack(model, eps=data.eps, n_classes=10, seed=0)
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
