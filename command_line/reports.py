"""`python cli.py report` and `python cli.py dashboard`.

The functions import what they need, so that `--help` is fast and `report` loads no torch.
"""

import shlex
from pathlib import Path

from rich.console import Console


def report(
    runs: Path,
    folder: Path = Path("report"),
    data: str | None = None,
    published: bool = True,
    finished: list[str] | str = "",
) -> None:
    """Turns finished runs into Table 1, every figure of the paper, and one HTML page.

    It reads run folders only, so that folders copied from a cluster work as well.

    Args:
        runs: A folder that contains run folders, at any depth.
        folder: Folder of the report.
        data: Class of the data, or the name of the folder of images, by default that of most runs.
        published: Whether to show the paper's numbers beside yours.
        finished: Further folders with runs, such as docs/studies/cifar10_small.
    """
    from robust_flatness.run_folder.runs import check_root

    # Before pandas and Matplotlib are loaded, which takes seconds.
    check_root(runs)
    from robust_flatness.reporting.report import write_report
    from robust_flatness.reporting.table1 import terminal_table
    from robust_flatness.study.plan import split_names

    others = split_names(finished)
    written = write_report(runs, folder, data=data, published=published, further=others)
    models, console = written.models, Console()
    console.print(terminal_table(written.table, console.width))
    for label in models.labels:
        if settings := models.settings(label):
            print(f"{label}: {settings}")
    if (result := written.correlation) is not None:
        print(f"RLoss and flatness: {result.text}; {result.over}")
    for left_out, reason in written.left_out:
        # A folder's name may not be valid text, and a reason may have several lines.
        line = " ".join(f"left out: {left_out} {reason}".splitlines())
        print(line.encode(errors="replace").decode())
    count, page = sum(map(len, models.runs.values())), written.folder / "index.html"
    numbers = {"run": count, "model": len(models), "figure": len(written.figures)}
    parts = (f"{n} {name}{'' if n == 1 else 's'}" for name, n in numbers.items())
    print(f"{', '.join(parts)}: {page}")


def dashboard(
    project: str = "robust-flatness",
    entity: str | None = None,
    folder: Path = Path("dashboard"),
) -> None:
    """Sets up a W&B workspace and report page of a project; without network, writes them as files.

    Both show curves of robust overfitting and flatness, RLoss against flatness over all runs, and
    the final metrics, grouped by method with seeds as replicas. Without API key or network, both
    are written to files, with the command that uploads them later. Needs the extra `dashboard`.

    Args:
        project: The W&B project of the runs.
        entity: The W&B user or team, by default that of the API key.
        folder: Folder of workspace.json and report.json, if they are written as files.
    """
    from robust_flatness.loggers.wandb_login import offline_mode
    from robust_flatness.reporting.dashboard import save_dashboard

    saved = save_dashboard(project, entity, folder)
    for name, url in saved.urls.items():
        print(f"{name}: {url}")
    if saved.files:
        later = ["python", "cli.py", "dashboard", "--project", project]
        later += ["--entity", entity] if entity else []
        written = " and ".join(map(str, saved.files.values()))
        print(
            f"Weights & Biases {saved.reason}, so the dashboard is written to {written}. To upload "
            f"it: {'WANDB_MODE=online ' * offline_mode()}{shlex.join(later)}"
        )
