import pytest
from run_factory import make_run

from robust_flatness.reporting.frame import group_runs
from robust_flatness.reporting.published import published_models
from robust_flatness.reporting.sweeps import find_sweeps


def run(method="trades", *, seed=0, data=None, images=64, **model):
    return make_run(
        method,
        seed,
        settings={
            "model": {"class_path": "pkg.M", "init_args": model},
            "data": data or {},
            "autoattack": {"num_examples": images},
        },
        folder=f"{method}-{seed}-{data}-{images}-{model}",
    )


def settings(*runs):
    return [list(sweep.values()) for sweep in find_sweeps(group_runs(runs))]


def test_one_number_is_a_sweep_in_the_order_of_its_values():
    runs = [run(lam=lam) for lam in (10.0, 9, 1)]
    assert settings(*runs, run("at", lam=1)) == [["lam=1", "lam=9", "lam=10"]]


@pytest.mark.parametrize(
    "other",
    [
        {"lam": 2, "steps": 7},
        {"lam": 2, "images": 128},
        {"lam": None},
        {"lam": "two"},
        {"lam": True},
        {"lam": 1, "images": 128, "seed": 1},
    ],
)
def test_what_differs_in_more_or_in_no_number_of_training_is_no_sweep(other):
    assert settings(run(lam=1), run(**other)) == []


def test_a_number_that_stands_in_several_places_is_one():
    assert settings(*(run(eps=eps, data={"eps": eps}) for eps in (0.1, 0.2))) == [
        ["eps=0.1", "eps=0.2"]
    ]
    assert settings(*(run(eps=eps, data={"eps": 2 * eps}) for eps in (0.1, 0.2))) == []


def test_a_model_of_a_grid_counts_to_the_largest_sweep():
    grid = [run(lam=lam, steps=steps) for lam in (1, 2, 3) for steps in (7, 10)]
    assert settings(*grid) == [["lam=1", "lam=2", "lam=3"]] * 2
    others = [run(lam=2, steps=steps) for steps in (50, 99)]
    assert settings(*grid[:3], *others) == [
        ["steps=7", "steps=50", "steps=99"],
        ["steps=7", "steps=10"],
    ]


def test_published_models_of_a_method_are_one():
    sweeps = find_sweeps(published_models())
    (trades,) = [sweep for sweep in sweeps if "TRADES λ=9" in sweep]
    assert len(trades) == 4
    assert not any("MiSH" in label for sweep in sweeps for label in sweep)
