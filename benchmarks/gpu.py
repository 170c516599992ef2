"""What training and measuring cost on a GPU, as one JSON file.

python benchmarks/gpu.py gpu.json --seconds 600

The first line is an estimate of the time. A part that would end after `--seconds` is left out; one
that fails is recorded with its error, and the others go on. The file is written after each part.
Needs torch, torchvision, lightning, torchmetrics and rich; the package need not be installed.
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

if find_spec("robust_flatness") is None:
    # A package's folder is all that Python needs to import its modules.
    package = types.ModuleType("robust_flatness")
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["robust_flatness"] = package

from timing import RandomImages, StepTimer, quiet_trainer, random_images

from robust_flatness.lightning_modules import AT, ATAWP
from robust_flatness.networks import ResNet18

BFLOAT16: dict[str, Any] = {"tf32": True, "precision": "bf16-mixed"}
VARIANTS: dict[str, dict[str, Any]] = {
    "AT, float32": {},
    "AT, TF32": {"tf32": True},
    "AT, bfloat16": BFLOAT16,
    "AT, bfloat16, cudnn benchmark": {**BFLOAT16, "benchmark": True},
    "AT, bfloat16, compiled": {**BFLOAT16, "compiled": True},
    "AT-AWP, bfloat16": {**BFLOAT16, "module": ATAWP},
}
STEPS_OF_EPOCH = 390


def clock() -> float:
    """Wall-clock time after all work of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(
    options: argparse.Namespace,
    module: type[AT] = AT,
    precision: Any = "32-true",
    tf32: bool = False,
    benchmark: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """Times steps of training with PGD-7."""
    timer, model = StepTimer(options.warm_up, clock), module(partial(ResNet18, width=options.width))
    if compiled:
        model.network.compile()
    data = RandomImages(options.batch * (options.warm_up + options.steps), batch_size=options.batch)
    settings = {"accelerator": options.device, "max_epochs": options.rounds, "callbacks": [timer]}
    # It restores PyTorch's global flags afterwards.
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=tf32):
        quiet_trainer(precision=precision, **settings).fit(model, datamodule=data)
    epochs = [STEPS_OF_EPOCH * seconds for seconds in timer.seconds]
    return {"seconds_a_step": timer.seconds, "seconds_an_epoch_of_50000": epochs}


def measure(options: argparse.Namespace, name: str, **kwargs: Any) -> dict[str, Any]:
    """Times a measure of a new network on random images."""
    kwargs |= {"steps": options.measure_steps, "batch_size": options.measure_batch}
    made = getattr(import_module("robust_flatness.measures"), name)(**kwargs)
    network = AT(partial(ResNet18, width=options.width)).to(options.device).eval()
    images, labels = (part.to(options.device) for part in random_images(options.measured))
    made(network, images[:2], labels[:2])
    begin = clock()
    metrics = made.metrics(made(network, images, labels), "test")
    return {"seconds": clock() - begin, **metrics}


def parts(options: argparse.Namespace) -> dict[str, tuple[float, Callable[[], dict[str, Any]]]]:
    """Function and estimated seconds of each part."""
    model = ResNet18(10, width=options.width).to(options.device)
    images, labels = (part.to(options.device) for part in random_images(options.batch))
    for _ in range(3):
        begin = clock()
        cross_entropy(model(images), labels).backward()
    one_pass = clock() - begin
    training = 10 + options.rounds * (options.warm_up + options.steps) * 9 * one_pass
    chosen: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        name: (training + 90 * ("compiled" in kwargs), partial(train, options, **kwargs))
        for name, kwargs in VARIANTS.items()
    }
    attack = options.measured / options.batch * options.measure_steps * one_pass
    for precision in ("float32", "bfloat16"):
        flatness = partial(measure, options, "AverageCaseFlatness", precision=precision)
        loss = partial(measure, options, "RobustLoss", precision=precision, restarts=10)
        chosen |= {f"flatness, {precision}": (11 * attack, flatness)}
        chosen |= {f"robust loss, {precision}": (10 * attack, loss)}
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Runs all parts that fit into the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the JSON file to write")
    parser.add_argument("--device", default="cuda")
    sizes = {"seconds": 600, "rounds": 3, "steps": 100, "warm_up": 10, "batch": 128}
    sizes |= {"width": 64, "measured": 1000, "measure_steps": 20, "measure_batch": 500}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    begin, chosen = time.perf_counter(), parts(options)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    estimate = f"about {sum(seconds for seconds, _ in chosen.values()):.0f} s"
    print(f"{gpu}, torch {torch.__version__}: {estimate}", flush=True)
    found: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "options": vars(options)}
    for name, (seconds, run) in chosen.items():
        left = options.seconds - (time.perf_counter() - begin)
        try:
            found[name] = run() if seconds <= left else {"left out": f"{left:.0f} s are left"}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {json.dumps(found[name])[:200]}", flush=True)
        options.file.write_text(json.dumps(found, default=str, indent=1))


if __name__ == "__main__":
    main()
