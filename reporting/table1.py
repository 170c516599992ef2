"""Table 1 of the paper with rows of one's own: robust error and flatness, sorted and grouped.

Example:
    >>> table = table1(group_runs(runs), published_models("table1"))  # doctest: +SKIP
    >>> write_table(table, Path("report"))  # doctest: +SKIP
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from robust_flatness.reporting.frame import Models
from robust_flatness.run_folder.files import atomic_write, write_text
from robust_flatness.run_folder.metrics import Weights, errors_by_other_attacks, metric
from robust_flatness.run_folder.runs import is_number

AUTOATTACK, PGD = "AutoAttack", "PGD"
PAPER = "paper, CIFAR-10"
DASH = "–"
MARK = "†"  # of errors by PGD in a column that also has errors by AutoAttack
_MIXED = (
    f"{MARK} By PGD, because AutoAttack was not measured. PGD finds fewer errors: AutoAttack would "
    "put such a row further down, and a group that has both has no mean."
)
OTHERS = "‡"  # of errors by other attacks of AutoAttack in a column that has more than these
_OTHERS = f"{OTHERS} By these attacks alone, not by AutoAttack `standard`."
# The strength that Table 1 is about, for methods with several models.
_STRENGTHS: Mapping[str, tuple[str, float]] = {
    "at_awp": ("model.xi", 0.01),
    "cyclic": ("model.lr_scheduler.cycles", 2),
    "entropy_sgd": ("model.optimizer.langevin_steps", 1),
    "label_noise": ("model.label_noise", 0.3),
    "label_smoothing": ("model.label_smoothing", 0.3),
    "mart": ("model.lam", 6.0),
    "self_supervision": ("model.lam", 4.0),
    "trades": ("model.lam", 6.0),
    "weight_averaging": ("weight_averaging.decay", 0.9975),
    "weight_clipping": ("weight_clipping.w_max", 0.005),
    "weight_decay": ("model.optimizer.weight_decay", 0.05),
}
_FEWEST_ROWS = 4  # for groups
_WIDE = 100  # columns of a terminal with room for seeds and the paper's errors
_LABEL = 16  # columns of a terminal that a label has at least


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: Its name in the CSV.
        heading: Its name in two lines.
        names: Metrics with their attacks. A row shows the first one that was measured.
        weights: Whose metrics.
        importance: The terminal leaves out the least important columns; 0 never appears there.
        published: The `names` of a paper's row, if they differ.
    """

    key: str
    heading: str
    names: Mapping[str, str | None]
    weights: Weights = "final"
    importance: int = 0
    published: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def has_attack(self) -> bool:
        """Whether its metrics depend on an attack on the images."""
        return any(attack is not None for attack in self.names.values())

    def text(self, value: float) -> str:
        """A value: shares of 1 in percent, flatness in nats."""
        if math.isnan(value):
            return DASH
        return f"{100 * value:.1f}" if metric(next(iter(self.names))).is_share else f"{value:.2f}"

    def head(self, attack: str | None) -> list[str]:
        """Its heading in lines, the last of them attack and unit."""
        unit = "%" if metric(next(iter(self.names))).is_share else "nats"
        return [*self.heading.split("\n"), f"{attack}, {unit}" if attack else unit]


_TEST = {"test/autoattack_error": AUTOATTACK, "test/robust_error": PGD}
# `train/robust_error` is measured while the weights change and is the error of no network.
_TRAIN = {"train_eval/robust_error": PGD}
_PUBLISHED_TRAIN = {"train/autoattack_error": AUTOATTACK, "train_eval/robust_error": PGD}
_AVERAGE, _WORST = {"flatness/average/test": None}, {"flatness/worst/test": None}
_EARLY = "early_stopped_robust_error"
COLUMNS = (
    Column("test_robust_error", "test\nRErr", _TEST, importance=5),
    Column("train_robust_error", "train\nRErr", _TRAIN, importance=3, published=_PUBLISHED_TRAIN),
    Column("average_flatness", "average-case\nflatness", _AVERAGE, importance=4),
    Column("worst_flatness", "worst-case\nflatness", _WORST, importance=2),
    Column(_EARLY, "early-stopped\nRErr", _TEST, "early_stopped", importance=1),
    Column("clean_error", "clean\nerror", {"test/error": None}),
)
_NARROW = {"average-case": "average", "worst-case": "worst", "early-stopped": "early stop"}
_SORTED_BY = COLUMNS[0]


