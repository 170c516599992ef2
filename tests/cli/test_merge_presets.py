import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_flatness.cli import main
from robust_flatness.command_line.files import CONFIGS, run_folder_of
from robust_flatness.command_line.presets import merge_presets


def merged(*arguments: str) -> dict:
    return merge_presets(arguments).merged


def typed(*arguments: str) -> list[str]:
    return [part for option in merge_presets(arguments).typed for part in option.arguments]


def class_of(config: dict, key: str) -> str:
    return config[key]["class_path"].rsplit(".", 1)[-1]


@pytest.mark.parametrize(
    ("arguments", "model", "data"),
    [
        ([], "AT", "Digits"),
        (["--model", "ATAWP", "--data=CIFAR10"], "ATAWP", "CIFAR10"),
        (["--config={data: CIFAR10, model: {class_path: ATAWP}}"], "ATAWP", "CIFAR10"),
        (["--config={model: ATAWP}", "--model", "AT"], "AT", "Digits"),
    ],
)
def test_default_classes_are_named_if_nobody_chooses(arguments, model, data):
    presets = merge_presets(arguments)
    assert class_of(presets.merged, "model") == model
    assert class_of(presets.merged, "data") == data
    assert presets.typed == []
    # jsonargparse keeps arguments of a class that is replaced.
    assert class_of(presets.layers[0], "model") == model
    assert not any("class_path" in layer.get("model", {}) for layer in presets.layers[1:])


@given(st.permutations(["--model", "--data.num_train", "--trainer.max_epochs", "--model.xi"]))
@settings(max_examples=24, deadline=None)
def test_order_does_not_matter(names):
    values = {
        "--model": "ATAWP",
        "--data.num_train": "9",
        "--trainer.max_epochs": "3",
        "--model.xi": "0.02",
    }
    presets = merge_presets([part for name in names for part in (name, values[name])])
    assert class_of(presets.merged, "model") == "ATAWP"
    pairs = dict(option.arguments for option in presets.typed)
    assert pairs == {name: value for name, value in values.items() if name != "--model"}


def test_outer_arguments_of_model_come_before_inner_ones():
    arguments = typed("--model.optimizer.lr=8", "--model.optimizer", "Adam")
    assert arguments == ["--model.optimizer", "Adam", "--model.optimizer.lr=8"]


def test_lists_of_callbacks_keep_their_order():
    arguments = [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=a",
        "--trainer.callbacks+=Timer",
        "--model.eps",
        "-1",
    ]
    assert typed(*arguments) == ["--model.eps", "-1", *arguments[:3]]


def test_later_layers_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("data: CIFAR10\nmodel: {init_args: {eps: 0.1, steps: 3}}\n")
    second.write_text("model: {class_path: ATAWP, init_args: {eps: 8/255}}\n")
    config = merged("--config", str(first), f"-c={second}")
    assert class_of(config, "model") == "ATAWP"
    assert config["model"]["init_args"] == {"eps": "8/255", "steps": 3}
    assert class_of(config, "data") == "CIFAR10"


def test_presets_belong_to_their_data_and_stay_below_the_users_file():
    assert merged()["model"]["init_args"]["eps"] == 0.2
    assert "init_args" not in merged("--data", "CIFAR10")["model"]
    config = merged("--config={model: {init_args: {eps: 0.1}}}")
    assert config["model"]["init_args"]["eps"] == 0.1
    assert config["model"]["init_args"]["network"]["init_args"]["width"] == 16


@pytest.mark.parametrize("arguments", [["--config={model: {init_args: {network: ResNet18}}}"],
                                       ["--model.network=ResNet18"]])  # fmt: skip
def test_another_network_does_not_inherit_the_presets_arguments(arguments):
    network = merged(*arguments)["model"]["init_args"]["network"]
    assert class_of({"network": network}, "network") == "ResNet18"
    assert network["init_args"]["width"] == 64


def test_a_checkpoint_brings_the_settings_of_its_run(tmp_path):
    folder = tmp_path / "runs" / "ATAWP-CIFAR10-s3"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.touch()
    assert run_folder_of(str(checkpoint)) is None
    (folder / "config.yaml").write_text(
        "model: {class_path: robust_flatness.lightning_modules.ATAWP, init_args: {xi: 0.5}}\n"
        "data: {class_path: robust_flatness.datamodules.CIFAR10}\nseed_everything: 3\n"
        "ckpt_path: null\n"
    )
    assert run_folder_of(str(checkpoint)) == folder.resolve()
    config = merged("--ckpt_path", str(checkpoint), "--model", "ATAWP")
    assert config["model"]["init_args"] == {"xi": 0.5}
    assert class_of(config, "data") == "CIFAR10"
    assert config["seed_everything"] == 3
    assert "ckpt_path" not in config
    assert typed("--ckpt_path", str(checkpoint)) == ["--ckpt_path", str(checkpoint)]


