import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from robust_flatness.reporting import (
    error_interval,
    hardware,
    jsonable,
    summary_table,
    versions,
    write_json,
)
from robust_flatness.run_folder import metrics
from robust_flatness.run_folder.metrics import Metric

RESULTS = {
    "method": "ATAWP",
    "data": "CIFAR10",
    "early_stopped_epoch": 103,
    "final": {
        "test/robust_error": 1.0,
        "test/autoattack_error": 0.628,
        "test/autoattack_error_early_stopped": 0.5,
        "train/robust_error": 0.09,
        "train_eval/robust_error": 0.05,
        "test/robust_loss": 3.9,
        "test/robust_loss_correct": None,
        "test/robust_loss_incorrect": 10.25,
        "test/error": math.nan,
        "flatness/average/test": 1.2,
        "flatness/average/test_sem": 0.06,
    },
    "early_stopped": {"test/robust_error": 0.524, "train/robust_error": 0.31},
    "num_examples": {"test/robust_error": 1000, "test/autoattack_error": 500},
}


def lines(results: dict, folder: str | None = None) -> dict[str, list[str]]:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(results, folder=folder))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines()]
    return {"text": text} | {row[0]: row[1:] for row in cells if row}


def test_table_shows_intervals_standard_errors_and_dashes() -> None:
    table = lines(RESULTS, folder="runs/at-awp-cifar10-s0")
    low, high = (f"{100 * end:.1f}" for end in error_interval(524, 1000))
    assert table["RErr PGD, test (n=1000)"] == ["100.0 % [99.6, 100.0]", f"52.4 % [{low}, {high}]"]
    assert table["RErr AutoAttack, test (n=500)"][1].startswith("50.0 % [45.6")
    assert table["RErr PGD, train"] == ["5.0 %", "31.0 %"]
    assert table["RLoss, test"] == ["3.900", "–"]
    assert table["correct when clean, test"] == ["not finite", "–"]
    assert table["incorrect when clean, test"] == ["10.250", "–"]
    assert table["clean error, test"] == ["not finite", "–"]
    assert table["average-case flatness, test"] == ["1.200 ± 0.060", "–"]
    for part in ("ATAWP on CIFAR10", "(epoch 103)", "runs/at-awp-cifar10-s0"):
        assert part in table["text"]


def test_a_metric_that_is_registered_for_tables_is_a_row(monkeypatch) -> None:
    entry = Metric("margin_for_fit/mean", "mean margin", in_tables=True)
    monkeypatch.setitem(metrics._BY_NAME, entry.name, entry)
    deviation = {"margin_for_fit/mean/test_sem": 0.03}
    table = lines({"final": {"margin_for_fit/mean/test": 0.25, "other/test": 1.0, **deviation}})
    assert table["mean margin, test"] == ["0.250 ± 0.030"]
    assert not any("standard error" in row for row in table)
    assert not any("other" in row for row in table)
    assert "mean margin, test" not in lines({})


def test_table_of_nothing_is_dashes() -> None:
    table = lines({})
    assert table["RErr PGD, test"] == ["–"]


def test_table_of_a_diverged_run_says_so_and_has_no_early_stopped_column() -> None:
    figures = {"test/robust_error": 1.0, "test/robust_loss": None, "flatness/average/test": None}
    table = lines({"method": "AT", "data": "Digits", "final": figures, "diverged_epoch": 3})
    assert "AT on Digits: diverged, not finite from epoch 3" in " ".join(table["text"].split())
    assert table["RErr PGD, test"] == ["100.0 %"]
    assert table["RLoss, test"] == table["average-case flatness, test"] == ["not finite"]
    assert "early-stopped" not in table["text"]


def test_interval_is_that_of_wilson() -> None:
    z, n, p = 1.959964, 500, 0.628
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert error_interval(314, 500) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert error_interval(0, 10)[0] == 0
    assert error_interval(314, 500, level=0.5)[0] > centre - half


@pytest.mark.parametrize("arguments", [(1, 0), (-1, 5), (6, 5), (1, 5, 1.0)])
def test_interval_refuses_impossible_counts(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="Expected `"):
        error_interval(*arguments)


def test_json_is_strict_and_keeps_lists_on_one_line(tmp_path: Path) -> None:
    content = {
        "nan": [math.nan, 1.5, -math.inf],
        "numpy": np.float64(0.25),
        "array": np.arange(3),
        "tensor": torch.tensor([[1, 2]]),
        7: Path("a"),
        "text": "a [ 1, 2 ]",
        "flag": True,
    }
    assert jsonable(content)["flag"] is True
    write_json(tmp_path / "deep" / "r.json", content)
    text = (tmp_path / "deep" / "r.json").read_text()
    assert "[0, 1, 2]" in text
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "nan": [None, 1.5, None],
        "numpy": 0.25,
        "array": [0, 1, 2],
        "tensor": [[1, 2]],
        "7": "a",
        "text": "a [ 1, 2 ]",
        "flag": True,
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_environment_names_versions_and_machine() -> None:
    assert versions(["torch"])["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions(["no-such-package"])["no-such-package"] is None
    machine = hardware(num_processes=2)
    assert machine["num_processes"] == 2
    assert machine["cpu"]
    assert len(machine["gpus"]) == torch.cuda.device_count()
