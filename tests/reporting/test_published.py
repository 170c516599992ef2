import csv
from dataclasses import replace
from pathlib import Path

import pytest

from robust_flatness.reporting import published
from robust_flatness.reporting.correlation import correlate
from robust_flatness.reporting.frame import Models
from robust_flatness.reporting.published import published_models, published_trajectories
from robust_flatness.run_folder.metrics import METHOD_LABELS

FLATNESS, RLOSS = "flatness/average/test", "test/robust_loss"
RERR, TRAIN_RLOSS = "test/autoattack_error", "train_eval/robust_loss"
CONFIGS = Path(published.__file__).parents[1] / "configs"

# The rows of `models` that Table 1 shows, where a method has several.
SHOWN = {
    "at_awp": "AT-AWP ξ=0.01",
    "cyclic": "Cyclic ×2",
    "entropy_sgd": "Entropy-SGD (L=1)",
    "label_noise": "Label noise τ=0.3",
    "label_smoothing": "Label smoothing τ=0.3",
    "mart": "MART λ=6",
    "self_supervision": "Self-supervision λ=4",
    "trades": "TRADES λ=6",
    "weight_averaging": "Weight averaging (τ=0.9975)",
    "weight_clipping": "Weight clipping w_max=0.005",
    "weight_decay": "Weight decay 0.05",
}


def metrics(models: Models, label: str, weights: str = "final") -> dict[str, float]:
    """All that a row states, without the gaps that are computed from it."""
    values = models.values
    rows = values[(values["label"] == label) & (values["weights"] == weights)]
    stated = dict(zip(rows["metric"], rows["mean"]))
    return {name: x for name, x in stated.items() if not name.startswith(("gap/", "last_minus"))}


def subset(models: Models, labels: list[str]) -> Models:
    return replace(models, frame=models.frame.loc[labels])


@pytest.mark.parametrize(
    ("table", "rows", "methods"), [("models", 74, 28), ("table1", 19, 19), ("robustbench", 8, 8)]
)
def test_each_row_is_there_with_its_source_and_statistic(table, rows, methods):
    models = published_models(table)
    assert len(models) == len(set(models.labels)) == rows
    assert len(models.methods) == methods
    assert models.frame["source"].str.startswith("Stutz et al., ICCV 2021, ").all()
    statistic = "mean over directions, ξ=0.5; worst: maximum over restarts, ξ"
    assert models.frame["statistic"].str.contains(statistic).all()


@pytest.mark.parametrize("table", ["models", "table1", "robustbench"])
def test_errors_are_shares_and_robust_errors_above_clean_ones(table):
    models = published_models(table)
    for label in models.labels:
        for weights in ("final", "early_stopped"):
            row = metrics(models, label, weights)
            errors = [value for name, value in row.items() if name.endswith("error")]
            assert all(0 <= error < 0.7 for error in errors)
            for split in ("test", "train_eval"):
                if f"{split}/error" in row:
                    assert row[f"{split}/error"] < row[f"{split}/robust_error"]
                    assert row[f"{split}/clean_loss"] < row[f"{split}/robust_loss"]


def test_no_metric_of_the_74_models_is_missing():
    models = published_models()
    for label in models.labels:
        assert len(metrics(models, label)) == 16
        assert len(metrics(models, label, "early_stopped")) == 4


def test_a_row_reads_as_the_paper_has_it():
    models, label = published_models(), "AT-AWP ξ=0.005"
    assert models.frame.at[label, "method"] == "at_awp"
    assert metrics(models, label) == {
        "test/error": 0.2005,
        "test/robust_error": 0.525,
        "test/autoattack_error": 0.55,
        "test/clean_loss": 0.59,
        "test/robust_loss": 1.57,
        "test/autoattack_loss": 0.74,
        "train_eval/error": 0.0734,
        "train_eval/robust_error": 0.281,
        "train/autoattack_error": 0.318,
        "train_eval/clean_loss": 0.29,
        "train_eval/robust_loss": 0.66,
        "train/autoattack_loss": 0.38,
        "flatness/average/test": 0.54,
        "flatness/worst/test": 4.46,
        "flatness/clean_average/test": 0.15,
        "flatness/clean_worst/test": 6.98,
    }
    assert metrics(models, label, "early_stopped") == {
        "test/robust_error": 0.508,
        "test/autoattack_error": 0.533,
        "test/robust_loss": 1.36,
        "test/autoattack_loss": 0.74,
    }


def test_only_the_flatness_of_zero_is_flagged():
    models = published_models()
    (label,) = models.frame.index[models.frame["note"] != ""]
    assert label == "Weight clipping 0.025"
    assert models.mean(label, FLATNESS) == 0


def test_what_the_paper_does_not_state_is_none():
    models = published_models("table1")
    assert models.mean("AT", RERR) == 0.628
    assert models.mean("AT", RLOSS) is None
    assert models.mean("AT", FLATNESS, "early_stopped") is None


def test_networks_of_others_have_early_stopped_metrics_alone():
    models = published_models("robustbench")
    assert models.column(RLOSS).empty
    assert len(models.column(RLOSS, "early_stopped")) == 8
    assert models.frame["statistic"].str.contains("ξ not stated").all()


