"""What `python cli.py dashboard` does."""

import shlex
from pathlib import Path

from rich.console import Console

from robust_flatness.loggers.wandb_login import offline_mode
from robust_flatness.reporting.dashboard import save_dashboard


def dashboard(
    project: str = "robust-flatness",
    entity: str | None = None,
    folder: Path = Path("dashboard"),
) -> None:
    """Sets up a W&B workspace and report page of a project; without network, writes them as files.

    Both show curves of robust overfitting and flatness, RLoss against flatness over all runs, and
    the final figures, grouped by method with seeds as replicas. Without API key or network, both
    are written to files, with the command that uploads them later. Needs the extra `dashboard`.

    Args:
        project: The W&B project that the runs are in.
        entity: The W&B user or team, by default that of the API key.
        folder: Where workspace.json and report.json are written without network.
    """
    saved = save_dashboard(project, entity, folder)
    console = Console()
    for name, url in saved.urls.items():
        console.print(f"{name}: {url}", soft_wrap=True, highlight=False, markup=False)
    if saved.files:
        later = ["python", "cli.py", "dashboard", "--project", project]
        later += ["--entity", entity] if entity else []
        written = " and ".join(map(str, saved.files.values()))
        console.print(
            f"Weights & Biases {saved.reason}, so the dashboard is written to {written}. To upload "
            f"it: {'WANDB_MODE=online ' * offline_mode()}{shlex.join(later)}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
