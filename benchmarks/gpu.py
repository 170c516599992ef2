"""What attacks, training and measures cost on a GPU, as one JSON file.

python benchmarks/gpu.py gpu.json --budget 600
python benchmarks/gpu.py smoke.json --device cpu --tiny      # runs every part, measures nothing

The first line is an estimate of the time. A part that would end after the budget of seconds is left
out; one that fails is recorded with its error, and the others go on. The file is written after each
part. PyTorch's global flags are set for each part and restored after it. Needs torch, torchvision,
lightning, torchmetrics and rich; torchattacks and pyautoattack for the parts of their names.
The package need not be installed.
"""

import argparse
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from torch.autograd import DeviceType
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

if find_spec("robust_flatness") is None:
    # A package's folder is all that Python needs to import its modules.
    package = types.ModuleType("robust_flatness")
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["robust_flatness"] = package

from timing import RandomImages, StepTimer, quiet_trainer, random_images, textbook_pgd

from robust_flatness.functional import pgd_attack
from robust_flatness.lightning_modules import AT, ATAWP
from robust_flatness.networks import ResNet18

EPS, STEP_SIZE, STEPS_OF_EPOCH = 8 / 255, 0.007, 390
BFLOAT16: dict[str, Any] = {"tf32": True, "precision": "bf16-mixed"}
TRAINING: dict[str, dict[str, Any]] = {
    "AT, float32": {},
    "AT, TF32": {"tf32": True},
    "AT, bfloat16": BFLOAT16,
    "AT, bfloat16, cudnn benchmark": {**BFLOAT16, "benchmark": True},
    "AT, bfloat16, compiled": {**BFLOAT16, "compiled": True},
    "AT, bfloat16, DDP of one process": {**BFLOAT16, "strategy": "ddp"},
    "AT-AWP, bfloat16": {**BFLOAT16, "module": ATAWP},
}
CRAFTING = ("textbook", "torchattacks", "ours, best", "ours, last")
TINY = {
    "budget": 300,
    "rounds": 1,
    "steps": 1,
    "warm_up": 1,
    "batch": 4,
    "width": 2,
    "pgd_steps": 1,
}
TINY |= {"measured": 4, "measure_steps": 1, "measure_batch": 4, "attacked": 2}
Part = Callable[[], dict[str, Any]]


def clock() -> float:
    """Wall-clock time after all work of the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def flags(*, tf32: bool = False, benchmark: bool = False) -> Iterator[None]:
    """PyTorch's global flags: TF32 in convolutions and matrix products, and cuDNN's benchmark."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    settings: list[tuple[Any, str, Any]] = [(convolutions, "benchmark", benchmark)]
    # Since PyTorch 2.9 a setting made this way cannot be read the older way, nor the reverse.
    if hasattr(convolutions, "conv"):
        kind = "tf32" if tf32 else "ieee"
        settings += [(part, "fp32_precision", kind) for part in (products, convolutions.conv)]
    else:
        # It is the precision of matrix products too, `torch.set_float32_matmul_precision`.
        settings += [(part, "allow_tf32", tf32) for part in (products, convolutions)]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before):
            setattr(owner, name, value)


class Kernels:
    """Counts kernels on a GPU, or operations on the CPU, between `start` and `stop`."""

    def start(self) -> None:
        """Begins to count."""
        kinds = [ProfilerActivity.CPU]
        self.on_gpu = torch.cuda.is_available()
        self._profile = profile(activities=[*kinds, *[ProfilerActivity.CUDA] * self.on_gpu])
        self._profile.start()

    def stop(self) -> dict[str, int]:
        """Returns the number."""
        clock()
        self._profile.stop()
        events = self._profile.events() or []
        if self.on_gpu:
            return {"kernels": sum(event.device_type == DeviceType.CUDA for event in events)}
        return {"operations": sum(event.name.startswith("aten::") for event in events)}


