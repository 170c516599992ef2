import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.utilities import rank_zero_only
from wandb_reader import read_runs

from robust_flatness.loggers import log_summary, log_trajectory, make_wandb_logger
from robust_flatness.reporting import trajectory_figure
from robust_flatness.run_folder.summary import summary_table

ROWS = [
    {"epoch": 0, "test/robust_loss": 1.7, "flatness/average/test": 0.2},
    {"epoch": 1, "test/robust_loss": 1.6},
    {"epoch": 1, "test/robust_loss": 1.6, "flatness/average/test": math.nan},
    {"epoch": 2, "test/robust_loss": 2.4, "flatness/average/test": 0.7},
]


@pytest.fixture(autouse=True)
def _finish() -> Any:
    yield
    wandb.finish()


def test_an_offline_run_holds_figures_axes_config_and_trajectory(tmp_path: Path) -> None:
    settings = {"eps": 8 / 255, "model": {"class_path": "AT"}}
    tags = ["at", "digits"]
    logger = make_wandb_logger(
        tmp_path, project="p", name="n", group="at", tags=tags, config=settings
    )
    for row in ROWS:
        logger.log_metrics(row, step=10 * int(row["epoch"]))
    logger.log_metrics({"train/loss_step": 1.0, "lr-SGD": 0.1, "early_stopped/x": 0.3}, step=21)
    image = tmp_path / "trajectory.png"
    figure = trajectory_figure(ROWS)
    assert figure is not None
    figure.savefig(image)
    log_trajectory(logger, ROWS, {"trajectory": image})
    wandb.finish()

    (run,) = read_runs(tmp_path)
    assert (run.project, run.group, run.tags) == ("p", "at", tags)
    assert run.config["eps"] == 8 / 255
    assert run.config["model"] == {"class_path": "AT"}
    assert [step.get("test/robust_loss") for step in run.history] == [
        *(1.7, 1.6, 1.6, 2.4),
        *(None, None),
    ]
    assert run.summary["test/robust_loss"] == {"min": 1.6, "last": 2.4}
    assert run.summary["early_stopped/x"] == 0.3
    for name in ("test/robust_loss", "flatness/average/test", "early_stopped/x"):
        assert run.metrics[name].step_metric == "epoch"
    # What belongs to a batch keeps Lightning's axis.
    assert run.metrics["*"].step_metric == "trainer/global_step"
    assert not {"train/loss_step", "lr-SGD"} & run.metrics.keys()

    last = run.history[-1]
    assert last["figures/trajectory/_type"] == "image-file"
    assert last["trajectory_table/nrows"] == 2
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")
    assert '"columns":["epoch","flatness","robust_loss"]' in table.read_text().replace(" ", "")
    assert '"data":[[0,0.2,1.7],[2,0.7,2.4]]' in table.read_text().replace(" ", "")
    chart = run.config["_wandb/visualize/trajectory"]["panel_config"]
    assert chart["fieldSettings"] == {"x": "flatness", "y": "robust_loss"}


def test_every_name_gets_its_axis_and_not_only_some(tmp_path: Path) -> None:
    """Lightning defines `*` as well; patterns of ours would win over it by chance only."""
    names = [f"{group}/{i}" for group in ("val", "hessian", "awp", "train_eval") for i in range(5)]
    logger = make_wandb_logger(tmp_path, project="p", name="n")
    logger.log_metrics(dict.fromkeys(names, 1.0) | {"epoch": 0}, step=3)
    wandb.finish()
    (run,) = read_runs(tmp_path)
    assert [run.metrics[name].step_metric for name in names] == ["epoch"] * 20
    assert [run.summary[name] for name in names] == [{"min": 1, "last": 1}] * 20


def test_a_resumed_run_has_the_same_id(tmp_path: Path) -> None:
    for part in range(2):
        logger = make_wandb_logger(tmp_path, project="p", name="n")
        logger.log_metrics({"val/error": 0.5, "epoch": part})
        wandb.finish()
    first, second = read_runs(tmp_path)
    assert first.run_id == second.run_id == (tmp_path / "wandb" / "run_id").read_text().strip()
    assert make_wandb_logger(tmp_path / "other", project="p", name="n").version != first.run_id


