import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from run_factory import make_run, write_run

from robust_flatness.reporting import read_run, read_runs
from robust_flatness.reporting.frame import drop_duplicates, flat_settings, group_runs
from robust_flatness.run_folder.metrics import METHOD_LABELS, method_label


def settings(lam=6.0, **others) -> dict:
    model = {"class_path": "robust_flatness.lightning_modules.TRADES", "init_args": {"lam": lam}}
    return {"model": model, **others}


def trades(seed, lam=6.0, **options):
    others = options.pop("settings", {})
    return make_run("trades", seed, settings=settings(lam, **others), **options)


def labels(runs) -> list[str]:
    return group_runs(runs).labels


def test_seeds_are_replicas():
    runs = [trades(seed, final={"test/error": error}) for seed, error in [(2, 0.3), (0, 0.1)]]
    models = group_runs([*runs, trades(1, final={"test/robust_loss": 2.0})])
    assert models.labels == ["TRADES"]
    assert [run.seed for run in models.runs["TRADES"]] == [0, 1, 2]
    assert models.differs == {"TRADES": {}}
    errors = models.column("test/error").loc["TRADES"]
    assert (errors["mean"], errors["sd"], errors["n"]) == pytest.approx((0.2, 0.02**0.5, 2))
    assert math.isnan(models.column("test/robust_loss").at["TRADES", "sd"])
    assert models.mean("TRADES", "test/robust_loss") == 2.0
    assert models.mean("TRADES", "hessian/max_eigenvalue") is None


def test_images_are_missing_if_seeds_differ():
    images = [{"test/error": number} for number in (200, 200, 100)]
    runs = [trades(s, final={"test/error": 0.1}, num_examples=n) for s, n in enumerate(images)]
    assert group_runs(runs[:2]).column("test/error").at["TRADES", "images"] == 200
    assert pd.isna(group_runs(runs).column("test/error").at["TRADES", "images"])


def test_points_are_models_that_have_both_metrics():
    x, y = "flatness/average/test", "test/robust_loss"
    runs = [make_run("at", s, final={x: 1.0 + s, y: 2.0}) for s in range(3)]
    models = group_runs([*runs, make_run("mart", final={x: 1.0}), make_run("silu", final={y: 1.0})])
    points = models.points(x, y)
    assert points.to_dict("index") == {
        "AT": {"method": "at", "x": 2.0, "y": 2.0, "dx": 1.0, "dy": 0.0}
    }
    assert models.points(x, "no/metric").empty