@dataclass(frozen=True)
class Table1:
    """The table.

    Attributes:
        data: Data set of all rows, such as `Digits`, see `Run.data`.
        frame: A row for each model, by label, as in `table1.csv`: `group` (`good`, `average`,
            `poor`; `all` if rows are too few or too close for groups; `without RErr`), `model`,
            `method`, `data`, `seeds`, and for each column its key with `_mean`, `_sd`, `_n`,
            `_attack` and `_images`, and the paper's value as `paper_` and the key.
        published: The attack of each of the paper's columns, by key.
        thresholds: Test RErr, as a share of 1, below which a row is good, and from which on poor;
            None without groups.
        models: The models, by the same labels.
    """

    data: str
    frame: pd.DataFrame
    published: Mapping[str, str | None]
    thresholds: tuple[float, float] | None
    models: Models

    @property
    def groups(self) -> dict[str, pd.DataFrame]:
        """The rows of each group, in the order of the table."""
        return {str(name): rows for name, rows in self.frame.groupby("group", sort=False)}

    @property
    def notes(self) -> list[str]:
        """Sentences below the table: how to read it, and its limits."""
        settings = {label: self.models.settings(label) for label in self.frame.index}
        measured: dict[str, list[str]] = {}
        for column in COLUMNS:
            images = sorted(self.frame[f"{column.key}_images"].dropna().unique())
            name = column.heading.replace("\n", " ")
            measured.setdefault(" or ".join(map(str, images)), []).append(name)
        counts = [f"{n} for {', '.join(names)}" for n, names in measured.items() if n]
        paper = (
            f"{PAPER}: Table 1 of Stutz et al., ICCV 2021, one network a row, flatness at ξ = 0.5 "
            f"and in the worst case at 0.003; all else is on {self.data}. Rows are "
            "matched by method, whatever its strength."
        )
        return [
            "Mean ± standard deviation over seeds, over n of them if others lack the metric; "
            f"{DASH} means not measured. Flatness is of RLoss on test images, lower is "
            "flatter; train RErr is on training images with the weights fixed. AA is AutoAttack.",
            *self.diverged,
            *(f"{label}: {text}." for label, text in settings.items() if text),
            self._groups_note(),
            *([f"Images: {'; '.join(counts)}."] if counts else []),
            *self.marks(COLUMNS),
            *([paper] if self.published else []),
        ]

    @property
    def diverged(self) -> list[str]:
        """A sentence about diverged runs, if there are any."""
        runs = ", ".join(filter(None, map(self.models.diverged, self.frame.index)))
        return [f"Diverged: {runs}; means leave out what is not finite there."] if runs else []

    def _groups_note(self) -> str:
        if self.thresholds is None:
            return "Too few rows for groups, or rows too close to each other; bold rows are means."
        low, high = self.thresholds
        errors = self.frame[f"{_SORTED_BY.key}_mean"]
        baseline = errors.reindex(_candidates(self.models, "at")).dropna()
        here = [f"; here AT is at {100 * error:.1f} %" for error in baseline if len(baseline) == 1]
        return (
            f"Groups: good below {100 * low:.0f} % test RErr, poor from {100 * high:.0f} %: the "
            f"30 % and 70 % percentiles over {errors.count()} rows, in whole percents; bold rows "
            "are means. In the paper they are 57 % and 60 %, with AT at 62.8 %"
            f"{''.join(here)}."
        )

    def attacks(self, column: Column) -> list[str]:
        """The attacks of the rows of a column, AutoAttack first and PGD last."""
        name = f"{column.key}_attack"
        attacks = self.frame[name].dropna().unique() if name in self.frame else []
        return sorted(attacks, key=lambda attack: (attack == PGD, attack != AUTOATTACK, attack))

    def marks(self, columns: Sequence[Column]) -> list[str]:
        """Sentences about the marks in columns with several attacks."""
        mixed = {attack for c in columns if self.is_mixed(c) for attack in self.attacks(c)}
        marks = {_mark(attack) for attack in mixed}
        return [text for text in (_OTHERS, _MIXED) if text[0] in marks]

    def is_mixed(self, column: Column) -> bool:
        """Whether the rows of a column are by several attacks."""
        return len(self.attacks(column)) > 1

    def means(self, rows: pd.DataFrame) -> dict[str, float]:
        """The mean of each column over rows, if all are by one attack."""
        means: dict[str, float] = {}
        for column in COLUMNS:
            cells = rows.dropna(subset=[f"{column.key}_mean"])
            is_mixed = column.has_attack and cells[f"{column.key}_attack"].nunique() > 1
            if len(cells) and not is_mixed:
                means[column.key] = fmean(cells[f"{column.key}_mean"])
        return means

    def headings(self) -> dict[str, list[str]]:
        """The lines of each column's heading, by its key."""
        own = {column.key: column.head(_names(self.attacks(column))) for column in COLUMNS}
        paper = {
            f"paper_{column.key}": [f"{PAPER}:", *column.head(self.published[column.key])]
            for column in COLUMNS
            if column.key in self.published
        }
        return {"model": ["model"], **own, "seeds": ["seeds"], **paper}

    def texts(self) -> list[tuple[bool, dict[str, str]]]:
        """The rows as texts: whether a row names a group, and its cells by key."""
        rows: list[tuple[bool, dict[str, str]]] = []
        low, high = (f"{100 * share:.0f}" for share in self.thresholds or (math.nan, math.nan))
        bounds = {"good": f" (< {low} %)", "poor": f" (≥ {high} %)"}
        bounds["average"] = f" ({low} to {high} %)"
        for name, group in self.groups.items():
            means = self.means(group)
            texts = {column.key: column.text(means.get(column.key, math.nan)) for column in COLUMNS}
            rows.append((True, {"model": name + bounds.get(name, ""), **texts}))
            for _, row in group.iterrows():
                texts = {column.key: self._cell(row, column) for column in COLUMNS}
                texts |= {"model": row["model"], "seeds": str(row["seeds"])}
                for column in COLUMNS:
                    if column.key in self.published:
                        key = f"paper_{column.key}"
                        texts[key] = column.text(row[key])
                rows.append((False, texts))
        return rows

    def _cell(self, row: pd.Series, column: Column) -> str:
        """Mean and deviation, a mark for PGD beside AutoAttack, and n if it is not all seeds."""
        mean, deviation, n = (row[f"{column.key}_{part}"] for part in ("mean", "sd", "n"))
        if pd.isna(mean):
            return DASH
        text = column.text(mean)
        if not pd.isna(deviation):
            text += f" ± {column.text(deviation)}"
        if self.is_mixed(column):
            text = f"{text} {_mark(row[f'{column.key}_attack'])}".rstrip()
        return text if n == row["seeds"] else f"{text} (n={n})"


