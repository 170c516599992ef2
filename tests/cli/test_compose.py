import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_flatness.command_line.compose import compose, run_folder_of

KNOWN = {
    "model": {"AT": "pkg.AT", "ATAWP": "pkg.ATAWP"},
    "data": {"Digits": "pkg.Digits", "CIFAR10": "pkg.CIFAR10", "ImageFolder": "pkg.ImageFolder"},
}


def composed(*arguments: str) -> tuple[dict, list[str]]:
    subcommand, flag, content, *typed = compose(["fit", *arguments], KNOWN)
    assert (subcommand, flag) == ("fit", "--config")
    return yaml.safe_load(content), typed


def test_default_classes_are_named_only_where_nobody_chose():
    config, _ = composed()
    assert config["model"]["class_path"] == "pkg.AT"
    assert config["data"]["class_path"] == "pkg.Digits"
    config, typed = composed("--model", "ATAWP", "--data=CIFAR10")
    assert config["model"]["class_path"] == "pkg.ATAWP"
    assert config["data"]["class_path"] == "pkg.CIFAR10"
    assert typed == []


@given(st.permutations(["--model", "--data.root", "--trainer.max_epochs", "--model.xi"]))
@settings(max_examples=24, deadline=None)
def test_order_does_not_matter(names):
    values = {
        "--model": "ATAWP",
        "--data.root": "x",
        "--trainer.max_epochs": "3",
        "--model.xi": "0.02",
    }
    typed = [part for name in names for part in (name, values[name])]
    config, rest = composed(*typed)
    assert config["model"]["class_path"] == "pkg.ATAWP"
    pairs = {rest[i]: rest[i + 1] for i in range(0, len(rest), 2)}
    assert pairs == {name: value for name, value in values.items() if name != "--model"}


def test_outer_arguments_of_model_come_before_inner_ones():
    _, typed = composed("--model.network.width=8", "--model.network", "SmallResNet")
    assert typed == ["--model.network", "SmallResNet", "--model.network.width=8"]


def test_lists_of_callbacks_keep_their_order():
    arguments = [
        "--trainer.callbacks+=A",
        "--trainer.callbacks.x=1",
        "--trainer.callbacks+=B",
        "--model.eps",
        "-1",
    ]
    _, typed = composed(*arguments)
    assert typed == ["--model.eps", "-1", *arguments[:3]]


def test_later_layers_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("data: CIFAR10\nmodel: {init_args: {eps: 0.1, steps: 3}}\n")
    second.write_text("model: {class_path: ATAWP, init_args: {eps: 8/255}}\n")
    config, _ = composed("--config", str(first), f"-c={second}")
    assert config["model"] == {"class_path": "pkg.ATAWP", "init_args": {"eps": "8/255", "steps": 3}}
    assert config["data"]["class_path"] == "pkg.CIFAR10"
    config, _ = composed("--config", str(second), "--model", "AT")
    assert config["model"]["class_path"] == "pkg.AT"


