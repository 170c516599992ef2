from dataclasses import replace
from pathlib import Path

import pytest
from run_factory import FINAL, make_run

from robust_flatness.reporting.frame import drop_duplicates, group_runs

WITHOUT_AUTOATTACK = {name: x for name, x in FINAL.items() if "autoattack" not in name}


def run(name, **options):
    return make_run(folder=f"runs/{name}", **options)


def kept(*runs):
    found, left_out = drop_duplicates(runs)
    assert len(found) + len(left_out) == len(runs)
    return [run.name for run in found]


def test_the_same_seed_again_is_no_replica():
    first = run("a", final={"test/error": 0.1})
    again = replace(first, folder=Path("copies/b"))
    unseeded = [run(name, seed=None) for name in "cd"]
    other = run("e", seed=1)
    found, left_out = drop_duplicates([first, *unseeded, again, other])
    assert found == [*unseeded, again, other]
    assert left_out == [(first.folder, "is the same training as copies/b, which comes later")]


def test_the_run_with_most_figures_stays_whatever_its_name():
    less = {**make_run().settings, "without": ["autoattack", "wandb"]}
    images = dict.fromkeys(WITHOUT_AUTOATTACK, 9000)
    few = run("at-s0-7", final=WITHOUT_AUTOATTACK, settings=less, num_examples=images)
    for runs in ([run("at-s0-6"), few], [few, run("at-s0-6")]):
        found, ((folder, reason),) = drop_duplicates(runs)
        assert [run.name for run in found] == ["at-s0-6"]
        assert folder == few.folder
        assert reason == "is the same training as runs/at-s0-6, which was measured better"


def test_stronger_attacks_count_more_than_more_metrics():
    more = {**WITHOUT_AUTOATTACK, "hessian/trace": 1.0, "margin/test": 0.1, "sharpness/test": 0.1}
    assert kept(run("at-s0-9", final=more), run("at-s0", final=FINAL)) == ["at-s0"]
    strong = {"settings": {"final": {"steps": 20, "restarts": 10}}, "final": WITHOUT_AUTOATTACK}
    weak = {"settings": {"final": {"steps": 10, "restarts": 1}}, "final": more}
    assert kept(run("at-s0-9", **weak), run("at-s0", **strong)) == ["at-s0"]


def test_of_equal_figures_most_images_count_then_the_newest():
    few = {"settings": {"final": {"num_examples": 8}}, "num_examples": dict.fromkeys(FINAL, 8)}
    many = {"settings": {"final": {"num_examples": 200}}}
    assert kept(run("at-s0-12", **few), run("at-s0-6", **many)) == ["at-s0-6"]
    assert kept(run("at-s0-10"), run("at-s0-9"), run("at-s0")) == ["at-s0-10"]


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"init_args": {"lam": 9.0}}},
        {"trainer": {"max_epochs": 9}},
        {"data": {"init_args": {"num_train": 9}}},
        {"weight_averaging": {"decay": 0.9}},
        {"early_stopping": {"patience": 9}},
    ],
)
def test_other_trainings_all_stay(settings):
    assert kept(run("a", settings={}), run("b", settings=settings)) == ["a", "b"]
    assert kept(run("a"), run("b", seed=1), run("c", data="CIFAR10")) == ["a", "b", "c"]


@pytest.mark.parametrize("section", ["evaluation", "early_stopping", "autoattack", "landscape"])
def test_another_measure_is_no_other_training(section):
    settings = {section: {"num_examples": 9}}
    assert kept(run("a", settings={}), run("b", settings=settings)) == ["b"]


@pytest.mark.parametrize(("name", "default"), [("fast", True), ("fold_batch_norm", False)])
def test_a_run_from_before_an_argument_is_the_model_of_one_with_its_default(name, default):
    plain = make_run().settings
    model, flatness = plain["model"], plain.get("flatness", {})

    def with_argument(value):
        arguments = {**model.get("init_args", {}), name: value}
        measure = {**flatness, name: value}
        return {**plain, "model": {**model, "init_args": arguments}, "flatness": measure}

    before, after = run("a", seed=0), run("b", seed=1, settings=with_argument(default))
    assert len(group_runs([before, after])) == 1
    assert len(group_runs([before, run("c", seed=1, settings=with_argument(not default))])) == 2
    assert kept(before, run("d", seed=0, settings=with_argument(default))) == ["d"]


def test_a_seed_with_more_measures_is_a_replica():
    few = run("a", seed=0, settings={"final": {"steps": 10, "extras": ["worst"]}})
    more = run("b", seed=1, settings={"final": {"steps": 10, "extras": ["all"]}})
    assert len(group_runs([few, more])) == 1
    weaker = run("c", seed=1, settings={"final": {"steps": 5, "extras": ["all"]}})
    assert len(group_runs([few, weaker])) == 2