def test_gaps_are_paired_by_seed():
    def run(seed, loss, best, train):
        final = {"test/robust_loss": loss, "train_eval/robust_loss": train}
        final |= {"test/robust_error": 0.5 + seed / 10, "train_eval/robust_error": 0.2}
        early = {} if best is None else {"test/robust_loss": best}
        return make_run(seed=seed, final=final, early_stopped=early)

    models = group_runs([run(0, 2.0, 1.5, 1.0), run(1, 3.0, 2.3, 1.0), run(2, 9.0, None, 8.0)])
    gap = models.column("last_minus_best/robust_loss").loc["AT"]
    assert (gap["mean"], gap["n"]) == pytest.approx((0.6, 2))
    assert gap["sd"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert models.mean("AT", "gap/robust_loss") == pytest.approx(4 / 3)
    assert models.mean("AT", "gap/robust_error") == pytest.approx(0.4)


def test_no_runs_are_no_models():
    models = group_runs([])
    assert (len(models), models.methods, models.labels) == (0, [], [])
    assert models.points("test/error", "test/robust_error").empty


def test_settings_that_differ_name_the_label_in_the_order_of_their_numbers():
    models = group_runs([trades(0, 10.0), trades(0, 9.0), trades(1, 9.0), make_run("at")])
    assert models.labels == ["AT", "TRADES lam=9", "TRADES lam=10"]
    assert [len(runs) for runs in models.runs.values()] == [1, 2, 1]
    assert models.differs["TRADES lam=9"] == {"model.lam": 9.0}


@pytest.mark.parametrize(
    "others",
    [
        {"trainer": {"devices": 2, "accelerator": "gpu", "strategy": "ddp", "num_nodes": 2}},
        {"trainer": {"logger": None, "default_root_dir": "elsewhere", "log_every_n_steps": 5}},
        {"data": {"init_args": {"num_workers": 8, "in_memory": False}}},
        {"name": "x", "group": "y", "project": "z", "ckpt_path": "a.ckpt", "without": ["wandb"]},
        {"folder": "runs/elsewhere", "last_checkpoint": {"dirpath": "there"}},
        {"landscape": {"num_steps": 5}, "log_checkpoints": True, "trajectory": {"figures": False}},
    ],
)
def test_where_and_on_what_a_run_was_does_not_matter(others):
    assert len(group_runs([trades(0), trades(1, settings=others)])) == 1


def test_a_class_and_its_row_are_one_method():
    models = group_runs([make_run("at", 0), make_run("AT", 1), make_run("ATAWP"), make_run("Mine")])
    assert models.labels == ["Mine", "AT", "AT-AWP"]
    assert [run.seed for run in models.runs["AT"]] == [0, 1]
    left_out = drop_duplicates([make_run("at", 0), make_run("AT", 0)])[1]
    assert len(left_out) == 1


def test_a_protocol_that_is_not_the_same_for_all_is_in_all_labels():
    weak = {"final": {"eps": None, "steps": 10}, "data": {"init_args": {"eps": 0.1}}}
    usual = {"final": {"eps": None, "steps": 20}, "data": {"init_args": {"eps": 0.2}}}
    runs = [trades(0, settings=weak), make_run("at", settings=usual)]
    assert labels(runs) == ["AT eps=0.2 final.steps=20", "TRADES eps=0.1 final.steps=10"]
    # An older run says nothing.
    assert labels([*runs[:1], make_run("at")]) == ["AT", "TRADES"]
    more = {**weak, "final": {"eps": 0.2, "steps": 10}}
    assert labels([trades(0, 9.0, settings=weak), trades(0, settings=more)]) == [
        "TRADES eps=0.2 lam=6",
        "TRADES eps=0.1 lam=9",
    ]


def test_a_run_that_was_resumed_with_other_settings_is_another_model():
    def resumed(seed, **before):
        earlier = [{"before_epoch": 2, "settings": settings(**before)}]
        return replace(trades(seed, 9.0), earlier_settings=earlier)

    runs = [trades(0, 9.0), resumed(1, lam=6.0)]
    assert labels(runs) == ["TRADES resumed=None", "TRADES resumed=lam=6 to epoch 2"]
    # It was stopped with other measures or in another place.
    elsewhere = {"folder": "there", "final": {"num_examples": 9}}
    assert labels([trades(0, 9.0), resumed(1, lam=9.0, **elsewhere)]) == ["TRADES"]


def test_callbacks_that_train_tell_models_apart_and_others_do_not():
    def with_callbacks(*names):
        callbacks = [{"class_path": f"package.{name}", "init_args": {}} for name in names]
        return trades(0, settings={"trainer": {"callbacks": callbacks}})

    assert len(group_runs([trades(0), with_callbacks("LearningRateMonitor", "Flatness")])) == 1
    assert len(group_runs([trades(0), with_callbacks("AdversarialTraining")])) == 2
    assert len(group_runs([trades(0), with_callbacks("Timer", "Flatness")])) == 2


def test_values_of_the_last_epoch_are_not_averaged_with_final_ones():
    loss, train = "test/robust_loss", "train_eval/robust_loss"
    runs = [
        make_run("at", 0, final={loss: 2.0, train: 1.0}, num_examples={loss: 1000, train: 1000}),
        make_run("at", 1, final={loss: 4.0, train: 1.0}, num_examples={train: 1000}),
    ]
    models = group_runs(runs)
    assert models.mean("AT", loss) == 2.0
    assert models.column(loss).at["AT", "n"] == 1
    # Of the second, RLoss on test images is that of an epoch.
    assert models.mean("AT", "gap/robust_loss") == 1.0
    assert group_runs(runs[1:]).mean("AT", loss) == 4.0
    assert group_runs(runs[1:]).mean("AT", "gap/robust_loss") is None


def test_a_method_may_be_called_as_another_ones_model():
    runs = [trades(0, 9.0), trades(0, 10.0), make_run("TRADES lam=9")]
    models = group_runs(runs)
    # As sorted by method.
    assert models.labels == ["TRADES lam=9", "TRADES lam=9 (trades)", "TRADES lam=10"]
    assert [len(own) for own in models.runs.values()] == [1, 1, 1]


def test_a_networks_own_argument_of_such_a_name_matters():
    nets = [{"net": {"init_args": {"name": name}}} for name in ("small", "large")]
    assert labels([trades(0, settings=net) for net in nets]) == [
        "TRADES net.name=large",
        "TRADES net.name=small",
    ]


def test_an_option_that_an_older_version_lacks_is_one_that_is_not_set():
    newer = {"autoattack": {"attacks": None}}
    assert labels([trades(0), trades(1, settings=newer)]) == ["TRADES"]
    set_ = {"autoattack": {"attacks": ["square"]}}
    assert labels([trades(0), trades(1, settings=set_)]) == [
        "TRADES autoattack.attacks=None",
        "TRADES autoattack.attacks=['square']",
    ]


def test_a_whole_number_is_the_same_as_a_float():
    assert len(group_runs([trades(0, 6), trades(1, 6.0)])) == 1


def test_truth_is_no_number():
    runs = [trades(0, settings={"data": {"flip": flip}}) for flip in (True, False)]
    assert labels(runs) == ["TRADES flip=False", "TRADES flip=True"]


def test_data_sets_are_never_replicas_of_each_other():
    runs = [trades(0), trades(1, data="CIFAR10")]
    assert labels(runs) == ["TRADES data=CIFAR10", "TRADES data=Digits"]


@pytest.mark.parametrize(("path", "count"), [("datamodules.CIFAR10", 1), ("mine.Data", 2)])
def test_copies_of_a_data_set_in_two_places_are_one(path, count):
    # Of someone else's data, the root may be what tells data sets apart.
    runs = [
        trades(seed, data="Data", settings={"data": {"class_path": path, "root": root}})
        for seed, root in enumerate(("data", "/shared/data"))
    ]
    assert len(group_runs(runs)) == count


def test_a_number_that_two_settings_share_is_shown_once():
    runs = [
        trades(0, settings={"data": {"eps": eps}, "trainer": {"eps": eps}}) for eps in (0.1, 0.2)
    ]
    assert labels(runs) == ["TRADES eps=0.1", "TRADES eps=0.2"]


def test_labels_show_what_was_trained_and_else_alone_what_was_measured():
    def run(seed, lam, images):
        return trades(seed, lam, settings={"autoattack": {"num_examples": images}})

    assert labels([run(0, 6, 64), run(0, 9, 200)]) == ["TRADES lam=6", "TRADES lam=9"]
    assert labels([run(0, 6, 64), run(1, 6, 200)]) == [
        "TRADES autoattack.num_examples=64",
        "TRADES autoattack.num_examples=200",
    ]


def test_many_settings_are_cut_where_three_tell_models_apart():
    runs = [trades(0, lam, settings={"data": dict.fromkeys("abc", lam)}) for lam in (1, 2)]
    assert labels(runs)[0] == "TRADES lam=1 a=1 b=1 …"


def test_letters_stand_for_long_labels_and_their_settings_are_told():
    def run(lam):
        options = {f"a_long_name_{index}": lam for index in range(12)}
        return trades(0, lam, settings={"data": options})

    models = group_runs([run(10.0), run(9.0), make_run("at")])
    assert models.labels == ["AT", "TRADES (a)", "TRADES (b)"]
    assert models.settings("AT") == ""
    assert models.settings("TRADES (a)").startswith("lam=9, a_long_name_0=9, ")
    assert models.settings("TRADES (b)").endswith(", 3 more")
    assert group_runs([trades(0, 6.0), trades(0, 9.0)]).settings("TRADES lam=6") == ""


def test_flat_settings_are_named_as_on_the_command_line():
    nested = settings(9.0, trainer={"max_epochs": 5, "devices": 2}, seed_everything=3)
    nested["model"]["init_args"]["optimizer"] = {"class_path": "SGD", "init_args": {"lr": 0.1}}
    assert flat_settings(nested) == {
        "model": "TRADES",
        "model.lam": 9.0,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0.1,
        "trainer.max_epochs": 5,
    }


def test_methods_are_named_as_in_the_paper():
    assert len(set(METHOD_LABELS.values())) == len(METHOD_LABELS) == 30
    assert method_label("late_multi_step") == "“Late” multi-step"
    assert method_label("my_method") == "my_method"


def rows(losses: dict[int, float], name: str = "test/robust_loss") -> list[dict[str, float]]:
    return [{"epoch": epoch, name: loss} for epoch, loss in losses.items()]


def test_series_are_over_the_epochs_that_all_seeds_have():
    runs = [
        make_run(seed=0, trajectory=rows({0: 1.0, 1: 2.0, 3: 4.0}), epochs=4),
        make_run(seed=1, trajectory=rows({0: 3.0, 2: 9.0, 3: 5.0}), epochs=4),
        make_run(seed=2, trajectory=rows({0: 9.0}, "train/loss"), epochs=4),
    ]
    series = group_runs(runs).series("AT", "test/robust_loss")
    assert series.to_dict("list") == {
        "share": [0.25, 1.0],
        "mean": [2.0, 4.5],
        "low": [1.0, 4.0],
        "high": [3.0, 5.0],
        "seeds": [2, 2],
    }


def test_a_series_is_of_the_first_name_that_was_measured():
    models = group_runs([make_run(trajectory=rows({0: 2.0}, "train/robust_loss"))])
    series = models.series("AT", "train_eval/robust_loss", "train/robust_loss")
    assert list(series["mean"]) == [2.0]
    assert models.series("AT", "test/robust_loss") is None
    apart = [make_run(seed=s, trajectory=rows({s: 1.0})) for s in (0, 1)]
    assert group_runs(apart).series("AT", "test/robust_loss") is None


def test_read_runs_is_a_frame_with_two_rows_for_each_run(tmp_path):
    runs = [trades(seed, final={"test/error": 0.1 * (1 + seed)}) for seed in (0, 1)]
    for run in runs:
        write_run(tmp_path / f"s{run.seed}", run)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    frame = read_runs(tmp_path)
    assert list(frame["run"]) == ["s0", "s0", "s1", "s1"]
    last = frame[frame["weights"] == "final"]
    assert last.groupby("method")["test/error"].mean().to_dict() == pytest.approx({"trades": 0.15})
    ((folder, reason),) = frame.attrs["left_out"]
    assert (folder, reason[:12]) == (str(tmp_path / "unfinished"), "not finished")
    assert read_runs(tmp_path / "unfinished").empty
    with pytest.raises(ValueError, match="Expected `runs` to be a folder"):
        read_runs(tmp_path / "nowhere")


def test_read_run_is_the_trajectory(tmp_path):
    run = make_run("at", 3, epochs=4)
    frame = read_run(write_run(tmp_path / "run", run))
    assert list(frame["epoch"]) == [0, 1, 2, 3]
    expected = [row["test/robust_loss"] for row in run.trajectory]
    assert list(frame["test/robust_loss"]) == expected
    assert (frame.attrs["method"], frame.attrs["seed"]) == ("at", 3)
    with pytest.raises(ValueError, match="not finished"):
        read_run(tmp_path)