@pytest.mark.parametrize("key", ["none", "unchecked"])
def test_no_usable_key_means_offline_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    def login(prompt: bool = True, verify: bool = False) -> bool:
        assert not prompt
        if key == "none":
            return False
        raise wandb.errors.AuthenticationError("no network")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", login)
    logger = make_wandb_logger(tmp_path, project="p", name="n")
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in capsys.readouterr().out
    logger.log_metrics({"val/error": 0.5, "epoch": 0})
    wandb.finish()
    assert len(read_runs(tmp_path)) == 1


def test_a_key_that_was_checked_means_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: True)
    assert "mode" not in make_wandb_logger(tmp_path, project="p", name="n")._wandb_init


def test_other_ranks_touch_neither_network_nor_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(**_: Any) -> bool:
        raise AssertionError("Only rank 0 may log in.")

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = make_wandb_logger(tmp_path / "run", project="p", name="n")
    logger.log_metrics({"val/error": 0.5, "epoch": 0})
    logger.experiment.log({"a": 1})
    assert list(tmp_path.iterdir()) == []
    assert wandb.run is None


def test_a_held_run_opens_when_it_is_released_and_misses_nothing(tmp_path: Path) -> None:
    logger = make_wandb_logger(tmp_path / "run", project="p", name="n")
    logger.hold()
    logger.log_hyperparams({"eps": 0.1})
    values = {"lr-SGD": 0.5, "epoch": 0}
    logger.log_metrics(values, step=0)
    values["lr-SGD"] = 7.0
    assert logger.__getstate__()["_experiment"] is None
    assert list(tmp_path.iterdir()) == []
    assert wandb.run is None
    logger.release()
    logger.log_metrics({"val/error": 0.5, "epoch": 0}, step=1)
    wandb.finish()
    (run,) = read_runs(tmp_path / "run")
    assert run.config["eps"] == 0.1
    assert run.history[0]["lr-SGD"] == 0.5
    assert run.history[1]["val/error"] == 0.5
    assert (tmp_path / "run" / "wandb" / "run_id").read_text().strip() == run.run_id


def test_a_held_run_opens_for_a_user_who_asks_for_it(tmp_path: Path) -> None:
    logger = make_wandb_logger(tmp_path, project="p", name="n")
    logger.hold()
    logger.log_metrics({"a": 1.0}, step=0)
    logger.experiment.config.update({"mine": 3})
    wandb.finish()
    (run,) = read_runs(tmp_path)
    assert run.config["mine"] == 3
    assert [step["a"] for step in run.history] == [1.0]


def test_a_run_that_wandb_does_not_open_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(wandb, "init", refuse)
    logger = make_wandb_logger(tmp_path / "run", project="p", name="n")
    with pytest.raises(ValueError, match="to open a run but got: permission denied"):
        logger.log_metrics({"a": 1.0}, step=0)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_logged_where_asked_and_only_when_training_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    found = []
    for name, log_model, states in (
        ("off", False, ["success"]),
        ("failed", True, ["failed"]),
        ("twice", True, ["success", "success"]),
    ):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        for number, stem in enumerate(("last", "best")):
            path = folder / "checkpoints" / f"{stem}.ckpt"
            path.write_text(stem)
            os.utime(path, (number, number))
        logger = make_wandb_logger(folder, project="p", name="n", log_model=log_model)
        logger.log_metrics({"val/error": 0.5, "epoch": 0})
        for state in states:
            logger.finalize(state)
        wandb.finish()
        (run,) = read_runs(folder)
        found.append([list(artifact.aliases) for artifact in run.artifacts])
    # The newest file comes last.
    assert [[sorted(aliases) for aliases in run] for run in found] == [
        [],
        [],
        [["last", "latest"], ["best", "latest"]],
    ]


def test_the_summary_table_is_that_of_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    figures = {"test/robust_loss": 1.25, "flatness/worst/test": 0.5}
    table = summary_table({"final": figures, "early_stopped_epoch": 3})
    logger = make_wandb_logger(tmp_path, project="p", name="n")
    log_summary(logger, table, epoch=7)
    wandb.finish()
    (run,) = read_runs(tmp_path)
    assert run.history[-1]["epoch"] == 7
    (path,) = tmp_path.glob(f"wandb/offline-run-*/files/{run.summary['summary_table/path']}")
    content = json.loads(path.read_text())
    assert content["columns"] == ["figure", "final weights", "early-stopped (epoch 3)"]
    assert ["RLoss, test", "1.250", "–"] in content["data"]
    assert ["worst-case flatness, test", "0.500", "–"] in content["data"]
