"""The words and numbers of Table 1 that its file formats and the terminal share."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from robust_flatness.reporting.table1 import Group, Table1
from robust_flatness.reporting.table1_rows import AUTOATTACK, COLUMNS, PGD, Cell, Column, Row

DASH = "–"
# Behind errors by PGD in a column that holds errors by AutoAttack too.
MARK = "†"
_MIXED = (
    f"{MARK} By PGD, where AutoAttack was not measured. PGD finds fewer errors: AutoAttack would "
    "put such a row further down, and a group that holds both has no mean."
)
PAPER = "paper, CIFAR-10"
_SHORT = {AUTOATTACK: "AA", PGD: PGD}
# The terminal has no room for it, nor for most of the paper's.
_LEFT_TO_FILES = {"clean_error"}
_NARROWER = {
    "average-case": "average",
    "worst-case": "worst",
    "early-stopped": "early stop",
}

# The terminal drops the first of these first.
_KEPT_LAST = (
    "early_stopped_robust_error",
    "worst_flatness",
    "train_robust_error",
    "average_flatness",
    "test_robust_error",
)
_WIDE = 100
_LABEL = 16  # columns that a name has at least, over which it folds


def published_columns(table: Table1) -> list[Column]:
    """Columns that a paper's figures stand in; none where it has no row of these methods."""
    return [column for column in COLUMNS if table.cells(column, published=True)]


def heading(table: Table1, column: Column, *, published: bool = False) -> list[str]:
    """The name of a column in lines, the last of them its attack and its unit."""
    attack = _attack(table, column, published=published)
    below = ", ".join(filter(None, (attack, "%" if column.is_error else "nats")))
    return [*column.heading.split("\n"), below]


def cells_text(table: Table1, row: Row) -> list[str]:
    """A row's figures, one text a column: mean ± deviation, or a dash."""
    return [
        _cell_text(row.cells.get(column.key), column, len(row.model.runs), _is_mixed(table, column))
        for column in COLUMNS
    ]


def published_text(table: Table1, row: Row) -> list[str]:
    """The same of the paper's figures."""
    return [
        _cell_text(
            row.published.get(column.key), column, 1, _is_mixed(table, column, published=True)
        )
        for column in published_columns(table)
    ]


def means_text(group: Group) -> list[str]:
    """A group's means, one text a column."""
    return [
        _number(group.means[column.key], column) if column.key in group.means else DASH
        for column in COLUMNS
    ]


def group_text(table: Table1, group: Group) -> str:
    """A group's name and its bounds of test RErr."""
    if table.thresholds is None:
        return group.name
    low, high = (f"{100 * threshold:.0f}" for threshold in table.thresholds)
    bounds = {"good": f" (< {low} %)", "average": f" ({low} to {high} %)", "poor": f" (≥ {high} %)"}
    return group.name + bounds.get(group.name, "")


def notes(table: Table1) -> list[str]:
    """Sentences below the table: how to read it, and what it must not be taken for."""
    found = [
        f"Mean ± standard deviation over seeds, of n where fewer than were trained have it; {DASH} "
        "is what was not measured. Flatness is of RLoss on test images, lower is flatter; train "
        "RErr is on training images with the weights fixed. AA is AutoAttack.",
        *_diverged_note(table),
        *_settings_note(table),
        *_groups_note(table),
        *_images_note(table),
    ]
    if any(_is_mixed(table, column) for column in COLUMNS):
        found.append(_MIXED)
    if published_columns(table):
        found.append(
            f"{PAPER}: Table 1 of Stutz et al., ICCV 2021, one network a row, flatness at ξ = 0.5 "
            f"and in the worst case at 0.003; all else is on {table.data}. Rows are beside each "
            "other by their method, whatever their strength."
        )
    return found


def terminal_table(table: Table1, width: int = 100) -> Table:
    """Puts the table into a terminal.

    Clean error and most of the paper's columns are left to the files; below 100 columns, so are
    seeds and all that is the paper's, and then as many others as there is no room for, the least
    important first. The caption says which.

    Args:
        table: The table.
        width: Of the terminal.

    Returns:
        A table to be printed with `rich`.
    """
    columns = [column for column in COLUMNS if column.key not in _LEFT_TO_FILES]
    is_wide = width >= _WIDE
    drawn = _draw(table, columns, is_wide)
    while _width(drawn) > width and (is_wide or len(columns) > 1):
        is_wide, columns = False, columns if is_wide else _without_least(columns)
        drawn = _draw(table, columns, is_wide)
    return drawn


