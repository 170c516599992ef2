"""Counts the calls of named functions of the package, the functions and the files in four flows."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from lightning.pytorch import Callback

# Everything that a run does by default besides training.
SWITCHED_OFF = [
    *("wandb", "evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping"),
    *("trajectory", "final", "autoattack", "best_checkpoint", "last_checkpoint"),
]
PROJECTIONS = {"clamp", "clamp_", "clip", "minimum"}


class Profile:
    """Counts between `start` and `stop`, or the first projection of an attack."""

    def __init__(self) -> None:
        self.calls, self.seen, self.until_projection = 0, set[CodeType](), False

    def start(self) -> None:
        """Starts from zero."""
        self.package, self.calls, self.seen = os.environ["PYTHONPATH"], 0, set()
        sys.setprofile(self._event)

    def stop(self) -> None:
        """Stops counting."""
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self.package):
            return
        # Modules, comprehensions and lambdas are parts of a function.
        if event == "call" and code.co_name[0] != "<":
            self.calls += 1
            self.seen.add(code)
        elif event == "c_call" and self.until_projection:
            inside = f"{os.sep}functional{os.sep}" in code.co_filename
            if inside and getattr(argument, "__name__", "") in PROJECTIONS:
                self.stop()

    @property
    def counts(self) -> list[int]:
        """Calls, functions and files."""
        return [self.calls, len(self.seen), len({code.co_filename for code in self.seen})]


PROFILE = Profile()


class Watch(Callback):
    """Counts from the last call of the hook `begin` to the hook `end`."""

    def __init__(self, begin: str, end: str) -> None:
        for name, act in ((end, PROFILE.stop), (begin, PROFILE.start)):
            setattr(self, name, lambda *args, act=act, **kwargs: act())


def all_flows(
    must: Callable[..., None], say: Callable[[str], None]
) -> Iterator[tuple[str, list[int]]]:
    """Runs the flows by `must`, the command line. Yields the name and the counts of each."""

    def fit(*options: str, switched_off: list[str] = SWITCHED_OFF) -> list[int]:
        tiny = ["--data.num_train=16", "--data.batch_size=8", "--trainer.max_epochs=1"]
        tiny += ["--model.network.width=8", "--trainer.enable_progress_bar=false"]
        must("fit", *tiny, *options, f"--without=[{','.join(switched_off)}]")
        return PROFILE.counts

    def watch(begin: str, end: str) -> list[str]:
        callback = "--trainer.callbacks"
        return [f"{callback}=flows.Watch", f"{callback}.begin={begin}", f"{callback}.end={end}"]

    say("flows: a step")
    hooks = watch("on_train_batch_start", "on_train_batch_end")
    yield "one step of AT-AWP with PGD-2", fit("--model=ATAWP", "--model.steps=2", *hooks)
    say("flows: an epoch's end")
    light = ["num_examples=8", "num_perturbations=1", "steps=1", "every_n_epochs=1"]
    options = [f"--flatness.{option}" for option in light]
    hooks = watch("on_train_batch_end", "on_train_end")
    others = [name for name in SWITCHED_OFF if name != "flatness"]
    counts = fit(*options, *hooks, switched_off=others)
    yield "flatness at an epoch's end, K = 1, PGD-1", counts
    say("flows: an option")
    PROFILE.until_projection = True
    PROFILE.start()
    counts = fit("--model.eps=8/255")
    PROFILE.stop()
    PROFILE.until_projection = False
    yield "`--model.eps 8/255` from argv to the first projection", counts
    say("flows: report")
    runs = sorted(path.parent for path in Path("runs").glob("*/results.json"))[:6]
    for folder in runs:
        shutil.copytree(folder, Path("six") / folder.name)
    PROFILE.start()
    must("report", "six", "--folder=report_of_six")
    PROFILE.stop()
    yield f"`report` on {len(runs)} runs", PROFILE.counts
