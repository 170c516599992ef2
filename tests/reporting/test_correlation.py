import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robust_flatness.reporting.correlation import correlate, correlation_table
from robust_flatness.reporting.frame import Models, metric_values
from robust_flatness.reporting.published import published_models


def point(method, x, y, early_stopped=()):
    final = {name: value for name, value in (("x", x), ("y", y)) if value is not None}
    return method, final, dict(early_stopped)


def models(points) -> Models:
    index = pd.Index([str(i) for i in range(len(points))], name="label")
    frame = pd.DataFrame({"method": [method for method, *_ in points]}, index=index)
    rows = [(label, final, stopped, {}) for label, (_, final, stopped) in zip(index, points)]
    return Models(frame, metric_values(rows))


def sweeps(num_methods=6, models_each=4, seed=0):
    """Points that lie close to their method's own place, far from other methods."""
    generator = np.random.default_rng(seed)
    points = []
    for method in range(num_methods):
        place = generator.normal(size=2)
        for x, y in place + 0.01 * generator.normal(size=(models_each, 2)):
            points.append(point(f"m{method}", x, y))
    return points


def width(interval):
    return interval[1] - interval[0]


def test_coefficients_are_scipys():
    points = sweeps()
    xs, ys = ([final[name] for _, final, _ in points] for name in "xy")
    found = correlate(models(points), "x", "y")
    assert found.pearson == pytest.approx(stats.pearsonr(xs, ys).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(xs, ys).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(xs, ys).statistic)
    assert (found.num_models, found.num_methods) == (24, 6)


def test_models_without_a_figure_do_not_count():
    points = [point("a", 1, 1), point("b", 2, 3), point("c", 3, 2), point("d", 4, 5)]
    without = [point("e", None, 1), point("f", 1, None), point("g", math.nan, 1)]
    found = correlate(models([*without, *points]), "x", "y")
    assert found == correlate(models(points), "x", "y")
    assert found.num_methods == 4


def test_early_stopped_figures_are_other_ones():
    rows = [(1, 3), (2, 2), (3, 1)]
    points = [point(f"m{x}", x, x, {"x": x, "y": y}) for x, y in rows]
    assert correlate(models(points), "x", "y").pearson == pytest.approx(1)
    assert correlate(models(points), "x", "y", weights="early_stopped").pearson == pytest.approx(-1)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [point("a", 1, 1), point("b", 2, 2)],
        [point("a", 1, 1), point("b", 1, 2), point("c", 1, 3)],
        [point("a", 1, 0.1), point("b", 2, 0.1), point("c", 3, 0.1)],
    ],
    ids=["none", "two", "constant x", "constant y"],
)
def test_too_few_models_and_constant_figures_have_no_correlation(points):
    assert correlate(models(points), "x", "y") is None


def test_two_methods_have_coefficients_but_no_interval():
    points = [point("a", 1, 2), point("a", 2, 1), point("b", 3, 3), point("b", 4, 5)]
    found = correlate(models(points), "x", "y")
    assert found.pearson == pytest.approx(0.83, abs=0.01)
    assert found.pearson_interval is None
    assert found.spearman_interval is None


def test_fewer_than_eight_models_have_no_interval():
    points = [point(f"m{index}", index, index % 3) for index in range(8)]
    few, enough = correlate(models(points[1:]), "x", "y"), correlate(models(points), "x", "y")
    assert few.pearson_interval is few.spearman_interval is None
    assert few.over == "7 models: too few for an interval"
    assert None not in (enough.pearson_interval, enough.spearman_interval)
    assert enough.over == "8 models"


