import pytest
from run_factory import make_run

from robust_flatness.plotting.method_labels import METHOD_LABELS
from robust_flatness.reporting.models import group_models, method_label
from robust_flatness.reporting.settings import flat_settings


def settings(lam=6.0, **others) -> dict:
    model = {"class_path": "robust_flatness.lightning_modules.TRADES", "init_args": {"lam": lam}}
    return {"model": model, **others}


def trades(seed, lam=6.0, **options):
    others = options.pop("settings", {})
    return make_run("trades", seed, settings=settings(lam, **others), **options)


def labels(runs) -> list[str]:
    return [model.label for model in group_models(runs)]


def test_seeds_are_replicas():
    runs = [trades(seed, final={"test/error": error}) for seed, error in [(2, 0.3), (0, 0.1)]]
    (model,) = group_models([*runs, trades(1, final={"test/robust_loss": 2.0})])
    assert [run.seed for run in model.runs] == [0, 1, 2]
    assert model.values("test/error") == [0.1, 0.3]
    assert model.mean("test/error") == pytest.approx(0.2)
    assert model.deviation("test/error") == pytest.approx(0.02**0.5)
    assert model.deviation("test/robust_loss") is None
    assert model.mean("hessian/max_eigenvalue") is None
    assert (model.label, model.differs) == ("TRADES", {})


def test_settings_that_differ_name_the_label_in_the_order_of_their_numbers():
    models = group_models([trades(0, 10.0), trades(0, 9.0), trades(1, 9.0), make_run("at")])
    assert [model.label for model in models] == ["AT", "TRADES lam=9", "TRADES lam=10"]
    assert [len(model.runs) for model in models] == [1, 2, 1]
    assert models[1].differs == {"model.lam": 9.0}


@pytest.mark.parametrize(
    "others",
    [
        {"trainer": {"devices": 2, "accelerator": "gpu", "strategy": "ddp", "num_nodes": 2}},
        {"trainer": {"logger": None, "default_root_dir": "elsewhere", "log_every_n_steps": 5}},
        {"data": {"init_args": {"num_workers": 8, "in_memory": False}}},
        {"name": "x", "group": "y", "project": "z", "ckpt_path": "a.ckpt", "without": ["wandb"]},
        {"folder": "runs/elsewhere", "last_checkpoint": {"dirpath": "there"}},
    ],
)
def test_where_and_on_what_a_run_was_does_not_matter(others):
    assert len(group_models([trades(0), trades(1, settings=others)])) == 1


def test_a_networks_own_argument_of_such_a_name_matters():
    nets = [{"net": {"init_args": {"name": name}}} for name in ("small", "large")]
    assert labels([trades(0, settings=net) for net in nets]) == [
        "TRADES net.name=large",
        "TRADES net.name=small",
    ]


def test_an_option_that_an_older_version_lacks_is_one_that_is_not_set():
    newer = {"final": {"extras": None}}
    assert labels([trades(0), trades(1, settings=newer)]) == ["TRADES"]
    set_ = {"final": {"extras": ["worst"]}}
    assert labels([trades(0), trades(1, settings=set_)]) == [
        "TRADES final.extras=None",
        "TRADES final.extras=['worst']",
    ]


def test_a_whole_number_is_the_same_as_a_float():
    assert len(group_models([trades(0, 6), trades(1, 6.0)])) == 1


def test_truth_is_no_number():
    runs = [trades(0, settings={"data": {"flip": flip}}) for flip in (True, False)]
    assert labels(runs) == ["TRADES flip=False", "TRADES flip=True"]


def test_data_sets_are_never_replicas_of_each_other():
    models = group_models([trades(0), trades(1, data="CIFAR10")])
    assert [model.label for model in models] == ["TRADES data=CIFAR10", "TRADES data=Digits"]


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

    models = group_models([run(10.0), run(9.0), make_run("at")])
    assert [model.label for model in models] == ["AT", "TRADES (a)", "TRADES (b)"]
    at, a, b = models
    assert at.untold == ""
    assert a.untold.startswith("lam=9, a_long_name_0=9, ")
    assert b.untold.endswith(", 3 more")
    assert group_models([trades(0, 6.0), trades(0, 9.0)])[0].untold == ""


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
    assert len(set(METHOD_LABELS.values())) == 28
    assert method_label("late_multi_step") == "“Late” multi-step"
    assert method_label("my_method") == "my_method"
