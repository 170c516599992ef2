"""What training costs: an epoch, a step of each variant, Lightning's overhead, two processes.

python benchmarks/training.py epoch                     # ours, and research code's
python benchmarks/training.py steps --write runs/costs.json
python benchmarks/training.py overhead
python benchmarks/training.py scaling
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from flows import SWITCHED_OFF
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule
from timing import (
    RandomImages,
    StepCost,
    StepTimer,
    compare,
    cpu_seconds,
    quiet_trainer,
    textbook_pgd,
    train_on,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image
from typing_extensions import override

from robust_flatness import cli
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.networks import ResNet18

PRESETS = Path(cli.__file__).parent / "configs" / "table1"
ROWS = ["at", *sorted({path.stem for path in PRESETS.glob("*.yaml")} - {"at"})]
# Epochs of the warm-up would be without the perturbation.
VARIANTS = {
    "trades_awp": ["--model=TRADESAWP", "--model.warmup=0"],
    "mart_awp": ["--model=MARTAWP", "--model.warmup=0"],
}
QUIET = "--trainer.enable_progress_bar=false"


def sgd(params: Any) -> torch.optim.Optimizer:
    """The optimizer of all variants."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def textbook_epoch(count: int, batch: int, width: int) -> Callable[[], None]:
    """An epoch of AT as in research code, which transforms one image after another."""
    model = AT(partial(ResNet18, width=width)).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = sgd(model.parameters())
    augment = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*augment, transforms.ToTensor()])
    pictures: Any = [to_pil_image(torch.rand(3, 32, 32)) for _ in range(count)]

    def epoch() -> None:
        loader = DataLoader(
            pictures, batch, shuffle=True, collate_fn=lambda found: [transform(p) for p in found]
        )
        for pixels in loader:
            images, labels = torch.stack(pixels), torch.randint(10, (len(pixels),))
            settings = {"eps": 8 / 255, "step_size": 0.007, "steps": 7}
            adversarial, _ = textbook_pgd(model.eval(), images, labels, **settings)
            optimizer.zero_grad()
            cross_entropy(model.train()(adversarial), labels).backward()
            optimizer.step()

    return epoch


def epoch(images: int = 384, batch: int = 128, width: int = 16, rounds: int = 7) -> None:
    """Times an epoch of AT with PGD-7. Ours is one of a trainer with the table of epochs."""
    with tempfile.TemporaryDirectory() as folder:
        module, data = AT(partial(ResNet18, width=width)), RandomImages(images, batch_size=batch)
        trainer = quiet_trainer(max_epochs=0, logger=EpochCSVLogger(folder))
        column = {
            "textbook": cpu_seconds(textbook_epoch(images, batch, width)),
            "ours": cpu_seconds(partial(train_on, trainer, module, data)),
        }
        title = f"AT, {images} images, ResNet-18 of width {width}"
        compare(title, {"CPU time of an epoch": column}, rounds)


