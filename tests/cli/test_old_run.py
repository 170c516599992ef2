"""A run folder that an earlier version wrote still reports, tests and resumes.

`tests/fixtures/run_ba960bd` was written by commit ba960bd at the root of a file system, without
oneDNN, whose kernels for channels_last are not safe at this width, and without figures:

    fit --config table1/at_awp.yaml --trainer.max_epochs 2 --data.num_train 300
        --data.batch_size 16 --data.eps 0.05 --model.eps 0.05 --model.steps 2
        --model.network.width 4, and the measures of 8 and 16 examples that config.yaml lists
    test --model ATAWP --ckpt_path runs/at_awp-Digits-s0/checkpoints/last.ckpt

Nothing was edited since.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from robust_flatness.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_ba960bd"
FOLDER = Path("runs/at_awp-Digits-s0")
LAST = f"--ckpt_path={FOLDER}/checkpoints/last.ckpt"
QUIET = ["--without=[wandb]", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE, FOLDER)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_reports():
    main(["report", "runs"])
    (row,) = [row for row in rows(Path("report/table1.csv")) if row["method"] == "at_awp"]
    final = json.loads((FIXTURE / "results.json").read_text())["final"]
    columns = {
        "test_robust_error_mean": "test/autoattack_error",
        "train_robust_error_mean": "train_eval/robust_error",
        "average_flatness_mean": "flatness/average/test",
        "clean_error_mean": "test/error",
    }
    for column, name in columns.items():
        assert float(row[column]) == pytest.approx(final[name]), column


def test_it_is_measured_as_it_was_then():
    (FOLDER / "results_test.json").unlink()
    main(["test", "--model=ATAWP", LAST, *QUIET])
    old, new = (json.loads((f / "results_test.json").read_text()) for f in (FIXTURE, FOLDER))
    assert old["final"]["test/robust_loss"] == pytest.approx(0.7595, abs=1e-3)
    for part in ("final", "early_stopped"):
        for name, value in old[part].items():
            assert new[part][name] == pytest.approx(value, rel=1e-4), (part, name)
    assert new["num_examples"].items() >= old["num_examples"].items()
    assert new["split_indices"] == old["split_indices"]


def test_it_goes_on_with_its_weights_and_history():
    main(["fit", "--model=ATAWP", LAST, "--trainer.max_epochs=3", *QUIET])
    before, after = rows(FIXTURE / "metrics.csv"), rows(FOLDER / "metrics.csv")
    assert [row["epoch"] for row in after] == ["0", "1", "2"]
    for old, new in zip(before, after):
        assert {name: new[name] for name in old} == old
    # The third epoch starts from what two have learned.
    assert float(after[2]["train/loss"]) < float(before[1]["train/loss"])
    results = json.loads((FOLDER / "results.json").read_text())
    assert (results["epochs"], results["method"]) == (3, "at_awp")
    files = [path / "checkpoints" / "last.ckpt" for path in (FIXTURE, FOLDER)]
    old, new = (torch.load(file, weights_only=False) for file in files)
    assert new["state_dict"].keys() == old["state_dict"].keys()
    assert new["epoch"] == old["epoch"] + 1
    assert new["global_step"] > old["global_step"]
