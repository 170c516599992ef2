import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_factory import FINAL, make_run, overfitting, write_metrics, write_run

from robust_flatness.run_folder.files import Landscape, write_landscapes
from robust_flatness.run_folder.runs import find_runs, load_run


def change(folder: Path, **changes) -> None:
    """Changes entries of a run's results, and takes those out that become `...`."""
    path = folder / "results.json"
    content = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept))


def reason(folder: Path) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_run(folder)
    return str(caught.value)


def landscape(height: float) -> Landscape:
    return Landscape(np.linspace(-1, 1, 3), np.full((2, 3, 4), height))


def test_run_reads_back_equal(tmp_path):
    run = make_run("trades", 3, data="CIFAR10", epochs=5, settings={"model": {"lam": 6.0}})
    folder = write_run(tmp_path / "run", run)
    assert load_run(folder) == replace(run, folder=folder)
    assert load_run(folder).metrics("early_stopped") == run.early_stopped


@pytest.mark.parametrize(
    ("data", "root", "name"),
    [
        ("ImageFolder", "~/pictures/", "pictures"),
        ("ImageFolder", "/data/CIFAR10", "ImageFolder"),  # not the images of the class
        ("ImageFolder", None, "ImageFolder"),
        ("ImageFolder", "two\nlines", "ImageFolder"),
        ("CIFAR10", "~/data", "CIFAR10"),
    ],
)
def test_images_in_folders_are_the_data_set_of_their_folder(data, root, name, tmp_path):
    settings = {"data": {"class_path": f"package.{data}", "init_args": {"root": root}}}
    folder = write_run(tmp_path / "run", make_run(data=data, settings=settings))
    assert load_run(folder).data == name


def test_runs_are_found_at_any_depth_in_the_order_of_their_folders(tmp_path):
    names = ["b", "a/deep/er", "a/x"]
    for name in names:
        write_run(tmp_path / name, make_run())
    runs, left_out = find_runs(tmp_path)
    assert [run.folder for run in runs] == [tmp_path / name for name in sorted(names)]
    assert left_out == []
    assert [run.name for run in find_runs(str(tmp_path / "b"))[0]] == ["b"]


def test_a_run_folder_inside_a_folder_named_wandb_is_read(tmp_path):
    write_run(tmp_path / "wandb" / "run", make_run())
    assert len(find_runs(tmp_path / "wandb")[0]) == 1


def test_linked_run_folders_are_read_once_and_a_circle_ends(tmp_path):
    folder = write_run(tmp_path / "scratch" / "at-s0", make_run())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "at-s0").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path / "runs")
    assert [run.folder for run in find_runs(tmp_path / "runs")[0]] == [tmp_path / "runs" / "at-s0"]
    assert len(find_runs(tmp_path)[0]) == 1


def test_a_test_without_a_training_is_left_out_by_name(tmp_path):
    write_run(tmp_path / "run", make_run())
    (tmp_path / "external").mkdir()
    (tmp_path / "external" / "results_test.json").write_text("{}")
    assert find_runs(tmp_path)[1] == [(tmp_path / "external", "has a test and no training")]


def test_an_error_that_is_a_distance_is_left_out(tmp_path):
    final = {**FINAL, "val/depth_error": 3.2, "val/my_error": 0.5}
    run = load_run(write_run(tmp_path, make_run(final=final)))
    assert "val/depth_error" not in run.final
    assert run.final["val/my_error"] == 0.5


def test_config_of_wandb_inside_a_run_folder_is_no_run(tmp_path):
    folder = write_run(tmp_path / "run", make_run())
    files = folder / "wandb" / "offline-run-1" / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text("wandb: {}\n")
    runs, left_out = find_runs(tmp_path)
    assert (len(runs), left_out) == (1, [])


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    write_run(tmp_path / "good", make_run())
    broken = write_run(tmp_path / "broken", make_run())
    (broken / "results.json").write_text('{"method": "at", "fin')
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("name: at\n")
    old = write_run(tmp_path / "old", make_run())
    change(old, epochs=..., trajectory=...)
    runs, left_out = find_runs(tmp_path)
    assert [run.name for run in runs] == ["good"]
    assert [folder.name for folder, _ in left_out] == ["broken", "old", "unfinished"]
    reasons = [reason for _, reason in left_out]
    assert reasons[0].startswith("results.json is broken (")
    assert reasons[1] == "results.json is of an older format, without trajectory, epochs"
    assert reasons[2] == "not finished: no epoch was recorded"


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(0, "no epoch was"), (1, "one epoch was"), (3, "3 epochs were")],
)
def test_unfinished_run_says_how_far_it_came(tmp_path, epochs, expected):
    write_metrics(tmp_path, overfitting(epochs))
    assert reason(tmp_path) == f"not finished: {expected} recorded"