def table1(models: Models, published: Models | None = None) -> Table1:
    """Puts models into the paper's Table 1.

    RErr on test images is by AutoAttack, or by PGD if AutoAttack was not measured, and each cell
    states which; on training images by PGD, with fixed weights. As in the paper, rows are good,
    average or poor by the 30 % and 70 % percentiles of test RErr, rounded to whole percents: the
    paper's own 19 rows give 57 % and 60 %.

    Args:
        models: Of one data set.
        published: Rows of a paper, such as `published_models("table1")`. A row stands beside the
            only model of its method, or the one of its label, or, of several, the only one at the
            strength that Table 1 is about.

    Raises:
        ValueError: If there are no models, or they are of several data sets.
    """
    data = sorted({run.data for runs in models.runs.values() for run in runs})
    if len(data) != 1:
        raise ValueError(f"Expected `models` to be of one data set but got {data or 'no model'}.")
    seeds = [len(models.runs[label]) for label in models.labels]
    columns: dict[str, Any] = {
        "model": models.labels,
        "method": models.frame["method"],
        "data": data[0],
        "seeds": seeds,
    }
    frame = pd.DataFrame(columns, index=models.frame.index)
    others = errors_by_other_attacks(models.values["metric"])
    for column in COLUMNS:
        names = column.names
        if column.names is _TEST:
            # AutoAttack first, and PGD last.
            names = {"test/autoattack_error": AUTOATTACK, **others, **_TEST}
        cells = _cells(models, names, column.weights).reindex(frame.index)
        for part in ("mean", "sd", "n", "attack", "images"):
            if part != "attack" or column.has_attack:
                frame[f"{column.key}_{part}"] = cells[part]
        frame[f"{column.key}_n"] = cells["n"].fillna(0).astype(int)
    attacks = _add_published(frame, models, published) if published is not None else {}
    # Shares of images, whose sum over seeds may be off by the last digit.
    errors = frame[f"{_SORTED_BY.key}_mean"].round(9)
    thresholds = group_thresholds(errors.dropna().tolist())
    low, high = thresholds or (math.nan, math.nan)
    groups = np.select(
        [errors.isna(), errors < low, errors < high, errors >= high],
        ["without RErr", "good", "average", "poor"],
        "all",
    )
    frame.insert(0, "group", groups.astype(object))
    # Rows without RErr come last and keep their order.
    measured = sorted(errors.dropna().index, key=lambda label: (errors[label], label))
    frame = frame.loc[[*measured, *errors[errors.isna()].index]]
    return Table1(data[0], frame, attacks, thresholds, models)


