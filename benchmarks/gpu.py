"""What training and measuring cost on a GPU, as one JSON file.

python benchmarks/gpu.py gpu.json
python benchmarks/gpu.py gpu.json --images FOLDER --epochs 60   # trains for real, too

Needs torch, torchvision, lightning, torchmetrics, rich and matplotlib; the package itself need not
be installed. Without images, random ones of CIFAR-10's size and number are trained on: an epoch
costs the same. `FOLDER` is one for `ImageFolder`. Under 8 minutes on an H200, by estimate.
"""

import argparse
import json
import logging
import sys
import types
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

try:
    import robust_flatness  # noqa: F401
except ImportError:
    # A package's folder is all that Python needs to find its modules.
    package = types.ModuleType("robust_flatness")
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["robust_flatness"] = package

from gpu_ways import Way, constant, timed, ways
from lightning.pytorch import Callback
from rounds import Goal, Rounds, print_goals, setting
from timed_trainers import quiet_trainer
from torch import Tensor

from robust_flatness.callbacks import AutoAttack, Flatness, RobustEvaluation
from robust_flatness.datamodules import ImageFolder
from robust_flatness.functional.attack import PGD
from robust_flatness.functional.evaluation import evaluation_context, full_float32
from robust_flatness.functional.flatness import measure_flatness
from robust_flatness.functional.robust_loss import measure_robustness
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.networks import ResNet18
from robust_flatness.reporting.published import published_models, published_trajectories

EPS, EPOCH = 8 / 255, 50_000
# FLOP of a forward of an image: 0.5554 GMAC at width 64, counted with hooks.
FORWARD = 1.111e9
# Seven forwards and backwards to the input, one more forward, and the update's three.
PGD_7_STEP = (7 * 2 + 1 + 3) * FORWARD