def test_unreadable_metrics_are_no_epochs(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"epoch\n\xff\xfe\x00\n")
    assert reason(tmp_path) == "not finished: no epoch was recorded"


@pytest.mark.parametrize("text", ["[1, 2]", "null", '"at"', "3"])
def test_results_that_are_no_mapping_are_left_out(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert "another format" in find_runs(tmp_path)[1][0].reason


@pytest.mark.parametrize(
    "changes",
    [
        {"final": [1, 2]},
        {"settings": 3},
        {"trajectory": [{"test/error": 0.5}]},
        {"trajectory": ["epoch"]},
        {"epochs": "many"},
    ],
)
def test_entries_of_another_kind_are_of_another_format(tmp_path, changes):
    change(write_run(tmp_path, make_run()), **changes)
    assert "results.json is of another format (" in reason(tmp_path)


def test_figures_that_are_no_finite_numbers_are_dropped(tmp_path):
    final = {"test/error": 0.1, "test/robust_loss": float("nan"), "train/loss": None, "x": "y"}
    rows = [{"epoch": 0, "test/robust_loss": float("inf"), "test/error": 0.5}]
    change(write_run(tmp_path, make_run()), final=final, early_stopped=final, trajectory=rows)
    run = load_run(tmp_path)
    assert run.diverged_epoch is None
    change(tmp_path, diverged_epoch=0)
    assert load_run(tmp_path).diverged_epoch == 0
    assert run.final == run.early_stopped == {"test/error": 0.1}
    assert run.trajectory == [{"epoch": 0, "test/error": 0.5}]


def test_autoattack_of_early_stopped_weights_is_theirs_where_only_the_last_ones_have_it(tmp_path):
    final = FINAL | {"test/autoattack_error_early_stopped": 0.45}
    write_run(tmp_path, make_run(final=final, early_stopped={"test/error": 0.1}))
    assert load_run(tmp_path).early_stopped["test/autoattack_error"] == 0.45
    change(tmp_path, early_stopped={"test/autoattack_error": 0.5})
    assert load_run(tmp_path).early_stopped["test/autoattack_error"] == 0.5


@pytest.fixture
def tested_run(tmp_path):
    """A finished run without AutoAttack, and writes the results of a test of it."""
    run = make_run()
    parts = [
        {name: value for name, value in part.items() if "autoattack" not in name}
        for part in (run.final, run.early_stopped, run.num_examples)
    ]
    run = replace(run, final=parts[0], early_stopped=parts[1], num_examples=parts[2])
    folder = write_run(tmp_path / "run", run)
    fitted = json.loads((folder / "results.json").read_text())

    def write(**changes):
        tested = {
            "checkpoint": "last",
            "trajectory": fitted["trajectory"],
            "settings": fitted["settings"],
            "final": {"hessian/trace": 3.0, "test/robust_loss": 99.0, "test/autoattack_error": 0.5},
            "early_stopped": {"hessian/trace": 2.0},
            "num_examples": {"hessian/trace": 128, "test/autoattack_error": 64},
            "attacks": {"test/autoattack_error": "apgd-ce+apgd-t"},
        }
        (folder / "results_test.json").write_text(json.dumps(tested | changes))

    return folder, write


def test_measures_that_fit_lacks_are_those_of_a_test_of_its_last_checkpoint(tested_run):
    folder, write = tested_run
    before = load_run(folder)
    write()
    run = load_run(folder)
    assert run.final == {**before.final, "hessian/trace": 3.0, "test/apgd-ce+apgd-t_error": 0.5}
    assert run.early_stopped == {**before.early_stopped, "hessian/trace": 2.0}
    counts = {"hessian/trace": 128, "test/apgd-ce+apgd-t_error": 64}
    assert run.num_examples == {**before.num_examples, **counts}
    assert find_runs(folder) == ([run], [])


def test_a_value_of_the_trajectory_gives_way_to_one_of_a_test_for_both_weights(tested_run):
    folder, write = tested_run
    content = json.loads((folder / "results.json").read_text())
    change(folder, final=content["final"] | {"hessian/trace": 5.0})
    write()
    run = load_run(folder)
    values = (run.final["hessian/trace"], run.early_stopped["hessian/trace"])
    assert (*values, run.num_examples["hessian/trace"]) == (3.0, 2.0, 128)


def test_checks_of_a_test_decide_what_fit_left_open(tested_run):
    folder, write = tested_run
    names = ("AutoAttack", "Square", "more steps")
    ours, theirs = (
        [{"name": name, "passed": passed, "text": text} for name, passed in zip(names, values)]
        for text, values in (("fit", (True, None, None)), ("test", (False, False, None)))
    )
    change(folder, checks={"final": ours})
    write(checks={"final": theirs}, error_curve={"final": {"eps": [0.1], "robust_error": [1.0]}})
    run = load_run(folder)
    checks = [(check["text"], check["passed"]) for check in run.checks["final"]]
    assert checks == [("fit", True), ("test", False), ("test", None)]
    assert run.error_curve["final"]["eps"] == [0.1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpoint": "best"}, "is not a test of the last checkpoint"),
        ({"trajectory": []}, "is not a test of the last checkpoint"),
        ({"settings": {"final": {"steps": 5}}}, "has other settings than the run: final"),
        ({"settings": {"data": {"init_args": {"eps": 1}}}}, "run: data.init_args.eps"),
        ({"final": [1]}, "`final` is"),
        ({"final": {"hessian/trace": 10**30}}, "too many digits"),
    ],
)
def test_a_test_that_does_not_fit_the_run_is_named_and_the_run_stays(tested_run, changes, expected):
    folder, write = tested_run
    before = load_run(folder)
    write(**changes)
    runs, left_out = find_runs(folder)
    assert runs == [before] == [load_run(folder)]
    assert [item.folder.name for item in left_out] == ["results_test.json"]
    assert expected in left_out[0].reason


