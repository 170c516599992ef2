"""What training costs: an epoch, a step of each variant, Lightning's overhead, two processes.

python benchmarks/training.py epoch                     # ours, and research code's
python benchmarks/training.py steps --write runs/costs.json
python benchmarks/training.py overhead
python benchmarks/training.py scaling
python benchmarks/training.py profile --model TRADES
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

import timing
import torch
from checkout_facts import SWITCHED_OFF
from jsonargparse import auto_cli
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image
from typing_extensions import override

from robust_flatness import cli, lightning_modules
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.networks import ResNet18

PRESETS = Path(cli.__file__).parent / "configs" / "table1"
ROWS = ["at", *sorted({path.stem for path in PRESETS.glob("*.yaml")} - {"at"})]
# Epochs of the warm-up would be without the perturbation.
AWP = {
    f"{name.lower()}_awp": [f"--model={name}AWP", "--model.warmup=0"] for name in ("TRADES", "MART")
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
        loader = DataLoader(pictures, batch, shuffle=True, collate_fn=list)
        for pixels in loader:
            images = torch.stack([transform(picture) for picture in pixels])
            labels = torch.randint(10, (len(images),))
            settings = {"eps": 8 / 255, "step_size": 0.007, "steps": 7}
            adversarial, _ = timing.textbook_pgd(model.eval(), images, labels, **settings)
            optimizer.zero_grad()
            cross_entropy(model.train()(adversarial), labels).backward()
            optimizer.step()

    return epoch


def epoch(images: int = 384, batch: int = 128, width: int = 16, rounds: int = 7) -> None:
    """Times an epoch of AT with PGD-7. Ours is one of a trainer with the table of epochs."""
    with tempfile.TemporaryDirectory() as folder:
        data = timing.RandomImages(images, batch_size=batch)
        trainer = timing.quiet_trainer(max_epochs=0, logger=EpochCSVLogger(folder))
        module = AT(partial(ResNet18, width=width))
        column = {
            "textbook": timing.cpu_seconds(textbook_epoch(images, batch, width)),
            "ours": timing.cpu_seconds(partial(timing.train_on, trainer, module, data)),
        }
        title = f"AT, {images} images, ResNet-18 of width {width}"
        timing.compare(title, {"CPU time of an epoch": column}, rounds)


def steps(
    rows: Sequence[str] = (*ROWS, *AWP),
    data: str = "Digits",
    epochs: int = 3,
    rounds: int = 7,
    write: Path | None = None,
    options: Sequence[str] = (),
) -> None:
    """Times a step of each row of Table 1 relative to the first row, and counts its passes.

    `write` is a JSON file for `table1.py`, `options` are further ones of `fit`.
    """
    costs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        common = [f"--data={data}", f"--without=[{','.join(SWITCHED_OFF)}]", QUIET]
        common += [f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={root}"]
        common += ["--trainer.callbacks=timing.StepCost", *options]

        def step(row: str) -> float:
            preset = AWP.get(row, [f"--config=table1/{row}.yaml"])
            with redirect_stdout(io.StringIO()):
                cli.main(["fit", *preset, *common])
            cost = timing.StepCost.last
            costs[row] = {name: count / cost.images for name, count in cost.passes.items()}
            return mean(cost.seconds)

        column = {row: partial(step, row) for row in rows}
        (seconds,) = timing.compare(f"Step on {data}", {"CPU time": column}, rounds).values()
    for row, cost in costs.items():
        print(f"{row}: {cost['forwards']:g} forwards and {cost['backwards']:g} backwards an image")
        cost["seconds"] = median(seconds[row])
        cost["relative"] = median(a / b for a, b in zip(seconds[row], seconds[rows[0]]))
    if write is not None:
        write.write_text(json.dumps(costs, indent=1))


def linear(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A network on images of 4x4 pixels that costs next to nothing."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16 * in_channels, num_classes))


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

    def trained() -> float:
        data = {"mean": [0.5], "std": [0.5], "in_channels": 1}
        module = AT(linear, **data, steps=0, keep="last", start="zero", optimizer=sgd)  # type: ignore[arg-type]
        timer = timing.StepTimer()
        timing.train_on(timing.quiet_trainer(max_epochs=0, callbacks=[timer]), module, batches)
        return timer.seconds[0]

    column = {"bare loop": bare_loop, "AT without attack": trained}
    timing.compare("Linear(16, 10), batches of 32", {"CPU time of a step": column}, rounds)


JOBS = {
    "training": ["--trainer.max_epochs=5", "--model.network.width=64"],
    "flatness": ["--flatness.num_examples=384", "--flatness.steps=20"],
    "autoattack": ["--autoattack.num_examples=80", "--autoattack.chunk_size=20"],
}


def scaling(jobs: Sequence[str] = (*JOBS,), rounds: int = 3, options: Sequence[str] = ()) -> None:
    """Times training, flatness and AutoAttack in one process and in two, with a core each.

    Wall-clock time is that of `results.json`, which begins after the processes have started.
    """

    def run(job: str, processes: int) -> float:
        without = f"--without=[{','.join(name for name in SWITCHED_OFF if name != job)}]"
        devices = [f"--trainer.devices={processes}", "--trainer.accelerator=cpu"]
        devices += ["--trainer.strategy=ddp"] if processes > 1 else []
        common = ["--trainer.max_epochs=1", "--flatness.every_n_epochs=1", without, QUIET, *devices]
        with tempfile.TemporaryDirectory() as root:
            command = [sys.executable, "-m", "robust_flatness.cli", "fit", f"--folder={root}/run"]
            command += [*common, *JOBS[job], *options]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            results = json.loads(Path(root, "run", "results.json").read_text())
        return float(results["wall_time_seconds"])

    columns = {job: {f"{n} of 2 cores": partial(run, job, n) for n in (1, 2)} for job in jobs}
    timing.compare("AT on Digits, wall-clock time", columns, rounds)


class StepProfile(Callback):
    """PyTorch's profile of the steps of an epoch after the first two."""

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if index == 2:
            self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])
            self.profiler.start()

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.profiler.stop()


def profile(model: str = "AT", batch: int = 16, width: int = 64, rows: int = 15) -> None:
    """Prints which operations take the CPU time of three training steps of ResNet-18."""
    # Epochs of the warm-up would be without the perturbation.
    arguments = {"warmup": 0} if "AWP" in model else {}
    module = getattr(lightning_modules, model)(partial(ResNet18, width=width), **arguments)
    data, profiled = timing.RandomImages(5 * batch, batch_size=batch), StepProfile()
    timing.train_on(timing.quiet_trainer(max_epochs=0, callbacks=[profiled]), module, data)
    averages = profiled.profiler.key_averages()
    print(f"{model}, ResNet-18 of width {width}, three steps of {batch} images")
    print(averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=50))


if __name__ == "__main__":
    auto_cli([epoch, steps, overhead, scaling, profile])
