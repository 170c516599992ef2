"""The table that a run ends with.

Example:
    >>> import io
    >>> from rich.console import Console
    >>> name = "test/robust_error"
    >>> console = Console(file=io.StringIO(), width=80)
    >>> console.print(summary_table({"final": {name: 0.61}, "num_examples": {name: 1000}}))
    >>> "61.0 % [57.9, 64.0]" in console.file.getvalue()
    True
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from robust_flatness.reporting.intervals import error_interval

_DASH = "–"
# Label, and the names that may hold the figure, the most telling first: training images are best
# judged with the weights at rest.
_ERRORS = (
    ("RErr PGD, test", ("test/robust_error",)),
    ("RErr AutoAttack, test", ("test/autoattack_error",)),
    ("RErr PGD, train", ("train_eval/robust_error", "train/robust_error")),
    ("clean error, test", ("test/error",)),
)
_LOSSES = (
    ("RLoss, test", ("test/robust_loss",)),
    ("  correct when clean", ("test/robust_loss_correct",)),
    ("  incorrect when clean", ("test/robust_loss_incorrect",)),
    ("RLoss, train", ("train_eval/robust_loss", "train/robust_loss")),
)
_FLATNESS = (
    ("average flatness, test", ("flatness/average/test",)),
    ("average flatness, train", ("flatness/average/train",)),
)
# Shown where they were measured.
_EXTRAS = (
    ("  of the clean loss, test", ("flatness/clean_average/test",)),
    ("worst-case flatness, test", ("flatness/worst/test",)),
    ("  of the clean loss, test", ("flatness/clean_worst/test",)),
    ("largest eigenvalue, test", ("hessian/max_eigenvalue",)),
    ("smallest eigenvalue, test", ("hessian/min_eigenvalue",)),
)


def summary_table(results: Mapping[str, Any], *, folder: str | Path | None = None) -> Table:
    """Puts the figures of a finished run into a table that fits into 80 columns.

    Errors stand in percent, behind them Wilson's 95 % interval where the number of images is known;
    flatness stands with its standard error; a dash is what was not measured.

    Args:
        results: The content of `results.json`: `final` and `early_stopped` (figures by name),
            `num_examples` (images by the same names), `early_stopped_epoch`, `method` and `data`.
            All of them may be missing.
        folder: Where the files of the run are, for the caption.

    Returns:
        A table to be printed with `rich`.
    """
    epoch = results.get("early_stopped_epoch")
    table = Table(
        title=escape(" on ".join(results[key] for key in ("method", "data") if results.get(key)))
        or None,
        caption=None if folder is None else escape(f"results, checkpoints and figures: {folder}"),
        caption_justify="left",
    )
    table.add_column("")
    tested = results.get("checkpoint") or "last"
    own = "final\nweights" if tested == "last" else f"weights of\n{tested}.ckpt"
    table.add_column(own, justify="right", no_wrap=True)
    note = "" if epoch is None else f"(epoch {epoch})"
    table.add_column(f"early-stopped\n{note}", justify="right", no_wrap=True)
    images = results.get("num_examples") or {}
    columns = _columns(results)
    for label, names in _ERRORS:
        counts = [images[name] for column in columns if (name := _find(column, names)[0]) in images]
        table.add_row(
            f"{label} (n={counts[0]})" if counts else label,
            *(_error(column, names, images) for column in columns),
        )
    table.add_section()
    for label, names in _LOSSES:
        table.add_row(label, *(_loss(column, names) for column in columns))
    table.add_section()
    for label, names in _FLATNESS:
        table.add_row(label, *(_flatness(column, names) for column in columns))
    for label, names in _EXTRAS:
        if any(_find(column, names)[0] for column in columns):
            table.add_row(label, *(_flatness(column, names) for column in columns))
    return table


Column = Mapping[str, float | None]


def _columns(results: Mapping[str, Any]) -> tuple[Column, Column]:
    final, stopped = results.get("final") or {}, results.get("early_stopped") or {}
    # AutoAttack logs the figure of the early-stopped weights under a name of its own as well.
    logged = {"test/autoattack_error": final.get("test/autoattack_error_early_stopped")}
    return final, logged | stopped


def _find(column: Column, names: tuple[str, ...]) -> tuple[str, float] | tuple[None, None]:
    for name in names:
        value = column.get(name)
        if value is not None and math.isfinite(value):
            return name, value
    return None, None


def _error(column: Column, names: tuple[str, ...], images: Mapping[str, int]) -> str:
    name, value = _find(column, names)
    if name is None or value is None:
        return _DASH
    if name not in images:
        return f"{100 * value:.1f} %"
    low, high = error_interval(round(value * images[name]), images[name])
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _loss(column: Column, names: tuple[str, ...]) -> str:
    value = _find(column, names)[1]
    return _DASH if value is None else f"{value:.3f}"


def _flatness(column: Column, names: tuple[str, ...]) -> str:
    text, error = _loss(column, names), column.get(f"{names[0]}_sem")
    return text if text == _DASH or error is None else f"{text} ± {error:.3f}"