def test_a_broken_test_leaves_the_run_finished(tested_run):
    folder, _ = tested_run
    (folder / "results_test.json").write_text("{")
    assert load_run(folder).name == "run"
    assert find_runs(folder)[1][0].reason.startswith("results_test.json is broken")


def test_several_tests_all_add_their_measures_and_the_latest_wins(tested_run):
    folder, write = tested_run
    for number, name in ((2, "second"), (10, "tenth"), ("", "latest")):
        final = {"common": float(number or 99), name: 1.0}
        write(final=final, early_stopped={}, num_examples=dict.fromkeys(final, 8), attacks={})
        if number:
            (folder / "results_test.json").rename(folder / f"results_test-{number}.json")
    final = load_run(folder).final
    assert {"second", "tenth", "latest"} <= final.keys()
    assert final["common"] == 99
    change(folder, trajectory=[{"epoch": 0}])
    assert len(find_runs(folder)[1]) == 3


def test_a_test_of_other_data_or_another_network_adds_nothing(tested_run):
    folder, write = tested_run
    base = {"class_path": "p.CIFAR10", "init_args": {"root": "a", "downsample": 2, "num_test": 9}}
    model = {"class_path": "p.AT", "init_args": {"network": {"init_args": {"activation": "relu"}}}}
    change(folder, settings={"data": base, "model": model})

    def said(data=base, model=model):
        write(settings={"data": data, "model": model})
        reasons = [left_out.reason for left_out in find_runs(folder)[1]]
        return reasons[0] if reasons else ""

    moved = {**base["init_args"], "root": "b", "num_test": 5, "newer": 1}
    assert said(data={**base, "init_args": moved}) == ""
    assert "run: data.init_args.downsample" in said(data={**base, "init_args": {"downsample": 1}})
    assert "run: data.class_path" in said(data={**base, "class_path": "p.ImageFolder"})
    silu = {"init_args": {"network": {"init_args": {"activation": "silu"}}}}
    assert "run: model.init_args.network.init_args.activation" in said(model=silu)


def test_a_standard_error_goes_with_its_value(tested_run):
    folder, write = tested_run
    content = json.loads((folder / "results.json").read_text())
    trace, error = "hessian/trace", "hessian/trace_sem"
    change(folder, final=content["final"] | {trace: 5.0, error: 0.1})
    # By one probe, which has no standard error.
    write(final={trace: 3.0}, num_examples={trace: 128})
    final = load_run(folder).final
    assert final[trace] == 3.0
    assert error not in final


def test_landscapes_of_fit_win_over_those_of_a_test_that_fits(tested_run):
    folder, write = tested_run
    write_landscapes(folder / "landscapes_test.npz", {"final/random": landscape(2)}, {})
    assert load_run(folder).landscapes == {}
    write()
    assert load_run(folder).landscapes["final/random"].losses.max() == 2
    write_landscapes(folder / "landscapes.npz", {"final/random": landscape(1)}, {})
    assert load_run(folder).landscapes["final/random"].losses.max() == 1


def test_landscapes_are_means_over_examples(tmp_path):
    losses = np.random.default_rng(0).random((2, 3, 4))
    written = Landscape(np.linspace(-1, 1, 3), losses)
    write_run(tmp_path, make_run(), landscapes={"final/random": written})
    read = load_run(tmp_path).landscapes["final/random"]
    assert read.losses.shape == (2, 3, 1)
    assert (read.curves == losses.mean(axis=2)).all()


