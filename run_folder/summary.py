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

from robust_flatness.run_folder.intervals import error_interval

_DASH, _NOT_FINITE = "–", "not finite"
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
    flatness stands with its standard error; a dash is what was not measured. Without early-stopped
    weights there is no column of them. The title says if the network became not finite.

    Args:
        results: The content of `results.json`: `final` and `early_stopped` (figures by name),
            `num_examples` (images by the same names), `early_stopped_epoch`, `diverged_epoch`,
            `method` and `data`. All of them may be missing.
        folder: Where the files of the run are, for the caption.

    Returns:
        A table to be printed with `rich`.
    """
    epoch, diverged = results.get("early_stopped_epoch"), results.get("diverged_epoch")
    title = " on ".join(results[key] for key in ("method", "data") if results.get(key))
    if diverged is not None:
        title = f"{title}: diverged, not finite from epoch {diverged}".removeprefix(": ")
    table = Table(
        title=escape(title) or None,
        caption=None if folder is None else escape(f"results, checkpoints and figures: {folder}"),
        caption_justify="left",
    )
    table.add_column("")
    tested = results.get("checkpoint") or "last"
    own = "final\nweights" if tested == "last" else f"weights of\n{tested}.ckpt"
    table.add_column(own, justify="right", no_wrap=True)
    images = results.get("num_examples") or {}
    columns = _columns(results)
    if len(columns) > 1:
        note = "" if epoch is None else f"(epoch {epoch})"
        table.add_column(f"early-stopped\n{note}", justify="right", no_wrap=True)
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


def _columns(results: Mapping[str, Any]) -> list[Column]:
    final, stopped = results.get("final") or {}, results.get("early_stopped") or {}
    # AutoAttack logs the figure of the early-stopped weights under a name of its own as well.
    own = "test/autoattack_error_early_stopped"
    logged = {"test/autoattack_error": final[own]} if own in final else {}
    kept = logged or stopped or results.get("early_stopped_epoch") is not None
    return [final, logged | stopped] if kept else [final]


def _find(column: Column, names: tuple[str, ...]) -> tuple[str, float] | tuple[None, None]:
    """The first of the figures that was measured; None in JSON is one that is not finite."""
    for name in names:
        if name in column:
            value = column[name]
            return name, math.nan if value is None else value
    return None, None


def _error(column: Column, names: tuple[str, ...], images: Mapping[str, int]) -> str:
    name, value = _find(column, names)
    if name is None or value is None:
        return _DASH
    if not math.isfinite(value):
        return _NOT_FINITE
    if name not in images:
        return f"{100 * value:.1f} %"
    low, high = error_interval(round(value * images[name]), images[name])
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _loss(column: Column, names: tuple[str, ...]) -> str:
    value = _find(column, names)[1]
    if value is None:
        return _DASH
    return f"{value:.3f}" if math.isfinite(value) else _NOT_FINITE


def _flatness(column: Column, names: tuple[str, ...]) -> str:
    text, error = _loss(column, names), column.get(f"{names[0]}_sem")
    if text in (_DASH, _NOT_FINITE) or error is None or not math.isfinite(error):
        return text
    return f"{text} ± {error:.3f}"