def group_thresholds(errors: Sequence[float]) -> tuple[float, float] | None:
    """The test errors between good, average and poor rows.

    They are the 30 % and 70 % percentiles in whole percents; None if rows are too few or too close.

    Example:
        >>> group_thresholds([0.5, 0.54, 0.6, 0.7])
        (0.54, 0.61)
    """
    if len(errors) < _FEWEST_ROWS:
        return None
    low, high = (round(float(np.percentile(errors, share)), 2) for share in (30, 70))
    return (low, high) if low < high else None


def write_table(table: Table1, folder: Path) -> list[Path]:
    r"""Writes `table1.md`, `table1.csv` and `table1.tex`.

    The CSV has full numbers: errors as shares of 1, flatness in nats, an empty cell for what was
    not measured. The LaTeX is a `tabular` for `\input`, which needs the package `booktabs`.

    Returns:
        The files.
    """
    with atomic_write(folder / "table1.csv") as temporary:
        table.frame.to_csv(temporary, index=False, lineterminator="\r\n")
    write_text(folder / "table1.md", _markdown(table))
    write_text(folder / "table1.tex", _latex(table))
    return [folder / f"table1.{suffix}" for suffix in ("md", "csv", "tex")]


def terminal_table(table: Table1, width: int = 100) -> Table:
    """Puts the table into a terminal of some width, to be printed with `rich`.

    Clean error and most of the paper's columns are left to the files; below 100 columns, so are
    seeds and all of the paper's, and then the least important columns for which there is no room.
    The caption names them.

    """
    columns = [column for column in COLUMNS if column.importance]
    is_wide, console = width >= _WIDE, Console(width=10_000)
    while True:
        drawn = _terminal(table, columns, is_wide)
        # The minimum is the width at which only labels fold.
        fits = Measurement.get(console, console.options, drawn).minimum <= width
        if fits or (len(columns) == 1 and not is_wide):
            return drawn
        if not is_wide:
            columns.remove(min(columns, key=lambda column: column.importance))
        is_wide = False


def _cells(models: Models, names: Mapping[str, str | None], weights: Weights) -> pd.DataFrame:
    """For each model the first metric that was measured, with its attack."""
    columns = [models.column(name, weights).assign(attack=attack) for name, attack in names.items()]
    # Empty frames have no types, which pandas 2 warns about.
    cells = pd.concat([column for column in columns if len(column)] or columns[:1])
    return cells[~cells.index.duplicated()]


def _add_published(frame: pd.DataFrame, models: Models, published: Models) -> dict[str, str | None]:
    """Adds the paper's columns that have a value, and returns their attacks."""
    theirs = pd.Series(_match(models, published), dtype=object).reindex(frame.index)
    attacks: dict[str, str | None] = {}
    for column in COLUMNS:
        cells = _cells(published, column.published or column.names, column.weights)
        values = theirs.map(cells["mean"])
        if values.notna().any():
            frame[f"paper_{column.key}"] = values
            attacks[column.key] = _names(sorted(theirs.map(cells["attack"]).dropna().unique()))
    return attacks


def _match(models: Models, published: Models) -> dict[str, str]:
    """The paper's row of each model that it plainly belongs to, by labels."""
    matched: dict[str, str] = {}
    for method in models.methods:
        theirs = list(published.frame.index[published.frame["method"] == method])
        own = models.frame.index[models.frame["method"] == method]
        matched |= {label: label for label in own if label in theirs}
        ours = _candidates(models, method)
        if len(theirs) == len(ours) == 1:
            matched[ours[0]] = theirs[0]
    return matched


def _candidates(models: Models, method: str) -> list[str]:
    """Models of a method, of several those at Table 1's strength or trained as its row."""
    ours = [label for label in models.labels if models.frame.at[label, "method"] == method]
    if len(ours) < 2:
        return ours
    if method not in _STRENGTHS:
        named = {label: {run.method for run in models.runs.get(label, ())} for label in ours}
        return [label for label in ours if method in named[label]]
    name, strength = _STRENGTHS[method]
    values = {label: models.differs[label].get(name) for label in ours}
    return [label for label, x in values.items() if is_number(x) and math.isclose(x, strength)]