def steps(
    rows: Sequence[str] = (*ROWS, *VARIANTS),
    data: str = "Digits",
    epochs: int = 3,
    rounds: int = 7,
    write: Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """Times a step of each row of Table 1 relative to the first row, and counts its passes.

    Each run is one of the command line without measures. `write` is a JSON file for `results.py`,
    `options` are further options of `fit`, such as `[--model.steps=2]`.
    """
    costs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        without, watch = (
            f"--without=[{','.join(SWITCHED_OFF)}]",
            "--trainer.callbacks=timing.StepCost",
        )
        length, folder = f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={root}"
        common = [f"--data={data}", length, folder, without, watch, QUIET, *options]

        def step(row: str) -> float:
            preset = VARIANTS.get(row, [f"--config=table1/{row}.yaml"])
            with redirect_stdout(io.StringIO()):
                cli.main(["fit", *preset, *common])
            cost = StepCost.last
            passes = {"forwards": cost.forwards, "backwards": cost.backwards}
            costs[row] = {name: count / cost.images for name, count in passes.items()}
            return mean(cost.seconds)

        column = {row: partial(step, row) for row in rows}
        (seconds,) = compare(f"Step on {data}", {"CPU time": column}, rounds).values()
    for row, cost in costs.items():
        print(f"{row}: {cost['forwards']:g} forwards and {cost['backwards']:g} backwards an image")
        cost["seconds"] = median(seconds[row])
        cost["relative"] = median(a / b for a, b in zip(seconds[row], seconds[rows[0]]))
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(json.dumps(costs, indent=1))


def linear(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A network on images of 4x4 pixels that costs next to nothing."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, num_classes))


class Plain(LightningModule):
    """Trains and logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = linear()

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def overhead(count: int = 1000, rounds: int = 7) -> None:
    """Times a step of a linear layer on batches of 32 in a bare loop and in a trainer."""
    images, labels = torch.rand(count, 32, 1, 4, 4), torch.randint(10, (count, 32))
    batches: Any = DataLoader(list(zip(images, labels)), batch_size=None)  # type: ignore[arg-type]

    def bare_loop() -> float:
        network = linear()
        optimizer, begin = sgd(network.parameters()), time.process_time()
        for pixels, targets in batches:
            optimizer.zero_grad()
            cross_entropy(network(pixels), targets).backward()
            optimizer.step()
        return (time.process_time() - begin) / count

    def trained(make: Callable[[], LightningModule]) -> float:
        timer = StepTimer()
        train_on(quiet_trainer(max_epochs=0, callbacks=[timer]), make(), batches)
        return timer.seconds[0]

    attack: dict[str, Any] = {"steps": 0, "keep": "last", "start": "zero", "optimizer": sgd}
    unattacked = partial(AT, linear, mean=[0.5], std=[0.5], in_channels=1, **attack)
    variants = {"nothing logged": Plain, "AT without attack": unattacked}
    column = {"bare loop": bare_loop, **{n: partial(trained, make) for n, make in variants.items()}}
    compare("Linear(16, 10), batches of 32", {"CPU time of a step": column}, rounds)


def scaling(rounds: int = 3, options: Sequence[str] = ()) -> None:
    """Times training, flatness and AutoAttack in one process and in two, with a core each.

    Wall-clock time is that of the run's `results.json`, which begins after the processes start.
    `options` are further options of `fit`.
    """
    flatness = ["num_examples=384", "steps=20", "every_n_epochs=1"]
    jobs = {
        "5 epochs, width 64": (["--trainer.max_epochs=5", "--model.network.width=64"], ""),
        "flatness": ([f"--flatness.{option}" for option in flatness], "flatness"),
        "AutoAttack": (
            ["--autoattack.num_examples=80", "--autoattack.chunk_size=20"],
            "autoattack",
        ),
    }

    def run(job: str, processes: int) -> float:
        own, kept = jobs[job]
        without = f"--without=[{','.join(name for name in SWITCHED_OFF if name != kept)}]"
        devices = [f"--trainer.devices={processes}", "--trainer.accelerator=cpu"]
        strategy = ["--trainer.strategy=ddp"] if processes > 1 else []
        common = ["--trainer.max_epochs=1", without, *devices, *strategy, QUIET, *own, *options]
        with tempfile.TemporaryDirectory() as root:
            command = [sys.executable, "-m", "robust_flatness.cli", "fit", f"--folder={root}/run"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, *common], check=True, env=environment, capture_output=True)
            results = json.loads(Path(root, "run", "results.json").read_text())
        return float(results["wall_time_seconds"])

    columns = {
        job: {f"{n} process{'es' * (n > 1)}": partial(run, job, n) for n in (1, 2)} for job in jobs
    }
    compare("AT on Digits, wall-clock time", columns, rounds)


if __name__ == "__main__":
    auto_cli([epoch, steps, overhead, scaling])
