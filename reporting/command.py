"""`python cli.py report`: what a folder of runs shows."""

from pathlib import Path

from rich.console import Console

from robust_flatness.reporting.report import write_report
from robust_flatness.reporting.table1_text import terminal_table


def report(
    runs: Path,
    folder: Path = Path("report"),
    data: str | None = None,
    published: bool = True,
) -> None:
    """Turns finished runs into Table 1, every figure of the paper, and one HTML page.

    It reads run folders only, so that folders copied from a cluster will do.

    Args:
        runs: A folder with run folders, at any depth.
        folder: Where the report goes.
        data: Class of the data to report, by default that of most runs.
        published: Whether the paper's numbers stand beside yours.
    """
    console = Console()
    made = write_report(runs, folder, data=data, published=published)
    console.print(terminal_table(made.table, console.width))
    for model in made.models:
        if model.untold:
            console.print(f"{model.label}: {model.untold}", highlight=False, markup=False)
    if made.correlation is not None:
        found = made.correlation
        interval = found.pearson_interval
        bounds = " [{:.2f}, {:.2f}]".format(*interval) if interval else ""
        console.print(
            f"RLoss and flatness: Pearson {found.pearson:.2f}{bounds}, "
            f"Spearman {found.spearman:.2f}; {found.over}",
            highlight=False,
        )
    for left_out, reason in made.left_out:
        # A folder's name may be in bytes that are no text, and a reason have several lines.
        line = " ".join(f"left out: {left_out} {reason}".splitlines()).encode(errors="replace")
        console.print(line.decode(), markup=False, highlight=False, soft_wrap=True)
    count = sum(len(model.runs) for model in made.models)
    console.print(
        f"{count} runs, {len(made.models)} models, {len(made.figures)} figures: "
        f"{made.folder / 'index.html'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
