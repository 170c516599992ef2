"""A W&B workspace and a W&B report page of a project.

Both show the same sections of panels. Every panel draws a metric of all methods. Runs are grouped
by their W&B group, which is the method: curves show the mean and range over seeds, bars their mean.
`wandb_workspaces` is an extra, imported when it is first needed.

Example:
    >>> save_dashboard("robust-flatness", folder="dashboard").urls  # doctest: +SKIP
    {'workspace': 'https://wandb.ai/…', 'report': 'https://wandb.ai/…'}
"""

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from robust_flatness.loggers.wandb_login import offline_mode, why_no_login
from robust_flatness.run_folder.files import write_json
from robust_flatness.run_folder.metrics import metric

# W&B shows ten runs in a panel by default, and Table 1 with three seeds has 57.
MOST_RUNS = 300
_TITLE = "Robust overfitting and flat minima"
_INTRODUCTION = (
    "Adversarial training of several methods, after Stutz, Hein, Schiele, Robust Generalization "
    "and Flat Minima. RLoss is the cross-entropy on adversarial examples, RErr the share of images "
    "that are misclassified clean or under attack, flatness the rise of RLoss under random "
    "perturbations of the weights. A color is a method, and its runs with different seeds are "
    "replicas: curves show their mean and range."
)
# Pinned columns of the table of runs, after the run's name.
_COLUMNS = (
    "summary:final/test/robust_loss",
    "summary:final/test/robust_error",
    "summary:test/autoattack_error",
    "summary:final/flatness/average/test",
    "config:seed_everything.value",
)
_OVERFITTING = (
    *("test/robust_loss", "train_eval/robust_loss", "val/robust_loss"),
    *("test/robust_error", "train_eval/robust_error", "val/robust_error"),
)
_FLATNESS = ("flatness/average/test", "flatness/average/train", "flatness/worst/test")
_FINAL = (
    *("final/test/robust_loss", "final/test/robust_error"),
    *("test/autoattack_error", "final/flatness/average/test"),
    *("early_stopped/test/robust_loss", "early_stopped/test/robust_error"),
    *("test/autoattack_error_early_stopped", "early_stopped/flatness/average/test"),
)
_TRAINING = ("train/loss", "train/robust_loss", "train/robust_error", "train/learning_rate")


class Dashboard(NamedTuple):
    """Where `workspace` and `report` are: their addresses or, with the reason, their files."""

    urls: Mapping[str, str]
    files: Mapping[str, Path]
    reason: str