def peak(device: torch.device, size: int) -> float:
    """TFLOP/s of a product of two bfloat16 matrices, the best of five."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = [timed(device, lambda: a @ a)[0] for _ in range(6)]
    return 2 * size**3 / min(seconds[1:]) / 1e12


def measures(module: AT, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """Flatness and RLoss on 1000 images, fast and in float32: seconds and values."""
    module = module.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(given.measured, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (given.measured,), generator=generator).to(device)
    settings = {"seed": 0, "batch_size": given.measure_batch}

    def flatness(pgd: PGD) -> float:
        found = measure_flatness(
            module,
            images,
            labels,
            pgd,
            xi=0.5,
            num_perturbations=10,
            restarts=1,
            protocol="shared",
            loss="robust",
            distribution="sphere",
            relative_to="layer",
            per_batch=False,
            **settings,
        )
        return found.value

    def loss(pgd: PGD) -> float:
        found = measure_robustness(module, images, labels, pgd, restarts=10, **settings)
        return found.robust_loss

    results: dict[str, Any] = {}
    for name, measure in {"flatness": flatness, "robust_loss": loss}.items():
        for way, precision in {"fast": "bfloat16", "float32": "float32"}.items():
            pgd = PGD(EPS, given.measure_steps, precision=precision)
            with evaluation_context(module), full_float32(device):
                if way == "fast":
                    measure(pgd)
                seconds, value = timed(device, partial(measure, pgd))
            results[name] = results.get(name, {}) | {way: {"seconds": seconds, "value": value}}
    return results


def waits(given: argparse.Namespace) -> list[str]:
    """Where a step waits for the GPU, as PyTorch warns; empty if nowhere."""

    class Watched(AT):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            # The first batch is checked, which waits.
            torch.cuda.set_sync_debug_mode("warn" if batch_idx > given.warm_up else "default")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("default")

    if given.device != "cuda":
        return []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Way(Watched(partial(ResNet18, width=given.width), lr_scheduler=constant), given)()
    return sorted({str(w.message) for w in caught if "synchroniz" in str(w.message)})


def trained(given: argparse.Namespace) -> dict[str, Any]:
    """Trains on real images with measures every fifth epoch, and AutoAttack if it is installed."""
    every = {"every_n_epochs": 5, "steps": given.measure_steps, "num_examples": given.measured}
    callbacks: list[Callback] = [
        *(RobustEvaluation(split=split, **every) for split in ("train", "test")),
        Flatness(split="test", **every),
    ]
    if find_spec("pyautoattack"):
        callbacks.append(AutoAttack(num_examples=given.measured))
    count = given.measured
    sizes = {"num_test": count, "num_train_eval": count, "num_val": count // 2}
    data = ImageFolder(given.images, batch_size=given.batch, **sizes)
    module = AT(partial(ResNet18, width=given.width), fast="graph" if given.graph else True)
    table = EpochCSVLogger(given.file.parent, write=False)
    settings = {"accelerator": given.device, "max_epochs": given.epochs, "callbacks": callbacks}
    trainer = quiet_trainer(**settings, logger=table)
    seconds, _ = timed(torch.device(given.device), lambda: trainer.fit(module, datamodule=data))
    final = {name: float(value) for name, value in trainer.callback_metrics.items()}
    paper, paths = published_models().values, published_trajectories()
    at = paper[paper["label"] == "AT (baseline)"].groupby("weights")
    return {
        "epochs": given.epochs,
        "seconds": seconds,
        "trajectory": table.rows,
        "final": final,
        "paper": {weights: dict(zip(rows["metric"], rows["mean"])) for weights, rows in at},
        "paper_trajectory": paths[paths["method"] == "at"].to_dict("records"),
    }


def measure(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Puts all measurements into `found`, one after another, and what was to be reached."""
    device = torch.device(given.device)
    found |= {"setting": setting(), "arguments": vars(given)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    print(found["setting"], found.get("gpu", "no GPU"))
    found["peak_tflops"] = peak(device, 8192 if device.type == "cuda" else 256)
    print(f"bfloat16 product: {found['peak_tflops']:.1f} TFLOP/s")
    tried = ways(given)
    rounds = Rounds.told(tried, given.rounds)
    epochs = EPOCH // given.batch
    rounds.print_table(
        f"AT, PGD-7, ResNet-18 of width {given.width}, an epoch of {epochs} steps of {given.batch}",
        "wall-clock s",
        lambda seconds: epochs * seconds,
        digits=2,
    )
    found["seconds_a_step"] = dict(rounds.seconds)
    plain = [name for name in tried if "AWP" not in name]
    best = min(plain, key=lambda name: median(rounds.seconds[name]))
    found["fastest"] = best
    epoch = [epochs * seconds for seconds in rounds.seconds[best]]
    share = given.batch * PGD_7_STEP / (found["peak_tflops"] * 1e12 * median(rounds.seconds[best]))
    found["share_of_peak"] = share
    print(f"\nfastest: {best}, {100 * share:.0f} % of the product's rate")
    found["waits"] = waits(given)
    print(f"places where a step waits for the GPU: {found['waits'] or 'none'}")
    found["measures"] = measures(tried["fast"].module, device, given)
    print(json.dumps(found["measures"], indent=1))
    awp = "AT-AWP, fast, graph" if "graph" in best else "AT-AWP, fast"
    against = "fast, graph" if "graph" in best else "fast"
    flat = found["measures"]["flatness"]["fast"]["seconds"]
    losses = {way: value["value"] for way, value in found["measures"]["robust_loss"].items()}
    goals = [
        Goal(f"s an epoch, {best}", epoch, 4.0),
        Goal(f"{awp} / {against}", rounds.ratios(awp, against), 1.25),
        Goal("flatness / epoch", [flat / median(epoch)], 0.6),
        Goal("|RLoss fast / float32 - 1|", [abs(losses["fast"] / losses["float32"] - 1)], 0.01),
    ]
    if given.images:
        found["training"] = trained(given)
        minutes = found["training"]["seconds"] / 60 * 150 / given.epochs
        goals.append(Goal("minutes of 150 epochs, by proportion", [minutes], 20.0))
    print_goals(goals)
    found["goals"] = [str(goal) for goal in goals]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the JSON file to write")
    parser.add_argument("--images", type=Path, help="a folder with train and test")
    parser.add_argument("--epochs", type=int, default=30, help="of training on these")
    parser.add_argument("--graph", action="store_true", help="a CUDA graph in that training")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="timed in each round")
    parser.add_argument("--warm_up", type=int, default=10, help="steps before these")
    parser.add_argument("--width", type=int, default=64, help="of ResNet-18")
    parser.add_argument("--measured", type=int, default=1000, help="images that are measured")
    parser.add_argument("--measure_steps", type=int, default=20, help="of the measures' attacks")
    parser.add_argument("--measure_batch", type=int, default=500)
    parser.add_argument("--no_compile", dest="compile", action="store_false")
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    try:
        measure(given, found)
    finally:
        given.file.write_text(json.dumps(found, default=str, indent=1))


if __name__ == "__main__":
    main()