class CountedStep(Callback):
    """Counts the kernels of the last step of the warm-up, which is not timed."""

    def __init__(self, step: int) -> None:
        self.step, self.kernels, self.counts = step, Kernels(), dict[str, int]()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Begins to count."""
        if index == self.step and not trainer.current_epoch:
            self.kernels.start()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Ends it."""
        if index == self.step and not trainer.current_epoch:
            self.counts = self.kernels.stop()


def timed(run: Callable[[], object], times: int) -> dict[str, Any]:
    """Seconds of each call after one that warms up and one that is counted."""
    run()
    kernels = Kernels()
    kernels.start()
    run()
    counts, seconds = kernels.stop(), []
    for _ in range(times):
        begin = clock()
        run()
        seconds.append(clock() - begin)
    return {"seconds": seconds, **counts}


def craft(options: argparse.Namespace, name: str, bfloat16: bool = False) -> dict[str, Any]:
    """Times PGD on one batch: research code's and torchattacks', in PyTorch's layout, or ours."""
    model = ready(options)
    images, labels = (part.to(options.device) for part in random_images(options.batch))
    if name in ("textbook", "torchattacks"):
        model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if name == "textbook":
        settings: dict[str, Any] = {"eps": EPS, "step_size": STEP_SIZE, "steps": options.pgd_steps}
        run: Callable[[], object] = partial(textbook_pgd, model, images, labels, **settings)
    elif name == "torchattacks":
        settings = {"eps": EPS, "alpha": STEP_SIZE, "steps": options.pgd_steps}
        attack = import_module("torchattacks").PGD(model, **settings)
        run = partial(attack, images, labels)
    else:
        kept: dict[str, Any] = {"keep": name.removeprefix("ours, "), "start": "uniform"}
        kept |= {"eps": EPS, "steps": options.pgd_steps}
        run = partial(pgd_attack, model, images, labels, **kept)
    cast = torch.autocast(images.device.type, torch.bfloat16) if bfloat16 else nullcontext()
    with cast:
        return timed(run, 3 * options.rounds)


def train(
    options: argparse.Namespace,
    module: type[AT] = AT,
    precision: Any = "32-true",
    compiled: bool = False,
    strategy: str = "auto",
    benchmark: bool = False,
) -> dict[str, Any]:
    """Times steps of training."""
    timer, counted = StepTimer(options.warm_up, clock), CountedStep(options.warm_up - 1)
    model = module(partial(ResNet18, width=options.width), steps=options.pgd_steps)
    if compiled:
        model.network.compile()
    data = RandomImages(options.batch * (options.warm_up + options.steps), batch_size=options.batch)
    # A trainer sets the global flag when it is built.
    settings: dict[str, Any] = {"precision": precision, "benchmark": benchmark}
    settings |= {"accelerator": options.device, "strategy": strategy, "max_epochs": options.rounds}
    # DDP leaves the ranks of its processes in the environment, where the next trainer would read
    # them, and sets the number of threads.
    threads = torch.get_num_threads()
    with patch.dict(os.environ):
        try:
            quiet_trainer(callbacks=[timer, counted], **settings).fit(model, datamodule=data)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            torch.set_num_threads(threads)
    epochs = [STEPS_OF_EPOCH * seconds for seconds in timer.seconds]
    return {"seconds": timer.seconds, "seconds_an_epoch_of_50000": epochs, **counted.counts}


def measure(options: argparse.Namespace, name: str, **kwargs: Any) -> dict[str, Any]:
    """Times a measure of a new network on random images, warmed up at the same size of a batch."""
    made = getattr(import_module("robust_flatness.measures"), name)(**kwargs)
    network = ready(options)
    count = options.attacked if name == "AutoAttackError" else options.measured
    images, labels = (part.to(options.device) for part in random_images(count))
    if name == "AutoAttackError":
        # A new network is right about nothing else.
        with torch.no_grad():
            labels = network(images).argmax(1)
    else:
        first = slice(made.batch_size)
        made(network, images[first], labels[first])
    begin = clock()
    metrics = made.metrics(made(network, images, labels), "test")
    return {"seconds": [clock() - begin], **metrics}