def build_workspace(project: str, entity: str | None = None) -> Any:
    """Builds a `wandb_workspaces.workspaces.Workspace` without saving it; needs no network.

    Args:
        project: The W&B project.
        entity: The W&B user or team; `None` leaves it empty, which is enough for a file.

    Raises:
        ValueError: If the extra `dashboard` is not installed.
    """
    library = _library("workspaces")
    sections = [
        library.Section(
            name=name,
            panels=panels,
            is_open=True,
            layout_settings=library.SectionLayoutSettings(
                columns=_columns(panels), rows=-(-len(panels) // _columns(panels))
            ),
            panel_settings=library.SectionPanelSettings(x_axis="epoch"),
        )
        for name, (_, panels) in _sections().items()
    ]
    return library.Workspace(
        entity=entity or "",
        project=project,
        name=_TITLE,
        sections=sections,
        settings=library.WorkspaceSettings(x_axis="epoch", max_runs=MOST_RUNS),
        runset_settings=library.RunsetSettings(
            groupby=[library.Metric("Group")], pinned_columns=["run:displayName", *_COLUMNS]
        ),
    )


def build_report(project: str, entity: str | None = None) -> Any:
    """Builds the report page without saving it, a `wandb_workspaces.reports.v2.Report`.

    Arguments and errors are those of `build_workspace`.
    """
    library = _library("reports.v2")
    blocks = [library.P(_INTRODUCTION)]
    for name, (text, panels) in _sections().items():
        for panel in panels:
            # A page is 24 units wide; the grid places panels side by side itself.
            panel.layout = library.Layout(w=24 // _columns(panels), h=6)
        # Without entity and project, a set of runs is that of the report's own project; with them,
        # wandb_workspaces would ask the server for it as soon as the page becomes a spec.
        runs = library.Runset(name="Runs by method", groupby=["group"])
        grid = library.PanelGrid(runsets=[runs], panels=panels)
        blocks += [library.H2(name), library.P(text), grid]
    # Without an entity, wandb_workspaces asks the server for the owner of the API key.
    return library.Report(
        project=project,
        entity=entity or "",
        title=_TITLE,
        description="Written by `python cli.py dashboard`.",
        blocks=blocks,
        width="fluid",
    )


def save_dashboard(
    project: str, entity: str | None = None, folder: str | Path = "dashboard"
) -> Dashboard:
    """Saves workspace and report to W&B, or to files if W&B cannot be reached.

    Asks no question. Each call that reaches W&B saves a new view and a new page.

    Args:
        project: The W&B project.
        entity: The W&B user or team, by default that of the API key.
        folder: Folder of the files.

    Raises:
        ValueError: If `project` is empty or the extra `dashboard` is not installed.
    """
    if not project:
        raise ValueError("Expected `project` to name a W&B project but got an empty name.")
    _library("workspaces")
    if offline_mode():
        reason = f"is kept offline by WANDB_MODE={os.environ['WANDB_MODE']}"
    else:
        reason = why_no_login()
    if not reason:
        try:
            import wandb

            owner = entity or wandb.Api().default_entity
            # The report first: saving it creates the project if it does not exist yet.
            report = build_report(project, owner).save()
            workspace = build_workspace(project, owner).save()
            return Dashboard({"workspace": workspace.url, "report": report.url}, {}, "")
        except Exception as error:  # W&B's own classes, some of them private
            reason = f"did not take the dashboard ({error})"
    return Dashboard({}, _write(project, entity, Path(folder)), reason)


def _sections() -> dict[str, tuple[str, list[Any]]]:
    """A text and panels by heading; anew for each page, because panels remember their place."""
    bars = [_panel("BarPlot", name, metrics=[name], max_bars_to_show=MOST_RUNS) for name in _FINAL]
    library = _library("reports.v2")
    clouds = [
        library.ScatterPlot(
            title=f"RLoss against flatness, {weights.replace('_', '-')} weights",
            x=library.SummaryMetric(f"{weights}/flatness/average/test"),
            y=library.SummaryMetric(f"{weights}/test/robust_loss"),
            legend_template="${run:group} ${run:displayName}",
            regression=True,
        )
        for weights in ("final", "early_stopped")
    ]
    # The chart that each run logs of its own trajectory, of all runs at once (Fig. 5). The query is
    # that of a run's own chart; the library's default asks for neither name nor id.
    query = {"id": {}, "name": {}, "summaryTable": {"tableKey": "trajectory_table"}}
    trajectories = library.CustomChart(
        query=query,
        chart_name="wandb/scatter/v0",
        chart_fields={"x": "flatness", "y": "robust_loss"},
        chart_strings={"title": "Trajectories: flatness (x) and RLoss (y) of each epoch"},
    )
    images = [
        library.MediaBrowser(title=title, media_keys=[f"figures/{key}"], num_columns=3)
        for title, key in (("Trajectory", "trajectory"), ("Robust overfitting", "overfitting"))
    ]
    return {
        "Robust overfitting": (
            "If a method overfits robustly, RLoss on training images falls towards 0 while RLoss "
            "on test images rises again (Fig. 2). Training images are measured with fixed weights; "
            "the early-stopping images choose the early-stopped weights.",
            _curves(_OVERFITTING),
        ),
        "Flatness": (
            "How much RLoss rises if the weights move by a share of each layer's norm: smaller is "
            "flatter. In the paper, flatter minima go with lower RLoss across methods (Fig. 1). "
            "Worst-case flatness is shown for runs that measured it.",
            [*_curves(_FLATNESS), *clouds, trajectories],
        ),
        "Final metrics": (
            "The full protocol, once at the end of each run: on the last weights, and on the "
            "early-stopped ones. Means over the runs of a method.",
            bars,
        ),
        "Training": (
            "Metrics of the training batches, measured while the weights changed, and the figures "
            "that each run drew of itself.",
            [*_curves(_TRAINING), *images],
        ),
    }


def _columns(panels: Sequence[Any]) -> int:
    """Panels side by side, in full rows."""
    return 4 if len(panels) % 4 == 0 else 3


def _library(name: str) -> ModuleType:
    """Imports `wandb_workspaces.workspaces` or `wandb_workspaces.reports.v2`."""
    try:
        return importlib.import_module(f"wandb_workspaces.{name}")
    except ImportError as error:
        raise ValueError(
            "Expected wandb-workspaces to be installed for a W&B dashboard: "
            f"`pip install 'robust-flatness[dashboard]'`; {error}."
        ) from error


def _panel(kind: str, name: str, **options: Any) -> Any:
    return getattr(_library("reports.v2"), kind)(
        title=metric(name).title,
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_RUNS,
        **options,
    )


def _curves(names: Sequence[str]) -> list[Any]:
    return [_panel("LinePlot", name, x="epoch", title_x="epoch", y=[name]) for name in names]


def _write(project: str, entity: str | None, folder: Path) -> dict[str, Path]:
    """Writes the arguments of W&B's mutation `upsertView`, which takes `spec` as a string."""
    views = {
        "workspace": ("project-view", build_workspace(project, entity)),
        "report": ("runs", build_report(project, entity)),
    }
    files = {}
    for name, (kind, view) in views.items():
        # The public interface can only send it.
        model = view._to_model()
        content = {
            "entityName": entity,
            "projectName": project,
            "type": kind,
            "displayName": model.display_name,
            "description": getattr(model, "description", ""),
            "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
        }
        files[name] = folder / f"{name}.json"
        write_json(files[name], content)
    return files