def epochs(*arguments: str) -> int | None:
    return merged(*arguments)["trainer"]["max_epochs"]


def test_a_share_of_the_epochs_that_the_layers_below_ask_for():
    share = "--config={epochs_share: 0.4}"
    assert epochs(share) == 24  # Digits' preset has 60
    assert epochs(share, "--data=CIFAR10") == 60  # defaults.yaml has 150
    assert epochs("--config={trainer: {max_epochs: 10}}", share) == 4
    assert epochs(share, "--config={trainer: {max_epochs: 10}}") == 10
    # Shares multiply; and one epoch is the least.
    assert epochs(share, "--config={epochs_share: 0.5}") == 12
    assert epochs("--epochs_share=0.25", share) == 6
    assert epochs("--epochs_share", "0.001") == 1
    assert epochs("--config={on_data: {Digits: {epochs_share: 2}}}") == 120
    assert "epochs_share" not in merged(share)


def run_on(folder, **threat_model) -> str:
    """The option that goes on with a run of 32 epochs in L2, in the form of its config.yaml."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    model = {"eps": 0.1, "norm": "l2"}
    config = {
        "trainer": {"max_epochs": 32},
        "model": {"class_path": "robust_flatness.lightning_modules.AT", "init_args": model},
        "data": {"class_path": "robust_flatness.datamodules.Digits", "init_args": {"eps": 0.1}},
        "flatness": {"eps": 0.05, "norm": "linf"},
        "worst_flatness": None,
        **threat_model,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return f"--ckpt_path={folder}/checkpoints/last.ckpt"


def test_a_resumed_run_has_its_share_already(tmp_path):
    checkpoint = run_on(tmp_path)
    assert epochs(checkpoint, "--config={epochs_share: 0.4}") == 32
    with pytest.raises(ValueError, match="no `--epochs_share` for a run that goes on"):
        merged(checkpoint, "--epochs_share=2")


def test_what_a_file_says_on_one_data_set_is_for_that_one():
    special = "on_data: {CIFAR10: {model: {init_args: {lam: 2}}}}"
    file = f"--config={{model: {{init_args: {{lam: 1}}}}, {special}}}"
    for data, lam in (("CIFAR10", 2), ("Digits", 1)):
        config = merged(file, f"--data={data}")
        assert config["model"]["init_args"]["lam"] == lam
        assert "on_data" not in config
    later = "--config={model: {init_args: {lam: 3}}}"
    assert merged(file, later, "--data=CIFAR10")["model"]["init_args"]["lam"] == 3


def test_a_preset_of_the_package_has_overlays_for_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clipping = "--config=table1/weight_clipping.yaml"
    assert merged(clipping)["weight_clipping"] == {"w_max": 0.04}
    assert merged(clipping, "--data=CIFAR10")["weight_clipping"] == {"w_max": 0.005}
    later = "--config={weight_clipping: {w_max: 1}}"
    assert merged(clipping, later)["weight_clipping"] == {"w_max": 1}
    with monkeypatch.context() as patch:
        patch.chdir(CONFIGS.parent)
        config = merged("--config=configs/table1/weight_clipping.yaml")
    assert config["weight_clipping"] == {"w_max": 0.04}
    # A file of the user's own has none.
    (tmp_path / "weight_clipping.yaml").write_text("weight_clipping: {w_max: 2}")
    assert merged("--config=weight_clipping.yaml")["weight_clipping"] == {"w_max": 2}


def test_a_preset_of_the_package_has_overlays_for_an_earlier_one():
    small, clipping = "--config=cifar10_small.yaml", "--config=table1/weight_clipping.yaml"
    assert merged(small, clipping)["weight_clipping"] == {"w_max": 0.02}
    assert merged(clipping, small, "--data=CIFAR10")["weight_clipping"] == {"w_max": 0.005}
    assert merged(small, clipping, "--data=Digits")["weight_clipping"] == {"w_max": 0.02}


def test_presets_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("table1/trades", "table1/trades.yaml", "configs/table1/trades.yaml"):
        config = merged("--config", name)
        assert class_of(config, "model") == "TRADES"
        assert config["model"]["init_args"]["lam"] == 6.0
    # A file of the user's own goes before one of that name in the package.
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "trades.yaml").write_text("name: mine")
    assert merged("--config=table1/trades.yaml")["name"] == "mine"


MEASURES = ("evaluation", "train_evaluation", "flatness", "train_flatness", "early_stopping")
MEASURES += ("final", "autoattack")


def places(config: dict, name: str) -> dict:
    """Where a merged configuration sets `eps` or `norm`."""
    parts = {key: config.get(key) or {} for key in (*MEASURES, "worst_flatness")}
    parts |= {key: config[key].get("init_args", {}) for key in ("model", "data")}
    return {key: part[name] for key, part in parts.items() if name in part}


@pytest.mark.parametrize(
    "arguments",
    [["--eps=1/4", "--norm=l2"], ["--config={norm: l2, eps: 0.25}"],
     ["--config={eps: 0.1}", "--norm", "l2", "--config={eps: 0.3}", "--eps", "0.25"]],
)  # fmt: skip
def test_one_option_sets_a_radius_or_norm_for_training_and_all_measures(arguments):
    config = merged(*arguments)
    assert places(config, "eps") == {"model": 0.25, "data": 0.25}
    assert places(config, "norm") == dict.fromkeys(("model", *MEASURES), "l2")
    # A measure that is off stays off.
    assert "worst_flatness" not in config
    config = merged(*arguments, "--worst_flatness={num_examples: 8}")
    assert config["worst_flatness"] == {"norm": "l2"}


@pytest.mark.parametrize(
    ("arguments", "eps"),
    [
        (["--model.eps=0.1", "--eps=0.3"], {"model": 0.1, "data": 0.3}),
        (["--config={model: {init_args: {eps: 0.1}}}", "--eps=0.3"], {"model": 0.1, "data": 0.3}),
        (["--config={flatness: {eps: 0.1}}", "--config={eps: 0.3}"],
         {"flatness": 0.1, "model": 0.3, "data": 0.3}),
        (["--config={eps: 0.3}", "--flatness={eps: 0.1}"],
         {"flatness": 0.1, "model": 0.3, "data": 0.3}),
        (["--data.eps=0.1"], {"model": 0.2, "data": 0.1}),
    ],
)  # fmt: skip
def test_a_specific_radius_wins_from_any_source(arguments, eps, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    found = places(yaml.safe_load(capsys.readouterr().out), "eps")
    assert {key: value for key, value in found.items() if value is not None} == eps


def test_a_typed_radius_wins_over_a_run_but_what_was_specific_there_stays(tmp_path):
    checkpoint = run_on(tmp_path, eps=0.1, norm="l2")
    before = {"model": 0.1, "data": 0.1, "flatness": 0.05}
    assert places(merged(checkpoint), "eps") == before
    config = merged(checkpoint, "--eps=0.3", "--norm=linf")
    assert places(config, "eps") == {"model": 0.3, "data": 0.3, "flatness": 0.05}
    assert set(places(config, "norm").values()) == {"linf"}


def test_a_typed_radius_wins_over_a_run_of_an_earlier_version(tmp_path):
    config = merged(run_on(tmp_path), "--eps=0.3")
    assert places(config, "eps") == {"model": 0.3, "data": 0.3, "flatness": 0.05}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model=ATAPW", "`--model` to be one of AT, ATAWP.* but got ATAPW"),
        ("--data=Digit", "`--data` to be one of CIFAR10, CIFAR100, Digits"),
        ("--config=nowhere.yaml", "`--config` to be a YAML file but got nowhere.yaml"),
        ("--config={model: [}", "to be YAML"),
        ("--config=table1/nothing.yaml", "to be a YAML file but got table1/nothing.yaml"),
        ("--epochs_share=-1", "`--epochs_share` to be a number > 0 but got -1"),
        ("--epochs_share=0", "`--epochs_share` to be a number > 0 but got 0"),
        ("--config={epochs_share: half}", "`--epochs_share` to be a number > 0 but got half"),
        ("--config={on_data: null}", "`on_data` to hold mappings .* but got None"),
        ("--config={on_data: {Digits: 3}}", "`on_data` to hold mappings"),
        ("--config={on_data: {digits: {}}}", "`on_data` to hold mappings by CIFAR10"),
        ("--eps=x", "`--eps` to be a number or a fraction such as 8/255 but got x"),
        ("--config={norm: l1}", "`--norm` to be .* but got '?l1"),
    ],
)
def test_bad_files_classes_and_values_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        merged(argument)
