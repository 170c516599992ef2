"""Table 1 as Markdown, CSV and LaTeX."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_flatness.reporting.table1 import Group, Table1
from robust_flatness.reporting.table1_rows import COLUMNS, Row
from robust_flatness.reporting.table1_text import (
    PAPER,
    cells_text,
    group_text,
    heading,
    means_text,
    notes,
    published_columns,
    published_text,
)
from robust_flatness.run_folder.atomic_write import whole_file

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{special: f"\\{special}" for special in "%&_#${}"},
    "[": "{[}",  # which a preceding `\\` would take for its own
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "†": r"\textdagger{}",
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
_MARKDOWN_SPECIAL = re.compile(r"([\\|`*_<\[\]])")


def write_table(table: Table1, folder: Path) -> list[Path]:
    r"""Writes `table1.md`, `table1.csv` and `table1.tex`.

    The CSV has full numbers: errors as shares of 1, flatness in nats, an empty cell for what was
    not measured. The LaTeX is a `tabular` to be `\input`, which needs the package `booktabs`.

    Args:
        table: The table.
        folder: Where to, created where it does not exist.

    Returns:
        The files.
    """
    texts = {"md": _markdown(table), "tex": _latex(table)}
    with (
        whole_file(folder / "table1.csv") as beside,
        beside.open("w", newline="", encoding="utf-8") as file,
    ):
        records = [_record(table, group, row) for group in table.groups for row in group.rows]
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    for suffix, text in texts.items():
        with whole_file(folder / f"table1.{suffix}") as beside:
            beside.write_text(text, encoding="utf-8")
    return [folder / f"table1.{suffix}" for suffix in ("md", "csv", "tex")]


def _record(table: Table1, group: Group, row: Row) -> dict[str, Any]:
    """A row with full numbers under names for machines."""
    model = row.model
    record: dict[str, Any] = {"group": group.name, "model": model.label, "method": model.method}
    record |= {"data": table.data, "seeds": len(model.runs)}
    for column in COLUMNS:
        cell = row.cells.get(column.key)
        record[f"{column.key}_mean"] = cell and cell.mean
        record[f"{column.key}_sd"] = cell and cell.deviation
        record[f"{column.key}_n"] = cell.n if cell else 0
        if column.has_attack:
            record[f"{column.key}_attack"] = cell and cell.attack
        record[f"{column.key}_images"] = cell and cell.images
    for column in published_columns(table):
        cell = row.published.get(column.key)
        record[f"paper_{column.key}"] = cell and cell.mean
    return record


def _markdown(table: Table1) -> str:
    head = ["model", *(_line(heading(table, column)) for column in COLUMNS), "seeds"]
    for column in published_columns(table):
        head.append(f"{PAPER}: {_line(heading(table, column, published=True))}")
    rows = [head]
    for group in table.groups:
        bold = [f"**{text}**" for text in (group_text(table, group), *means_text(group))]
        rows.append([*bold, *[""] * (len(head) - len(bold))])
        rows += [[_escape_markdown(text) for text in _texts(table, row)] for row in group.rows]
    lines = _aligned(rows)
    below = "\n".join(f"- {_escape_markdown(note)}" for note in notes(table))
    return f"# Table 1 on {table.data}\n\n" + "\n".join(lines) + f"\n\n{below}\n"


def _line(lines: Sequence[str]) -> str:
    return f"{' '.join(lines[:-1])} ({lines[-1]})"


def _texts(table: Table1, row: Row) -> list[str]:
    own = [row.model.label, *cells_text(table, row), str(len(row.model.runs))]
    return own + published_text(table, row)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown's lines with columns of one width: labels to the left, figures to the right."""
    widths = [max(3, *(len(row[index]) for row in rows)) for index in range(len(rows[0]))]
    lines = [
        " | ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    rule = " | ".join(
        "-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)
    )
    return [f"| {line} |" for line in (lines[0], rule, *lines[1:])]


def _escape_markdown(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text)


def _latex(table: Table1) -> str:
    num_empty = 1 + len(published_columns(table))
    lines = [f"% {note}" for note in (r"Needs \usepackage{booktabs}.", *notes(table))]
    lines += _latex_head(table)
    for group in table.groups:
        bold = [group_text(table, group), *means_text(group)]
        texts = [rf"\textbf{{{_escape_latex(text)}}}" for text in bold]
        lines += [r"\midrule", " & ".join([*texts, *[""] * num_empty]) + r" \\"]
        lines += [_latex_row(_texts(table, row)) for row in group.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_head(table: Table1) -> list[str]:
    paper = published_columns(table)
    num_own, num_all = len(COLUMNS) + 2, len(COLUMNS) + 2 + len(paper)
    lines = [rf"\begin{{tabular}}{{l*{{{num_all - 1}}}{{r}}}}", r"\toprule"]
    if paper:
        over = rf"\multicolumn{{{len(paper)}}}{{c}}{{{PAPER}}}"
        lines += [rf"{'& ' * num_own}{over} \\", rf"\cmidrule(l){{{num_own + 1}-{num_all}}}"]
    headings = [heading(table, column) for column in COLUMNS]
    headings += [["seeds"], *(heading(table, column, published=True) for column in paper)]
    return [*lines, " & ".join(["model", *map(_stacked, headings)]) + r" \\"]


def _stacked(lines: Sequence[str]) -> str:
    stacked = r" \\ ".join(map(_escape_latex, lines))
    return rf"\shortstack[r]{{{stacked}}}"


def _latex_row(texts: Sequence[str]) -> str:
    return " & ".join(map(_escape_latex, texts)) + r" \\"


def _escape_latex(text: str) -> str:
    return _LATEX_SPECIAL.sub(lambda found: _LATEX[found[0]], text)