def test_interval_is_that_of_all_resamples_of_whole_methods():
    points = [
        *(point("a", x, y) for x, y in [(0.1, 0.5), (0.2, 0.4), (0.2, 0.9)]),
        *(point("b", x, y) for x, y in [(1.0, 1.4), (1.4, 0.7)]),
        *(point("c", x, y) for x, y in [(2.0, 1.1), (1.4, 2.2), (2.2, 2.3)]),
    ]
    by_method = [
        [(final["x"], final["y"]) for method, final, _ in points if method == name]
        for name in "abc"
    ]
    exact = {"pearson": [], "spearman": []}
    for drawn in itertools.product(by_method, repeat=3):
        xs, ys = zip(*itertools.chain(*drawn))
        exact["pearson"].append(stats.pearsonr(xs, ys).statistic)
        exact["spearman"].append(stats.spearmanr(xs, ys).statistic)
    found = correlate(models(points), "x", "y", resamples=20000)
    # Percentiles of 27 equally likely values lie on one of them, apart from draws at the margin.
    for name, interval in (
        ("pearson", found.pearson_interval),
        ("spearman", found.spearman_interval),
    ):
        expected = np.quantile(exact[name], (0.025, 0.975), method="inverted_cdf")
        assert interval == pytest.approx(expected, abs=1e-9), name


def test_copies_of_all_models_do_not_narrow_the_interval():
    points = sweeps()
    once, twice = (
        correlate(models(points), "x", "y"),
        correlate(models([*points, *points]), "x", "y"),
    )
    assert twice.num_models == 2 * once.num_models
    assert twice.pearson_interval == pytest.approx(once.pearson_interval)
    assert twice.spearman_interval == pytest.approx(once.spearman_interval)


def test_copies_of_models_within_their_methods_do_not_narrow_the_interval():
    points = [point(f"m{i}", x, x + (-1) ** i) for i, x in enumerate(range(8))]
    once = correlate(models(points), "x", "y")
    # The two that a line through all points owes most to.
    copied = correlate(models([*points, *[points[0], points[-1]] * 20]), "x", "y")
    assert (copied.num_models, copied.num_methods) == (48, 8)
    assert copied.pearson > once.pearson
    assert width(copied.pearson_interval) >= width(once.pearson_interval)


def test_models_of_one_method_are_no_independent_models():
    clustered = sweeps(num_methods=8, models_each=10)
    alone = [(f"{method}-{i}", *metrics) for i, (method, *metrics) in enumerate(clustered)]
    of_methods = correlate(models(clustered), "x", "y").pearson_interval
    of_models = correlate(models(alone), "x", "y").pearson_interval
    assert width(of_methods) > 1.5 * width(of_models)


def test_resamples_in_which_a_figure_is_constant_are_left_out():
    # 0.1 in sums of threes is not 0.3: a variance of nearly zero must not pass for one.
    rows = [("a", 0.1, 0.3), ("b", 0.1, 0.7), ("c", 0.1, 0.2), ("d", 0.9, 0.9)]
    found = correlate(models([point(*row) for row in rows * 2]), "x", "y")
    for interval in (found.pearson_interval, found.spearman_interval):
        # In any resample that holds `d`, it is the largest in both.
        assert 0 < interval[0] <= interval[1] <= 1


def test_order_of_models_and_repetition_change_nothing_and_the_seed_little():
    points = sweeps()
    found = correlate(models(points), "x", "y")
    assert correlate(models(points), "x", "y") == found
    turned = correlate(models(points[::-1]), "x", "y")
    assert turned.pearson_interval == pytest.approx(found.pearson_interval)
    other = correlate(models(points), "x", "y", seed=1)
    assert other.pearson_interval != found.pearson_interval
    assert other.pearson_interval == pytest.approx(found.pearson_interval, abs=0.1)


def old_intervals(points, resamples):
    """The bootstrap of versions before 0.2: multinomial numbers of whole methods."""
    names, method_of = np.unique(points["method"].to_numpy(dtype=str), return_inverse=True)
    x, y = (points[axis].to_numpy() for axis in "xy")
    share = np.full(len(names), 1 / len(names))
    counts = np.random.default_rng(1).multinomial(len(names), share, size=resamples)[:, method_of]
    pearson, spearman = [], []
    for times in counts:
        drawn = np.repeat(np.arange(len(x)), times)
        pearson.append(np.corrcoef(x[drawn], y[drawn])[0, 1])
        ranks = stats.rankdata(x[drawn]), stats.rankdata(y[drawn])
        spearman.append(np.corrcoef(*ranks)[0, 1])
    return [np.percentile(values, (2.5, 97.5)) for values in (pearson, spearman)]