def _names(attacks: Sequence[str]) -> str:
    """Attacks as headings name them, with their marks if there are several."""
    marks = {attack: _mark(attack) if len(attacks) > 1 else "" for attack in attacks}
    return " or ".join(f"{marks[a]}{'AA' if a == AUTOATTACK else a}" for a in attacks)


def _mark(attack: str) -> str:
    return {AUTOATTACK: "", PGD: MARK}.get(attack, OTHERS)


def _markdown(table: Table1) -> str:
    headings = table.headings()
    lines = [[f"{' '.join(h[:-1])} ({h[-1]})" if len(h) > 1 else h[0] for h in headings.values()]]
    for is_group, texts in table.texts():
        cells = [texts.get(key, "") for key in headings]
        if is_group:
            lines.append([f"**{cell}**" if cell else "" for cell in cells])
        else:
            lines.append([_escape_markdown(cell) for cell in cells])
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    text = "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in lines
    )
    notes = "\n".join(f"- {_escape_markdown(note)}" for note in table.notes)
    return f"# Table 1 on {table.data}\n\n{text}\n\n{notes}\n"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|`*_<\[\]])", r"\\\1", text)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{special: f"\\{special}" for special in "%&_#${}"},
    "[": "{[}",  # which a preceding `\\` would take as its option
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "–": "--",
    "…": r"\dots{}",
    "“": "``",
    "”": "''",
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "ξ": r"$\xi$",
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def _latex(table: Table1) -> str:
    headings = table.headings()
    # The paper's columns have a common heading above theirs.
    heads = [
        r" \\ ".join(_escape_latex(line) for line in lines if line != f"{PAPER}:")
        for lines in headings.values()
    ]
    columns = [heads[0], *(rf"\shortstack[r]{{{head}}}" for head in heads[1:])]
    rows: list[list[str]] = []
    for is_group, cells in table.texts():
        texts = [_escape_latex(cells.get(key, "")) for key in headings]
        if is_group:
            texts = [rf"\textbf{{{text}}}" if text else "" for text in texts]
            # `to_latex` draws the rule below the headings itself.
            texts[0] = ("\\midrule\n" if rows else "") + texts[0]
        rows.append(texts)
    form = f"l*{{{len(columns) - 1}}}{{r}}"
    text = pd.DataFrame(rows, columns=columns).to_latex(
        index=False, column_format=form, escape=False
    )
    if table.published:
        first, last = len(COLUMNS) + 3, len(columns)
        over = rf"\multicolumn{{{len(table.published)}}}{{c}}{{{PAPER}}} \\"
        over = f"{'& ' * (first - 1)}{over}\n\\cmidrule(l){{{first}-{last}}}\n"
        text = text.replace("\\toprule\n", f"\\toprule\n{over}", 1)
    notes = [f"% {note}" for note in (r"Needs \usepackage{booktabs}.", *table.notes)]
    return "\n".join([*notes, text])


def _escape_latex(text: str) -> str:
    return _LATEX_SPECIAL.sub(lambda match: _LATEX[match[0]], text)


def _terminal(table: Table1, columns: Sequence[Column], is_wide: bool) -> Table:
    left = ", ".join(
        column.heading.replace("\n", " ")
        for column in COLUMNS
        if column.importance and column not in columns
    )
    caption = [
        *table.marks(columns),
        *table.diverged,
        *([f"No room for {left}: see table1.md."] if left else []),
    ]
    drawn = Table(
        title=escape(f"Table 1 on {table.data}"),
        caption=" ".join(caption) or None,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    headings, paper = table.headings(), f"paper_{_SORTED_BY.key}"
    heads = {column.key: headings[column.key] for column in columns}
    if is_wide:
        heads |= {key: headings[key] for key in ("seeds", paper) if key in headings}
    if paper in heads:
        heads[paper] = [*PAPER.split(" "), "test RErr"]
    drawn.add_column("", overflow="fold", min_width=_LABEL)
    for lines in heads.values():
        head = "\n".join(_NARROW.get(line, line) for line in lines)
        drawn.add_column(head, justify="right", no_wrap=True)
    for is_group, texts in table.texts():
        if is_group and drawn.rows:
            drawn.add_section()
        label = Text(texts["model"] if is_group else f"  {texts['model']}")
        cells = [texts.get(key, "").replace(" ", "") for key in heads]
        drawn.add_row(label, *cells, style="bold" if is_group else None)
    return drawn