def test_methods_are_named_as_presets_and_sweeps_are():
    rows, methods = published_models("table1").methods, published_models().methods
    assert len(rows) == 19
    assert set(rows) < set(methods) < set(METHOD_LABELS)
    assert {path.stem for path in (CONFIGS / "sweeps").glob("*.yaml")} < set(METHOD_LABELS)


@pytest.mark.parametrize("table", ["models", "table1"])
def test_labels_begin_with_the_name_of_their_method(table):
    rows = published_models("table1").methods
    for label, method in published_models(table).frame["method"].items():
        if method in rows and label != "No weight decay":
            assert label.startswith(METHOD_LABELS[method])


def test_table_1_agrees_with_the_table_of_all_models_up_to_rounding():
    models, table = published_models(), published_models("table1")
    for row, method in table.frame["method"].items():
        same = list(models.frame.index[models.frame["method"] == method])
        (label,) = [SHOWN[method]] if method in SHOWN else same
        for name, value in metrics(table, row, "early_stopped").items():
            assert value == models.mean(label, name, "early_stopped")
        for name, value in metrics(table, row).items():
            # Both tables round in another way, and the average flatness of these two differs.
            unlike = {"MiSH": 0.02, "SiLU": 0.03}.get(row, 0.01) if name == FLATNESS else 0.02
            rounding = 0 if name.endswith("error") else unlike
            assert abs(value - models.mean(label, name)) <= rounding + 1e-9, (row, name)


@pytest.mark.parametrize(
    ("x", "y", "pearson", "spearman"),
    [
        (FLATNESS, RLOSS, 0.85, 0.86),
        ("flatness/worst/test", RLOSS, 0.50, 0.65),
        ("flatness/clean_average/test", RLOSS, 0.28, 0.51),
        ("flatness/clean_worst/test", RLOSS, 0.55, 0.59),
        (FLATNESS, RERR, 0.65, 0.64),
        (RLOSS, RERR, 0.72, 0.78),
        (FLATNESS, "gap/robust_loss", 0.84, 0.86),
        (FLATNESS, "last_minus_best/robust_loss", 0.82, 0.85),
        (FLATNESS, TRAIN_RLOSS, -0.73, -0.80),
    ],
)
def test_the_papers_correlations_come_out_again(x, y, pearson, spearman):
    result = correlate(published_models(), x, y, resamples=1)
    assert result.num_models == 74
    assert round(result.pearson, 2) == pearson
    assert round(result.spearman, 2) == spearman


def test_error_follows_loss_below_the_loss_of_guessing_and_hardly_above():
    models = published_models()
    losses = models.column(RLOSS)["mean"]
    below, above = (
        correlate(subset(models, list(losses.index[side])), RLOSS, RERR, resamples=1)
        for side in (losses < 2.3, losses >= 2.3)
    )
    assert (round(below.pearson, 2), round(below.spearman, 2)) == (0.76, 0.77)
    assert (round(above.pearson, 2), round(above.spearman, 2)) == (0.29, 0.32)


def test_trajectories_go_from_the_first_snapshot_to_the_end():
    points = published_trajectories()
    assert list(points["method"].unique()) == ["at", "at_awp", "self_supervision", "unlabeled"]
    for _, rows in points.groupby("method"):
        progress = list(rows["progress"])
        assert len(rows) == 16
        assert progress == sorted(set(progress))
        assert (progress[0], progress[-1]) == (0.0333, 1.0)
    row = points[points["method"] == "self_supervision"].iloc[2]
    assert row.drop("method").to_dict() == {"progress": 0.1667, FLATNESS: 0.16, RLOSS: 1.77}
    assert points[points["method"] == "unlabeled"][RLOSS].isna().all()


def test_lines_are_of_at_alone_and_hold_all_that_is_drawn():
    lines = published_trajectories("lines")
    assert list(lines["method"]) == ["at"] * 16
    assert lines.iloc[-1].drop("method").to_dict() == {
        "progress": 1.0,
        TRAIN_RLOSS: 0.21,
        RLOSS: 3.92,
        FLATNESS: 1.48,
        "flatness/worst/test": 4.0,
        "hessian/max_eigenvalue": 2010.0,
        "flatness/clean_average/test": 0.22,
        "flatness/clean_worst/test": 1.65,
    }


def test_the_maximum_over_directions_is_above_their_mean():
    points = published_trajectories()
    means = published_trajectories("lines")[FLATNESS]
    maxima = points[points["method"] == "at"][FLATNESS]
    assert all(high >= mean for high, mean in zip(maxima, means))


def test_each_point_of_a_drawing_says_where_and_how_it_was_read():
    path = Path(published.__file__).with_name("published_data") / "trajectories.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    for row in rows:
        assert "figure" in row["source"]
        over = "maximum" if row["figure"] == "points" else "mean"
        assert row["statistic"].startswith(f"average: {over} over directions")
        assert "±0.03" in row["statistic"]


def test_unknown_tables_and_figures_are_named():
    with pytest.raises(ValueError, match="`table` to be `models`, .* but got 'table2'"):
        published_models("table2")
    with pytest.raises(ValueError, match="`figure` to be `points` or `lines` but got 'bars'"):
        published_trajectories("bars")
