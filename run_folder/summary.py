"""The table of metrics that a run prints at its end.

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

from robust_flatness.run_folder.metrics import is_by_other_attacks, metric, with_attacks

_HOW_TO_READ = "[…] 95 % interval, ± standard error; lower is better, except for margins"
_DASH, _NOT_FINITE = "–", "not finite"
# Rows by section. A row shows the first of its names that was measured: on training images the one
# with fixed weights.
_SECTIONS = (
    (
        ("test/robust_error",),
        ("test/autoattack_error",),
        ("train_eval/robust_error", "train/robust_error"),
        ("test/error",),
    ),
    (
        ("test/robust_loss",),
        ("test/robust_loss_correct",),
        ("test/robust_loss_incorrect",),
        ("train_eval/robust_loss", "train/robust_loss"),
    ),
    (
        ("flatness/average/test",),
        ("flatness/average/train",),
        ("flatness/clean_average/test",),
        ("flatness/worst/test",),
        ("flatness/clean_worst/test",),
        ("hessian/max_eigenvalue",),
        ("hessian/min_eigenvalue",),
    ),
)
# Other rows have a dash if their metric was not measured; these are left out.
_OPTIONAL = _SECTIONS[2][2:]

Column = Mapping[str, float | None]


def summary_table(results: Mapping[str, Any], *, folder: str | Path | None = None) -> Table:
    """Puts the metrics of a finished run into a table that fits 80 columns.

    Errors are in percent, with Wilson's 95 % interval if the number of images is known; flatness
    has its standard error; a dash marks what was not measured. The column of the early-stopped
    weights is left out if there are none. The title says if the network diverged.

    Args:
        results: The content of `results.json`: `final` and `early_stopped` (metrics by name),
            `num_examples` (images by the same names), `attacks` (by the same names),
            `early_stopped_epoch`, `diverged_epoch`, `method` and `data`. All may be missing.
        folder: The run folder, for the caption.

    Returns:
        A table to be printed with `rich`.
    """
    epoch, diverged = results.get("early_stopped_epoch"), results.get("diverged_epoch")
    title = " on ".join(results[key] for key in ("method", "data") if results.get(key))
    if diverged is not None:
        title = f"{title}: diverged, not finite from epoch {diverged}".removeprefix(": ")
    place = "" if folder is None else f"\nresults, checkpoints and figures: {folder}"
    table = Table(
        title=escape(title) or None,
        caption=escape(f"{_HOW_TO_READ}{place}"),
        caption_justify="left",
    )
    table.add_column("")
    tested = results.get("checkpoint") or "last"
    own = "final\nweights" if tested == "last" else f"weights of\n{tested}.ckpt"
    table.add_column(own, justify="right", no_wrap=True)
    final, stopped = results.get("final") or {}, results.get("early_stopped") or {}
    columns: list[Column] = [final]
    # AutoAttack logs the error of the early-stopped weights beside that of the last ones.
    name = "test/autoattack_error_early_stopped"
    if name in final or stopped or epoch is not None:
        logged = {"test/autoattack_error": final[name]} if name in final else {}
        columns.append(logged | stopped)
        note = "" if epoch is None else f"(epoch {epoch})"
        table.add_column(f"early-stopped\n{note}", justify="right", no_wrap=True)
    attacks = results.get("attacks") or {}
    columns = [with_attacks(column, attacks) for column in columns]
    images = with_attacks(results.get("num_examples") or {}, attacks)
    errors = tuple(tuple(with_attacks(dict.fromkeys(row), attacks)) for row in _SECTIONS[0])
    further = sorted({name for column in columns for name in column if metric(name).in_tables})
    further = [name for name in further if not is_by_other_attacks(name)]
    for section in (errors, *_SECTIONS[1:], tuple((name,) for name in further)):
        table.add_section()
        for names in section:
            measured = [next((n for n in names if n in column), None) for column in columns]
            counts = [images[name] for name in measured if name in images]
            if any(measured) or names not in _OPTIONAL:
                cells = (_cell(*part, images) for part in zip(columns, measured))
                table.add_row(_label(names[0], counts), *cells)
    return table


def error_interval(errors: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's confidence interval of the share of `errors` in `n` images.

    It stays inside [0, 1] and keeps its level near both ends, unlike the usual
    `p ± 1.96 sqrt(p (1 - p) / n)`.

    Raises:
        ValueError: If `n` is below 1, `errors` is outside `[0, n]` or `level` is not within (0, 1).

    Example:
        >>> low, high = error_interval(610, 1000)
        >>> f"{low:.3f} to {high:.3f}"
        '0.579 to 0.640'
    """
    if n < 1:
        raise ValueError(f"Expected `n` to be >= 1 but got {n}.")
    if not 0 <= errors <= n:
        raise ValueError(f"Expected `errors` to be in [0, {n}] but got {errors}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected `level` to be within (0, 1) but got {level}.")
    from scipy.stats import binomtest  # not at the top: it takes a second to import

    interval = binomtest(errors, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def _label(name: str, counts: list[int]) -> str:
    """The title without brackets, indented for a part of the metric above it."""
    label = metric(name).title.replace(" (", " ").replace(")", "")
    if ", " in metric(name).label:
        label = "  " + label.split(", ", 1)[1]
    return f"{label} (n={counts[0]})" if counts and metric(name).is_share else label


def _cell(column: Column, name: str | None, images: Mapping[str, int]) -> str:
    if name is None:
        return _DASH
    value = column[name]
    if value is None or not math.isfinite(value):  # None in JSON is a number that is not finite
        return _NOT_FINITE
    text = metric(name).text(value)
    if metric(name).is_share and name in images:
        low, high = error_interval(round(value * images[name]), images[name])
        return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"
    error = column.get(f"{name}_sem")
    return text if error is None or not math.isfinite(error) else f"{text} ± {error:.3f}"
