"""A W&B workspace and a W&B report page of a project, from code.

Both show the same sections: robust overfitting, flatness, final figures, training. Runs are grouped
by their W&B group, which is the method, so that seeds count as replicas.

Example:
    >>> save_dashboard("robust-flatness", folder="dashboard").urls  # doctest: +SKIP
    {'workspace': 'https://wandb.ai/…', 'report': 'https://wandb.ai/…'}
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from robust_flatness.loggers.wandb_login import offline_mode, why_no_login
from robust_flatness.reporting.dashboard_panels import (
    MOST_RUNS,
    dashboard_library,
    dashboard_sections,
)
from robust_flatness.run_folder.json_file import write_json

_TITLE = "Robust overfitting and flat minima"
_INTRODUCTION = (
    "Adversarial training of several methods, after Stutz, Hein, Schiele, Robust Generalization "
    "and Flat Minima. RLoss is the cross-entropy on adversarial examples, RErr the share of images "
    "that are misclassified clean or under attack, flatness the rise of RLoss under random "
    "perturbations of the weights. A colour is a method, and its runs with different seeds are "
    "replicas: curves show their mean and range."
)
# Columns of the table of runs that stay in sight, behind the run's name.
_COLUMNS = (
    "summary:final/test/robust_loss",
    "summary:final/test/robust_error",
    "summary:test/autoattack_error",
    "summary:final/flatness/average/test",
    "config:seed_everything.value",
)


class Dashboard(NamedTuple):
    """Where a dashboard went: to W&B, or into files.

    Attributes:
        urls: Addresses of `workspace` and `report`; none where they went into files.
        files: The files by the same names; none where it went to W&B.
        reason: What stood in the way of W&B, in words that follow "Weights & Biases"; empty where
            nothing did.
    """

    urls: Mapping[str, str]
    files: Mapping[str, Path]
    reason: str


def build_workspace(project: str, entity: str | None = None) -> Any:
    """Builds the workspace without saving it; needs no network.

    Args:
        project: The W&B project.
        entity: The W&B user or team; `None` leaves it open, which is good for a file only.

    Returns:
        A `wandb_workspaces.workspaces.Workspace`.

    Raises:
        ValueError: If the extra `dashboard` is not installed.
    """
    library = dashboard_library("workspaces")
    sections = [
        library.Section(
            name=section.name,
            panels=section.panels,
            is_open=True,
            layout_settings=library.SectionLayoutSettings(
                columns=section.columns, rows=-(-len(section.panels) // section.columns)
            ),
            panel_settings=library.SectionPanelSettings(x_axis="epoch"),
        )
        for section in dashboard_sections()
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
    """Builds the report page without saving it; needs no network.

    Args:
        project: The W&B project.
        entity: The W&B user or team; `None` leaves it open, which is good for a file only.

    Returns:
        A `wandb_workspaces.reports.v2.Report`.

    Raises:
        ValueError: If the extra `dashboard` is not installed.
    """
    library = dashboard_library("reports.v2")
    blocks = [library.P(_INTRODUCTION)]
    for section in dashboard_sections():
        for panel in section.panels:
            # A page is 24 units wide; the grid puts panels side by side itself.
            panel.layout = library.Layout(w=24 // section.columns, h=6)
        # Without entity and project a set of runs is that of the report's own project; with them,
        # wandb_workspaces would ask the server for it as soon as the page becomes a spec.
        runs = library.Runset(name="Runs by method", groupby=["group"])
        grid = library.PanelGrid(runsets=[runs], panels=section.panels)
        blocks += [library.H2(section.name), library.P(section.text), grid]
    # An entity must be given, or wandb_workspaces asks the server whose key this is.
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
    """Saves workspace and report to W&B, or as files where W&B cannot be reached.

    Asks no question. Each call that reaches W&B saves a new view and a new page.

    Args:
        project: The W&B project.
        entity: The W&B user or team, by default that of the API key.
        folder: Where `workspace.json` and `report.json` are written without W&B.

    Returns:
        Where it went.

    Raises:
        ValueError: If `project` is empty or the extra `dashboard` is not installed.
    """
    if not project:
        raise ValueError("Expected `project` to name a W&B project but got an empty name.")
    dashboard_library("workspaces")
    reason = _why_not_online()
    if not reason:
        try:
            return Dashboard(_upload(project, entity), {}, "")
        except Exception as error:  # of W&B's own classes, some of them private
            reason = f"did not take the dashboard ({error})"
    return Dashboard({}, _write(project, entity, Path(folder)), reason)


def _why_not_online() -> str:
    if offline_mode():
        return f"is kept offline by WANDB_MODE={os.environ['WANDB_MODE']}"
    return why_no_login()


def _upload(project: str, entity: str | None) -> dict[str, str]:
    import wandb

    entity = entity or wandb.Api().default_entity
    # The report first, as saving it makes a project that does not exist yet.
    report = build_report(project, entity).save()
    workspace = build_workspace(project, entity).save()
    return {"workspace": workspace.url, "report": report.url}


def _write(project: str, entity: str | None, folder: Path) -> dict[str, Path]:
    """Writes the arguments of W&B's mutation `upsertView`, of which `spec` is sent as a string."""
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