def test_presets_belong_to_their_data_and_stay_below_the_users_file(tmp_path):
    config, _ = composed()
    assert config["model"]["init_args"]["eps"] == 0.2
    config, _ = composed("--data", "CIFAR10")
    assert "init_args" not in config["model"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {init_args: {eps: 0.1}}\n")
    config, _ = composed("--config", str(mine))
    assert config["model"]["init_args"]["eps"] == 0.1
    assert config["model"]["init_args"]["network"]["init_args"]["width"] == 16


def test_another_network_does_not_inherit_the_presets_arguments(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {init_args: {network: {class_path: ResNet18}}}\n")
    config, _ = composed("--config", str(mine))
    assert config["model"]["init_args"]["network"] == {"class_path": "ResNet18"}


def test_a_checkpoint_brings_the_settings_of_its_run(tmp_path):
    folder = tmp_path / "runs" / "ATAWP-CIFAR10-s3"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.touch()
    assert run_folder_of(str(checkpoint)) is None
    (folder / "config.yaml").write_text(
        "model: {class_path: pkg.ATAWP, init_args: {xi: 0.5}}\ndata: {class_path: pkg.CIFAR10}\n"
        "seed_everything: 3\nckpt_path: null\n"
    )
    assert run_folder_of(str(checkpoint)) == folder.resolve()
    config, typed = composed("--ckpt_path", str(checkpoint), "--model", "ATAWP")
    assert config["model"] == {"class_path": "pkg.ATAWP", "init_args": {"xi": 0.5}}
    assert config["data"]["class_path"] == "pkg.CIFAR10"
    assert config["seed_everything"] == 3
    assert "ckpt_path" not in config
    assert typed == ["--ckpt_path", str(checkpoint)]


def test_unknown_names_and_files_are_named():
    with pytest.raises(ValueError, match="`--model` to be one of AT, ATAWP.* but got ATAPW"):
        composed("--model", "ATAPW")
    with pytest.raises(ValueError, match="`--data` to be one of CIFAR10, Digits"):
        composed("--data=Digit")
    with pytest.raises(ValueError, match="`--config` to be a YAML file but got nowhere.yaml"):
        composed("--config", "nowhere.yaml")


def epochs(*arguments: str) -> int | None:
    return composed(*arguments)[0].get("trainer", {}).get("max_epochs")


def test_a_share_of_the_epochs_that_the_layers_below_ask_for():
    share = "--config={epochs_share: 0.4}"
    assert epochs(share) == 32  # Digits' preset has 80
    assert epochs(share, "--data=CIFAR10") == 60  # defaults.yaml has 150
    assert epochs("--config={trainer: {max_epochs: 10}}", share) == 4
    assert epochs(share, "--config={trainer: {max_epochs: 10}}") == 10
    # Shares multiply; and one epoch is the least.
    assert epochs(share, "--config={epochs_share: 0.5}") == 16
    assert epochs("--epochs_share=0.25", share) == 8
    assert epochs("--epochs_share", "0.001") == 1
    for share_of_none in ("0", "-1", "half"):
        with pytest.raises(ValueError, match="`epochs_share` to be a number > 0 but got"):
            epochs(f"--epochs_share={share_of_none}")
    assert epochs("--config={on_data: {Digits: {epochs_share: 2}}}") == 160
    assert "epochs_share" not in composed(share)[0]


def test_a_resumed_run_has_its_share_already(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    config = {"trainer": {"max_epochs": 32}, "model": {"class_path": "pkg.AT"}}
    config["data"] = {"class_path": "pkg.Digits"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = f"--ckpt_path={tmp_path}/checkpoints/last.ckpt"
    assert epochs(checkpoint, "--config={epochs_share: 0.4}") == 32
    with pytest.raises(ValueError, match="no `--epochs_share` for a run that goes on"):
        composed(checkpoint, "--epochs_share=2")


def test_what_a_file_says_on_one_data_set_is_for_that_one():
    special = "on_data: {CIFAR10: {model: {init_args: {lam: 2}}}}"
    file = f"--config={{model: {{init_args: {{lam: 1}}}}, {special}}}"
    for data, lam in (("CIFAR10", 2), ("Digits", 1)):
        config, _ = composed(file, f"--data={data}")
        assert config["model"]["init_args"]["lam"] == lam
        assert "on_data" not in config
    later = "--config={model: {init_args: {lam: 3}}}"
    assert composed(file, later, "--data=CIFAR10")[0]["model"]["init_args"]["lam"] == 3


def test_presets_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {**KNOWN, "model": {**KNOWN["model"], "TRADES": "pkg.TRADES"}}
    for name in ("table1/trades", "table1/trades.yaml", "configs/table1/trades.yaml"):
        content = yaml.safe_load(compose(["fit", "--config", name], known)[2])
        assert content["model"]["class_path"] == "pkg.TRADES"
        assert content["model"]["init_args"]["lam"] == 6.0
    # A file of the user's own goes before one of that name in the package.
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "trades.yaml").write_text("name: mine")
    assert composed("--config=table1/trades.yaml")[0]["name"] == "mine"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config={model: [}", "to be YAML"),
        ("--config=table1/nothing.yaml", "to be a YAML file but got table1/nothing.yaml"),
        ("--epochs_share=-1", "`epochs_share` to be a number > 0 but got -1"),
        ("--config={epochs_share: half}", "`epochs_share` to be a number > 0 but got half"),
        ("--config={epochs_share: null}", "`epochs_share` to be a number > 0 but got None"),
        ("--config={on_data: null}", "`on_data` to hold a mapping a data set but got None"),
        ("--config={on_data: {Digits: 3}}", "`on_data` to hold a mapping a data set"),
        ("--config={on_data: {digits: {}}}", "`on_data` to name some of CIFAR10, Digits"),
    ],
)
def test_bad_files_and_shares_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        composed(argument)