def ready(options: argparse.Namespace) -> Any:
    """A new network in eval mode, whose BatchNorm has seen random images."""
    model = AT(partial(ResNet18, width=options.width)).to(options.device)
    with torch.no_grad():
        for _ in range(20):
            model.train()(random_images(options.batch)[0].to(options.device))
    return model.eval()


def parts(options: argparse.Namespace) -> dict[str, tuple[float, dict[str, bool], Part]]:
    """Estimated seconds, global flags, and function of each part."""
    model = ResNet18(10, width=options.width).to(options.device)
    images, labels = (part.to(options.device) for part in random_images(options.batch))
    for _ in range(3):
        begin = clock()
        cross_entropy(model(images), labels).backward()
    one_pass = clock() - begin
    chosen: dict[str, tuple[float, dict[str, bool], Part]] = {}
    for name in CRAFTING:
        seconds = 1 + (options.pgd_steps + 1) * (2 + 3 * options.rounds) * one_pass
        for bfloat16 in (False, True):
            run = partial(craft, options, name, bfloat16)
            label = f"crafting, {name}, {'bfloat16' if bfloat16 else 'TF32'}"
            chosen[label] = (seconds, {"tf32": True}, run)
    steps = options.rounds * (options.warm_up + options.steps)
    training = 10 + steps * (options.pgd_steps + 2) * one_pass
    for name, kwargs in TRAINING.items():
        arguments = {key: value for key, value in kwargs.items() if key != "tf32"}
        switches = {key: kwargs.get(key, False) for key in ("tf32", "benchmark")}
        seconds = training + 90 * ("compiled" in kwargs)
        chosen[name] = (seconds, switches, partial(train, options, **arguments))
    batches = (options.measured + options.measure_batch) / options.batch
    attack = batches * options.measure_steps * one_pass
    pgd = {"steps": options.measure_steps, "batch_size": options.measure_batch}
    for precision in ("float32", "bfloat16"):
        flatness = partial(measure, options, "AverageCaseFlatness", precision=precision, **pgd)
        loss = partial(measure, options, "RobustLoss", precision=precision, restarts=10, **pgd)
        chosen[f"flatness, {precision}"] = (11 * attack, {}, flatness)
        chosen[f"robust loss, {precision}"] = (10 * attack, {}, loss)
    # 7888 forwards and 1910 backwards of an image that withstands all attacks, at most.
    seconds = 5000 * options.attacked / options.batch * one_pass
    official = partial(measure, options, "AutoAttackError", eps=0.5 / 255)
    chosen["AutoAttack"] = (seconds, {}, official)
    return chosen


def outcome(run: Part, switches: dict[str, bool]) -> dict[str, Any]:
    """What a part returns with its peak of memory, or its error."""
    on_gpu = torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with flags(**switches):
            result = run()
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
        return {**result, "peak_memory_mib": peak}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(arguments: list[str] | None = None) -> None:
    """Runs all parts that fit into the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the JSON file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, as a smoke test")
    sizes = {"budget": 600, "rounds": 3, "steps": 100, "warm_up": 10, "batch": 128, "width": 64}
    sizes |= {"pgd_steps": 7}
    sizes |= {"measured": 1000, "measure_steps": 20, "measure_batch": 500, "attacked": 64}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}")
    options = parser.parse_args(arguments)
    for name, value in (TINY if options.tiny else sizes).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    begin, chosen = time.perf_counter(), parts(options)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    estimate = f"about {sum(seconds for seconds, *_ in chosen.values()):.0f} s"
    print(f"{gpu}, torch {torch.__version__}: {estimate}, budget {options.budget} s", flush=True)
    results: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "options": vars(options)}
    for name, (seconds, switches, run) in chosen.items():
        left = options.budget - (time.perf_counter() - begin)
        enough = seconds <= left
        results[name] = outcome(run, switches) if enough else {"left out": f"{left:.0f} s are left"}
        print(f"{name}: {json.dumps(results[name])[:200]}", flush=True)
        options.file.write_text(json.dumps(results, default=str, indent=1))


if __name__ == "__main__":
    main()
