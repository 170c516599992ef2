"""What a run leaves for its page in W&B, read back from the offline file of a real one."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb_reader import OfflineRun, read_runs

from robust_flatness.cli import main

pytestmark = pytest.mark.slow

TINY = [
    "--trainer.max_epochs=2",
    "--data.num_train=64",
    "--model.network.width=4",
    "--model.steps=2",
    "--trainer.enable_progress_bar=false",
    *(f"--{name}.num_examples=8" for name in ("evaluation", "train_evaluation", "flatness")),
    *(f"--{name}.num_examples=8" for name in ("train_flatness", "early_stopping", "final")),
    "--final.steps=2",
    "--final.restarts=2",
    "--final.num_perturbations=2",
    "--worst_flatness={num_examples: 8, steps: 2, restarts: 1}",
    "--autoattack.num_examples=4",
    "--autoattack.version=custom",
    "--autoattack.attacks=[apgd-ce]",
]
FOLDER = Path("runs/ATAWP-Digits-s0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run with checkpoints as artifacts, which then went on for an epoch."""
    folder = tmp_path_factory.mktemp("wandb_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["cli.py"])
        # Where W&B keeps copies of artifacts until they are uploaded.
        patch.setenv("WANDB_DATA_DIR", str(folder / "data"))
        main(["fit", "--model", "ATAWP", *TINY, "--log_checkpoints"])
        wandb.finish()
        last = str(FOLDER / "checkpoints" / "last.ckpt")
        light = "--without=[final,autoattack]"
        main(["fit", "--model", "ATAWP", "--ckpt_path", last, "--trainer.max_epochs=3", light])
        wandb.finish()
        yield folder


@pytest.fixture(scope="module")
def runs(place: Path) -> list[OfflineRun]:
    return read_runs(place / FOLDER)


def logged(run: OfflineRun) -> set[str]:
    """Names in history and summary; media by the name they were logged under."""
    names = {name for step in run.history for name in step} | set(run.summary)
    return names | {name.removesuffix("/_type") for name in names}


def asked_for(spec: Any) -> dict[str, set[str]]:
    """The names that panels draw, by where W&B looks for them."""
    found: dict[str, set[str]] = {"any": set(), "history": set(), "summary": set()}

    def visit(item: Any) -> None:
        if isinstance(item, list):
            for part in item:
                visit(part)
        elif isinstance(item, dict):
            config = item.get("config") if "viewType" in item else None
            if config is not None:
                history = item["viewType"] == "Run History Line Plot"
                found["history" if history else "summary"].update(config.get("metrics", []))
                found["any"].update(config.get("mediaKeys", []))
                axes = [config[axis] for axis in ("xAxis", "yAxis") if axis in config]
                for axis in axes:
                    where, _, name = axis.rpartition(":")
                    found[where or "history"].add(name)
            if item.get("name") == "tableKey":
                found["any"].add(item["value"])
            columns = item.get("columnOrder", [])
            found["summary"].update(
                c.removeprefix("summary:") for c in columns if c.startswith("summary:")
            )
            visit(list(item.values()))

    visit(spec)
    return found


@pytest.mark.parametrize("name", ["workspace", "report"])
def test_panels_draw_what_a_run_logs(runs: list[OfflineRun], tmp_path: Path, name: str) -> None:
    pytest.importorskip("wandb_workspaces", reason="needs the extra `dashboard`")
    from robust_flatness.reporting.dashboard import save_dashboard

    run = runs[0]
    spec = json.loads(save_dashboard("p", folder=tmp_path).files[name].read_text())["spec"]
    asked = asked_for(spec)
    # All kinds of panels were looked into.
    assert {"epoch", "test/robust_loss", "flatness/worst/test"} <= asked["history"]
    assert {"early_stopped/flatness/average/test", "test/autoattack_error"} <= asked["summary"]
    assert {"figures/trajectory", "trajectory_table"} <= asked["any"]
    history = {key for step in run.history for key in step}
    assert asked["history"] - history == set()
    assert asked["summary"] - set(run.summary) == set()
    assert asked["any"] - logged(run) == set()
    for figure in asked["history"] - {"epoch"}:
        assert run.metrics[figure].step_metric == "epoch"


def test_a_run_is_grouped_by_its_method_and_knows_its_seed(runs: list[OfflineRun]) -> None:
    assert runs[0].group == "ATAWP"
    assert runs[0].config["seed_everything"] == 0
    assert runs[0].config["log_checkpoints"] is True


def test_the_page_of_a_run_shows_the_table_of_the_terminal(
    place: Path, runs: list[OfflineRun]
) -> None:
    assert any("trajectory_table/nrows" in step for step in runs[0].history)
    (path,) = (place / FOLDER).glob(
        f"wandb/offline-run-*/files/{runs[0].summary['summary_table/path']}"
    )
    table = json.loads(path.read_text())
    assert table["columns"][:2] == ["figure", "final weights"]
    assert table["columns"][2].startswith("early-stopped (epoch ")
    rows = {row[0].strip(): row[1:] for row in table["data"]}
    assert rows["RLoss, test"][0] == f"{runs[0].summary['final/test/robust_loss']:.3f}"
    assert set(rows) > {"RErr PGD, test (n=8)", "RErr APGD-CE, test (n=4)"}


def test_checkpoints_are_artifacts_once_at_each_end_and_named_for_what_they_are(
    runs: list[OfflineRun],
) -> None:
    for run in runs:  # the second took the flag from the run's config.yaml
        models = [artifact for artifact in run.artifacts if artifact.type == "model"]
        assert {artifact.name for artifact in models} == {f"model-{run.run_id}"}
        files = [json.loads(artifact.metadata)["original_filename"] for artifact in models]
        assert files == ["best.ckpt", "last.ckpt"]
        assert [set(artifact.aliases) for artifact in models] == [
            {"latest", "best"},
            {"latest", "last"},
        ]
        for artifact in models:
            (entry,) = artifact.manifest.contents
            assert entry.path == "model.ckpt"
    assert runs[0].run_id == runs[1].run_id


def test_the_artifact_is_the_checkpoint(place: Path, runs: list[OfflineRun]) -> None:
    last = runs[1].artifacts[-1]
    (entry,) = last.manifest.contents
    kept = (place / FOLDER / "checkpoints" / "last.ckpt").read_bytes()
    assert Path(entry.local_path).read_bytes() == kept


def test_artifacts_are_off_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for flag in ([], ["--log_checkpoints"]):
        with pytest.raises(SystemExit):
            main(["fit", *flag, "--print_config"])
        found.append(yaml.safe_load(capsys.readouterr().out)["log_checkpoints"])
    assert found == [False, True]
