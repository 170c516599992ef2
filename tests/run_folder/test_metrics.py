"""The registry of metric names."""

import subprocess
import sys

import pytest

from robust_flatness.run_folder.metrics import METRICS, SPLITS, metric


@pytest.mark.parametrize(
    ("name", "title", "unit", "lower"),
    [
        ("test/robust_loss", "RLoss, test", "nats", True),
        ("train_eval/robust_error", "RErr (PGD), train", "%", True),
        ("train/robust_loss", "RLoss, training batches", "nats", True),
        ("train/autoattack_error", "RErr (AutoAttack), train", "%", True),
        ("val/error", "clean error, early-stopping images", "%", True),
        (
            "flatness/clean_worst/train",
            "worst-case flatness of the clean loss, train",
            "nats",
            True,
        ),
        ("hessian/max_eigenvalue", "largest Hessian eigenvalue, test", "", True),
        (
            "hessian/val/min_eigenvalue",
            "smallest Hessian eigenvalue, early-stopping images",
            "",
            None,
        ),
        ("train/learning_rate", "learning rate, training batches", "", None),
        ("gap/robust_loss", "RLoss, test − train", "nats", True),
        (
            "flatness/average/test_sem",
            "standard error of average-case flatness, test",
            "nats",
            None,
        ),
        ("mine/width/test", "mine/width, test", "", None),
        ("mine/odd_error", "mine/odd_error", "%", True),
        ("mine", "mine", "", None),
    ],
)
def test_names_with_and_without_an_entry(name, title, unit, lower):
    found = metric(name)
    assert (found.name, found.title, found.unit, found.lower_is_better) == (
        name,
        title,
        unit,
        lower,
    )
    assert found.axis_label == title + (", in %" if unit == "%" else "")


@pytest.mark.parametrize("name", ["test/robust_loss", "flatness/average/train", "mine/width/val"])
def test_prefixes_name_the_weights(name):
    plain, final, stopped = (
        metric(f"{prefix}{name}") for prefix in ("", "final/", "early_stopped/")
    )
    assert plain.name == final.name == stopped.name == name
    assert plain.title == final.title
    assert stopped.title == f"{plain.title}, early-stopped"
    assert [found.weights for found in (plain, final, stopped)] == [
        "final",
        "final",
        "early_stopped",
    ]
    assert [found.once for found in (plain, final, stopped)] == [False, True, True]
    assert [found.summary for found in (plain, final)] == ["min,last", None]


def test_a_suffix_names_the_weights_too():
    found = metric("test/autoattack_error_early_stopped")
    assert found.title == "RErr (AutoAttack), test, early-stopped"
    assert (found.name, found.split, found.weights) == (
        "test/autoattack_error_early_stopped",
        "test",
        "early_stopped",
    )


def test_texts_have_the_unit_of_shares():
    assert metric("test/error").text(0.5251) == "52.5 %"
    assert metric("test/robust_loss").text(1.23456) == "1.235"
    assert metric("test/robust_loss").text(1.23456, decimals=2) == "1.23"


def test_entries_have_names_without_split_and_are_resolved_by_them():
    for entry in METRICS:
        assert not set(entry.name.split("/")) & set(SPLITS)
        assert metric(f"{entry.name}/val").label == entry.label
    assert len({entry.name for entry in METRICS}) == len(METRICS)


def test_what_a_report_needs_loads_neither_torch_nor_lightning():
    modules = ("metrics", "runs", "files", "summary", "environment")
    imports = ", ".join(f"robust_flatness.run_folder.{name}" for name in modules)
    code = f"import sys, {imports}; print(bool({{'torch', 'lightning'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
