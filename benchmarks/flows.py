"""How much of the package four flows pass through: calls, functions and files.

`sys.setprofile` sees each Python call; those of named functions in the package count. `compare.py`
prints them for two checkouts: what they share, such as the network, is in both.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from lightning.pytorch import Callback

# Everything that a run does by default besides training.
SWITCHED_OFF = (
    *("wandb", "evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping"),
    *("trajectory", "final", "autoattack", "best_checkpoint", "last_checkpoint"),
)
PROJECTIONS = {"clamp", "clamp_", "clip", "minimum"}


class Profile:
    """Counts calls of functions in the package while it is on."""

    def __init__(self) -> None:
        self.package = ""
        self.calls, self.seen = 0, set[CodeType]()
        self.until: Callable[[FrameType, Any], bool] | None = None

    def start(self) -> None:
        """Begins to count, from zero."""
        self.package, self.calls, self.seen = os.environ["PYTHONPATH"], 0, set()
        sys.setprofile(self._event)

    def stop(self) -> None:
        """Ends counting."""
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self.package):
            return
        # Neither modules nor comprehensions and lambdas, which are parts of a function.
        if event == "call" and code.co_name[0] != "<":
            self.calls += 1
            self.seen.add(code)
        elif event == "c_call" and self.until is not None and self.until(frame, argument):
            self.stop()

    @property
    def counts(self) -> list[int]:
        """Calls, functions and files."""
        return [self.calls, len(self.seen), len({code.co_filename for code in self.seen})]


PROFILE = Profile()


class Watch(Callback):
    """Counts between two hooks of a run, first among its callbacks.

    Args:
        begin: Hook that begins; the last one of its kind counts.
        end: Hook that ends.
    """

    def __init__(self, begin: str, end: str) -> None:
        for name, act in ((end, PROFILE.stop), (begin, PROFILE.start)):
            setattr(self, name, lambda *args, act=act, **kwargs: act())


def is_projection(frame: FrameType, function: Any) -> bool:
    """Whether a call clamps a tensor in the package's functions, the first of which projects."""
    inside = f"{os.sep}functional{os.sep}" in frame.f_code.co_filename
    return inside and getattr(function, "__name__", "") in PROJECTIONS


def all_flows(
    must: Callable[..., str], say: Callable[[str], None]
) -> Iterator[tuple[str, list[int]]]:
    """Runs the four flows.

    Args:
        must: Runs a command line.
        say: Prints progress.

    Yields:
        Name of the flow, and its calls, functions and files.
    """
    tiny = ["--data.num_train=16", "--data.batch_size=8", "--trainer.max_epochs=1"]
    tiny += ["--model.network.width=8", "--trainer.enable_progress_bar=false"]
    say("flows: a step")
    watch = ["--trainer.callbacks=flows.Watch", "--trainer.callbacks.begin=on_train_batch_start"]
    step = [*watch, "--trainer.callbacks.end=on_train_batch_end", "--model.steps=2"]
    must("fit", "--model=ATAWP", *tiny, *step, without(*SWITCHED_OFF))
    yield "one step of AT-AWP with PGD-2", PROFILE.counts
    say("flows: an epoch's end")
    watch = ["--trainer.callbacks=flows.Watch", "--trainer.callbacks.begin=on_train_batch_end"]
    light = ["num_examples=8", "num_perturbations=1", "steps=1", "every_n_epochs=1"]
    measure = [f"--flatness.{option}" for option in light]
    others = without(*(name for name in SWITCHED_OFF if name != "flatness"))
    must("fit", *tiny, *watch, "--trainer.callbacks.end=on_train_end", *measure, others)
    yield "flatness at an epoch's end, K = 1, PGD-1", PROFILE.counts
    say("flows: an option")
    PROFILE.until = is_projection
    PROFILE.start()
    must("fit", "--model.eps=8/255", *tiny, without(*SWITCHED_OFF))
    PROFILE.stop()
    PROFILE.until = None
    yield "`--model.eps 8/255` from argv to the first projection", PROFILE.counts
    say("flows: report")
    runs = sorted(path.parent for path in Path("runs").glob("*/results.json"))[:6]
    for folder in runs:
        shutil.copytree(folder, Path("six") / folder.name)
    PROFILE.start()
    must("report", "six", "--folder=report_of_six")
    PROFILE.stop()
    yield f"`report` on {len(runs)} runs", PROFILE.counts


def without(*names: str) -> str:
    """The option that leaves parts of a run out."""
    return f"--without=[{','.join(names)}]"