@pytest.mark.parametrize("x", ["flatness/average/test", "flatness/worst/test"])
def test_intervals_of_the_published_models_are_those_of_earlier_versions(x):
    published = published_models()
    result = correlate(published, x, "test/robust_loss")
    old = old_intervals(published.points(x, "test/robust_loss"), resamples=4000)
    # A 2.5 % percentile over 2000 resamples has a standard error of about 0.01 here.
    assert result.pearson_interval == pytest.approx(old[0], abs=0.03)
    assert result.spearman_interval == pytest.approx(old[1], abs=0.03)
    assert result.pearson_interval[0] < result.pearson < result.pearson_interval[1]


def test_resamples_below_one_are_refused():
    with pytest.raises(ValueError, match="`resamples` to be >= 1 but got 0"):
        correlate(models(sweeps()), "x", "y", resamples=0)


def test_partial_correlations_are_those_of_residuals():
    generator = np.random.default_rng(1)
    x, y, z = generator.normal(size=(3, 12)) + generator.normal(size=12)
    rows = [(f"m{i % 4}", {"x": x[i], "y": y[i], "z": z[i]}, {}) for i in range(12)]
    partial = correlate(models(rows), "x", "y", given="z")

    def residuals(values, third):
        return values - np.polyval(np.polyfit(third, values, 1), third)

    for name, rank in (("pearson", np.asarray), ("spearman", stats.rankdata)):
        a, b, c = map(rank, (x, y, z))
        expected = stats.pearsonr(residuals(a, c), residuals(b, c)).statistic
        assert getattr(partial, name) == pytest.approx(expected)
    assert correlate(models(rows[:3]), "x", "y", given="z") is None


def test_what_the_third_metric_determines_has_no_partial_correlation():
    # Ranks of x and z are the same: what is left of x is rounding.
    generator = np.random.default_rng(0)
    for size in range(4, 30):
        z, y = generator.normal(size=(2, size))
        third = {"x": np.exp(z), "y": y, "z": z}
        rows = [
            (f"m{i}", {name: float(v[i]) for name, v in third.items()}, {}) for i in range(size)
        ]
        assert correlate(models(rows), "x", "y", given="z", resamples=1) is None, size


def test_resamples_in_which_the_third_metric_determines_another_are_left_out():
    # The ranks of x and z differ by `c` alone: resamples without it would be rounding, near 0.
    rows = [("a", 1, 1, 1), ("b", 2, 2, 2), ("c", 9, 9, 0), ("d", 4, 4, 4), ("e", 5, 5, 5)]
    rows = [(method, {"x": x, "y": y, "z": z}, {}) for method, x, y, z in rows * 2]
    found = correlate(models(rows), "x", "y", given="z")
    assert found.spearman_interval == pytest.approx((1, 1))


def test_the_table_has_each_measure_with_each_target_and_never_pools_weights():
    def row(i, shift):
        loss = {"test/robust_loss": float(i), "train_eval/robust_error": (i * 7 % 5) / 5}
        # RErr under another attack is what measures are to go with.
        loss["attack/square_error/test"] = float(i)
        return loss | {"my/measure/test": float(-shift * i), "my/measure/test_sem": 0.1}

    given = models([(f"m{i}", row(i, 1), row(i, -1)) for i in range(8)])
    table = correlation_table({"runs": given}).set_index(["weights", "given"])
    assert set(table["x"]) == {"my/measure/test"}
    assert set(table["y"]) == {"test/robust_loss"}
    assert table.loc[("final", ""), "kendall"] == pytest.approx(-1)
    assert table.loc[("early_stopped", ""), "kendall"] == pytest.approx(1)
    assert table.loc[("final", "train_eval/robust_error"), "models"] == 8