def test_broken_landscapes_say_so(tmp_path):
    write_run(tmp_path, make_run())
    (tmp_path / "landscapes.npz").write_bytes(b"PK\x03\x04 cut off")
    assert reason(tmp_path).startswith("landscapes.npz is broken or not of landscapes (")


def test_root_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match="Expected `runs` to be a folder"):
        find_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "x"}, "`seed` is 'x', not an integer >= 0"),
        ({"seed": True}, "`seed` is True"),
        ({"seed": 1.5}, "`seed` is 1.5"),
        ({"epochs": float("inf")}, "`epochs` is inf, not an integer >= 0"),
        ({"epochs": -1}, "`epochs` is -1"),
        ({"epochs": [4]}, r"`epochs` is [4]"),
        ({"num_classes": -5}, "`num_classes` is -5, not an integer >= 1"),
        ({"num_classes": "10"}, "`num_classes` is '10'"),
        ({"early_stopped_epoch": -1}, "`early_stopped_epoch` is -1"),
        ({"wall_time_seconds": "long"}, "`wall_time_seconds` is 'long', not a number >= 0"),
        ({"method": ["at"]}, "`method` is ['at'], not a name in one line"),
        ({"method": "two\nlines"}, "`method` is"),
        ({"method": ""}, "`method` is ''"),
        ({"method": "x" * 1000}, "`method` is 'xxx"),
        ({"data": 3}, "`data` is 3"),
        ({"data": "\ud800"}, "surrogates not allowed"),
        ({"settings": [1]}, "`settings` is [1], not a mapping"),
        ({"settings": {"model": 10**400}}, "too many digits"),
        ({"final": {"test/error": 50.0}}, "`final` has test/error 50, not a share of 1"),
        ({"early_stopped": {"test/robust_error": -0.5}}, "not a share of 1"),
        ({"num_examples": {"test/error": "200"}}, "`test/error` is '200', not an integer >= 1"),
        ({"num_examples": {"test/error": 0}}, "`test/error` is 0"),
        ({"num_examples": [200]}, "`num_examples` is [200]"),
        ({"trajectory": {"epoch": 1}}, "`trajectory` is not a list of mappings"),
        ({"trajectory": [{"epoch": "1"}]}, "`epoch` is '1'"),
        ({"trajectory": [{"epoch": 10**400}]}, "too many digits"),
        ({"versions": ["torch"]}, "`versions` is ['torch']"),
        ({"hardware": {"gpus": 2}}, "no list of `gpus`"),
    ],
)
def test_values_of_wrong_types_are_named(tmp_path, changes, said):
    change(write_run(tmp_path, make_run()), **changes)
    assert reason(tmp_path).startswith("results.json is of another format (")
    assert said in reason(tmp_path)


def test_results_that_are_nested_too_deeply_are_left_out(tmp_path):
    change(write_run(tmp_path, make_run()), settings={"a": json.loads("[" * 100 + "]" * 100)})
    assert "nested too deeply" in reason(tmp_path)
    (tmp_path / "results.json").write_text("[" * 100_000 + "]" * 100_000)
    assert reason(tmp_path).startswith("results.json is broken (")


def test_a_run_that_ended_in_its_first_epoch_and_one_of_one_class_are_read(tmp_path):
    change(write_run(tmp_path, make_run()), epochs=0, num_classes=1)
    run = load_run(tmp_path)
    assert (run.epochs, run.num_classes) == (1, 1)


def test_huge_figures_and_truth_are_no_numbers(tmp_path):
    final = {"test/robust_loss": 1e300, "test/error": True, "train/loss": 10**18, "x": -1e200}
    change(write_run(tmp_path, make_run()), final=final, early_stopped=final)
    assert load_run(tmp_path).final == {"train/loss": 1e18}


@pytest.mark.parametrize(
    ("coordinates", "losses"),
    [
        (np.zeros(3), np.zeros((2, 4, 5))),
        (np.zeros(3), np.zeros((2, 3))),
        (np.zeros(0), np.zeros((2, 0, 5))),
        (np.array([0, np.nan, 1]), np.zeros((2, 3, 5))),
        (np.zeros(3), np.full((2, 3, 5), "a")),
    ],
)
def test_landscapes_of_other_shapes_are_left_out(tmp_path, coordinates, losses):
    landscapes = {"final/random": Landscape(coordinates, losses)}
    write_run(tmp_path, make_run(), landscapes=landscapes)
    assert reason(tmp_path).startswith("landscapes.npz is broken or not of landscapes (Expected")


def test_a_fifo_in_place_of_a_table_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "metrics.csv")
    os.mkfifo(tmp_path / "results.json")
    assert reason(tmp_path) == "not finished: no epoch was recorded"
