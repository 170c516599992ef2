"""The W&B dashboard without W&B: what is built, what is written, and what would be sent."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from robust_flatness.command_line.reports import dashboard
from robust_flatness.reporting import dashboard as module
from robust_flatness.reporting.dashboard import build_report, build_workspace, save_dashboard

ws = pytest.importorskip("wandb_workspaces.workspaces", reason="needs the extra `dashboard`")
wr = pytest.importorskip("wandb_workspaces.reports.v2", reason="needs the extra `dashboard`")

SECTIONS = ["Robust overfitting", "Flatness", "Final metrics", "Training"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Nothing here may ask for an account or the network.")

    monkeypatch.setattr(wandb, "login", refuse)
    monkeypatch.setattr(wandb, "Api", refuse)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        default_entity = "somebody"

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    monkeypatch.setattr(wandb, "Api", Api)


def panels_in(spec: Any) -> list[dict[str, Any]]:
    """Panels anywhere in a spec."""
    if isinstance(spec, list):
        return [panel for item in spec for panel in panels_in(item)]
    if not isinstance(spec, dict):
        return []
    own = [spec] if "viewType" in spec else []
    return own + panels_in(list(spec.values()))


def test_offline_both_are_written_as_they_would_be_sent(tmp_path: Path, no_network: None) -> None:
    saved = save_dashboard("my-project", "my-team", tmp_path / "new")
    assert saved.urls == {}
    assert saved.reason == "is kept offline by WANDB_MODE=offline"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"workspace.json", "report.json"}
    read = {name: json.loads(path.read_text()) for name, path in saved.files.items()}
    for content in read.values():
        assert (content["entityName"], content["projectName"]) == ("my-team", "my-project")
    workspace = read["workspace"]["spec"]["section"]
    assert read["workspace"]["type"] == "project-view"
    assert [section["name"] for section in workspace["panelBankConfig"]["sections"]] == SECTIONS
    assert workspace["settings"]["xAxis"] == "epoch"
    assert workspace["settings"]["maxRuns"] >= 19 * 3
    assert workspace["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]
    blocks = read["report"]["spec"]["blocks"]
    assert read["report"]["type"] == "runs"
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert headings == SECTIONS
    for block in blocks:
        if block["type"] == "panel-grid":
            (runs,) = block["metadata"]["runSets"]
            assert runs["grouping"] == [{"section": "run", "name": "group"}]
            assert "project" not in runs  # which W&B reads as the report's own

    def drawn(spec: Any) -> list[dict[str, Any]]:
        return [panel["config"] for panel in panels_in(spec)]

    assert drawn(read["workspace"]["spec"]) == drawn(read["report"]["spec"])
    assert len(drawn(blocks)) == 26


def test_seeds_are_replicas_in_every_curve_and_bar() -> None:
    spec = build_workspace("p")._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    kinds = [panel["viewType"] for panel in panels_in(spec)]
    assert {"Run History Line Plot", "Bar Chart", "Scatter Plot", "Vega2", "Media Browser"} == set(
        kinds
    )
    for panel in panels_in(spec):
        if panel["viewType"] in ("Run History Line Plot", "Bar Chart"):
            config = panel["config"]
            assert (config["groupBy"], config["aggregate"]) == ("group", True)
            assert (config["groupAgg"], config["groupArea"]) == ("mean", "minmax")
            assert config["limit"] >= 19 * 3
        if panel["viewType"] == "Run History Line Plot":
            assert panel["config"]["xAxis"] == "epoch"


def test_a_trajectory_is_asked_for_as_a_run_asks_for_its_own() -> None:
    """`wandb.plot.scatter` writes `{"name": "id", "fields": []}`; the library's default differs."""
    spec = build_workspace("p")._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    (chart,) = [panel["config"] for panel in panels_in(spec) if panel["viewType"] == "Vega2"]
    table = wandb.Table(columns=["flatness", "robust_loss"], data=[[0.1, 1.0]])
    own = wandb.plot.scatter(table, "flatness", "robust_loss").spec
    assert chart["panelDefId"] == own.spec_name
    assert chart["fieldSettings"] == own.fields
    (asked,) = chart["userQuery"]["queryFields"]
    fields = {field["name"]: field for field in asked["fields"]}
    assert fields["id"] == {"name": "id", "fields": []}
    assert fields["name"] == {"name": "name", "fields": []}
    assert fields["summaryTable"]["args"] == [{"name": "tableKey", "value": "trajectory_table"}]


def test_panels_of_a_page_fill_its_rows_side_by_side() -> None:
    for block in build_report("p").blocks:
        if isinstance(block, wr.PanelGrid):
            places = [(p.layout.x, p.layout.y) for p in block.panels]
            assert len(set(places)) == len(places)
            assert max(panel.layout.x + panel.layout.w for panel in block.panels) == 24
            assert {y for _, y in places} == {0, 6}


def test_without_a_key_the_command_says_where_it_went_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: False)
    monkeypatch.chdir(tmp_path)
    dashboard("p q", entity="team")
    printed = capsys.readouterr().out
    assert printed == (
        "Weights & Biases found no API key, so the dashboard is written to "
        "dashboard/workspace.json and dashboard/report.json. To upload it: "
        "python cli.py dashboard --project 'p q' --entity team\n"
    )
    assert json.loads(Path("dashboard/report.json").read_text())["projectName"] == "p q"


@pytest.mark.parametrize("entity", [None, "team"])
def test_with_a_key_both_are_saved_the_report_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: None,
    entity: str | None,
) -> None:
    saved: list[tuple[str, str, str]] = []

    def save(self: Any) -> Any:
        saved.append((type(self).__name__, self.entity, self.project))
        return self

    for kind, library in (("Report", wr), ("Workspace", ws)):
        monkeypatch.setattr(getattr(library, kind), "save", save)
        monkeypatch.setattr(getattr(library, kind), "url", f"https://x/{kind}")
    dashboard("p", entity=entity, folder=tmp_path / "unused")
    owner = entity or "somebody"
    # Saving a report makes the project, which saving a workspace does not.
    assert saved == [("Report", owner, "p"), ("Workspace", owner, "p")]
    assert capsys.readouterr().out == ("workspace: https://x/Workspace\nreport: https://x/Report\n")
    assert not (tmp_path / "unused").exists()


def test_what_the_server_refuses_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: None
) -> None:
    def save(self: Any) -> Any:
        raise RuntimeError("permission denied")

    monkeypatch.setattr(wr.Report, "save", save)
    saved = save_dashboard("p", folder=tmp_path)
    assert saved.reason == "did not take the dashboard (permission denied)"
    assert sorted(path.name for path in saved.files.values()) == ["report.json", "workspace.json"]


def test_bad_input_and_a_missing_extra_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    with pytest.raises(ValueError, match="Expected `project` to name a W&B project"):
        save_dashboard("", folder=tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setattr(module, "offline_mode", lambda: pytest.fail("asked too late"))
    with pytest.raises(ValueError, match=r"pip install 'robust-flatness\[dashboard\]'"):
        save_dashboard("p", folder=tmp_path)