def _draw(table: Table1, columns: Sequence[Column], is_wide: bool) -> Table:
    title, caption = escape(f"Table 1 on {table.data}"), " ".join(_below(table, columns)) or None
    drawn = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("", overflow="fold", min_width=_LABEL)
    for column in columns:
        lines = [_NARROWER.get(line, line) for line in heading(table, column)]
        drawn.add_column("\n".join(lines), justify="right", no_wrap=True)
    more = ["seeds"] if is_wide else []
    if more and published_columns(table):
        more.append("\n".join([*PAPER.split(" "), "test RErr"]))
    for head in more:
        drawn.add_column(head, justify="right", no_wrap=True)
    for group in table.groups:
        _add_group(drawn, table, group, columns, len(more))
    return drawn


def _width(drawn: Table) -> int:
    """Columns of a terminal that a table takes when only its labels fold."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, drawn).minimum


def _without_least(columns: Sequence[Column]) -> list[Column]:
    least = min(columns, key=lambda column: _KEPT_LAST.index(column.key))
    return [column for column in columns if column is not least]


def _below(table: Table1, columns: Sequence[Column]) -> list[str]:
    """Sentences of the caption."""
    left = [c for c in COLUMNS if c not in columns and c.key not in _LEFT_TO_FILES]
    names = ", ".join(column.heading.replace("\n", " ") for column in left)
    found = [_MIXED] if any(_is_mixed(table, column) for column in columns) else []
    return [
        *found,
        *_diverged_note(table),
        *([f"No room for {names}: see table1.md."] if names else []),
    ]


def _add_group(
    drawn: Table, table: Table1, group: Group, columns: Sequence[Column], more: int
) -> None:
    name, means = Text(group_text(table, group)), means_text(group)
    drawn.add_row(name, *(means[COLUMNS.index(column)] for column in columns), style="bold")
    for row in group.rows:
        texts = [text.replace(" ", "") for text in cells_text(table, row)]
        own = [texts[COLUMNS.index(column)] for column in columns]
        first = row.published.get(COLUMNS[0].key)
        paper = _cell_text(first, COLUMNS[0], 1, is_mixed=False)
        drawn.add_row(Text(f"  {row.model.label}"), *own, *[str(len(row.model.runs)), paper][:more])
    drawn.add_section()


def _attack(table: Table1, column: Column, *, published: bool = False) -> str:
    attacks = [_SHORT[attack] for attack in table.attacks(column, published=published)]
    return f" or {MARK}".join(attacks)


def _is_mixed(table: Table1, column: Column, *, published: bool = False) -> bool:
    return len(table.attacks(column, published=published)) > 1


def _cell_text(cell: Cell | None, column: Column, num_runs: int, is_mixed: bool) -> str:
    if cell is None:
        return DASH
    text = _number(cell.mean, column)
    if cell.deviation is not None:
        text += f" ± {_number(cell.deviation, column)}"
    text += f" {MARK}" if is_mixed and cell.attack == PGD else ""
    return text if cell.n == num_runs else f"{text} (n={cell.n})"


def _number(value: float, column: Column) -> str:
    return f"{100 * value:.1f}" if column.is_error else f"{value:.2f}"


def _diverged_note(table: Table1) -> list[str]:
    runs = ", ".join(row.model.diverged for row in table.rows if row.model.diverged)
    return [f"Diverged: {runs}; means leave out what is not finite there."] if runs else []


def _settings_note(table: Table1) -> list[str]:
    """What the letters of labels stand for."""
    return [f"{row.model.label}: {row.model.untold}." for row in table.rows if row.model.untold]


def _groups_note(table: Table1) -> list[str]:
    if table.thresholds is None:
        return ["Too few rows, or too close ones, for groups; bold are means over rows."]
    low, high = (f"{100 * threshold:.0f} %" for threshold in table.thresholds)
    num_rows = len(table.cells(COLUMNS[0]))
    note = (
        f"Groups: good below {low} test RErr, poor from {high}: the 30 % and 70 % percentiles over "
        f"{num_rows} rows, in whole percents; bold are means over rows. In the paper they are 57 % "
        "and 60 %, with AT at 62.8 %"
    )
    baseline = [row for row in table.rows if row.model.method == "at" and not row.model.differs]
    cells = [row.cells[COLUMNS[0].key] for row in baseline if COLUMNS[0].key in row.cells]
    here = f"; here AT is at {100 * cells[0].mean:.1f} %" if len(cells) == 1 else ""
    return [f"{note}{here}."]


def _images_note(table: Table1) -> list[str]:
    measured: dict[str, list[str]] = {}
    for column in COLUMNS:
        images = {cell.images for cell in table.cells(column)} - {None}
        counts = " or ".join(str(count) for count in sorted(filter(None, images)))
        if counts:
            measured.setdefault(counts, []).append(column.heading.replace("\n", " "))
    parts = [f"{counts} for {', '.join(headings)}" for counts, headings in measured.items()]
    return [f"Images: {'; '.join(parts)}."] if parts else []
