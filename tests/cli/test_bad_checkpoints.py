"""What is no checkpoint to go on from is refused in one sentence; typed options win over one."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from malformed_checkpoints import CHECKPOINTS, RUN_CONFIGS
from test_bad_inputs import refused

from robust_flatness.cli import CLI, main

TINY = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
    "--data.num_train=32",
    "--data.batch_size=16",
    "--model.network.width=4",
    "--model.steps=1",
    "--trainer.enable_progress_bar=false",
    "--without=[wandb,final,autoattack,evaluation,train_evaluation,flatness,train_flatness,"
    "early_stopping,trajectory]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        main(["fit", *TINY])
        return Path("runs/AT-Digits-s0").resolve()


@pytest.fixture(autouse=True)
def _copied(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    shutil.copytree(run, tmp_path / "runs" / run.name)
    shutil.copy(run / "checkpoints" / "last.ckpt", "moved.ckpt")


LAST = "runs/AT-Digits-s0/checkpoints/last.ckpt"


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def built(*arguments: str, monkeypatch) -> CLI:
    """The command line, which has built everything and stopped there."""
    kept = []
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, subcommand: kept.append(self))
    main(list(arguments))
    return kept[0]


@pytest.mark.parametrize("broken", CHECKPOINTS)
def test_a_broken_checkpoint_is_one_sentence(broken, capsys):
    change, names = CHECKPOINTS[broken]
    place = LAST if "weight" in broken else "moved.ckpt"
    torch.save(change(torch.load(place, weights_only=True)), place)
    before = files()
    assert names in refused(["fit", *TINY, f"--ckpt_path={place}"], capsys)
    assert files() == before
    assert [path.name for path in Path("runs").iterdir()] == ["AT-Digits-s0"]


@pytest.mark.parametrize("broken", RUN_CONFIGS)
def test_a_broken_config_of_a_run_is_one_sentence(broken, capsys):
    change, names = RUN_CONFIGS[broken]
    file = Path("runs/AT-Digits-s0/config.yaml")
    content = change(yaml.safe_load(file.read_text()))
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    assert names in refused(["test", f"--ckpt_path={LAST}"], capsys)


def test_a_broken_table_of_a_run_is_one_sentence(capsys):
    table = Path("runs/AT-Digits-s0/metrics.csv")
    table.write_bytes(b"\xfe\xff\x00")
    said = refused(["fit", f"--ckpt_path={LAST}"], capsys)
    assert "metrics.csv` to be a table" in said
    assert table.read_bytes() == b"\xfe\xff\x00"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--name=other", "`--name` to be that of the run that goes on, None, but got other"),
        ("--folder=other", "`--folder`"),
        ("--seed_everything=5", "`--seed_everything` to be that of the run that goes on, 0, but"),
        ("--model.num_classes=5", "`--model.num_classes` to be 10, as in Digits, but got 5"),
        ("--config={name: other}", "`--name`"),
        ("--trainer.max_epochs=1", "`--trainer.max_epochs` to be >= 2"),
        ("--model=ATAWP", "`--model` to be AT, which wrote the checkpoint"),
    ],
)
def test_what_a_run_that_goes_on_cannot_change_is_refused(typed, named, capsys):
    before = files()
    assert named in refused(["fit", f"--ckpt_path={LAST}", typed], capsys)
    assert files() == before


def test_what_is_typed_as_it_was_is_taken(monkeypatch):
    same = ["--seed_everything=0", "--folder=runs/AT-Digits-s0", "--model.num_classes=10"]
    resumed = built("fit", f"--ckpt_path={LAST}", *same, monkeypatch=monkeypatch)
    assert resumed.trainer.log_dir == str(Path("runs/AT-Digits-s0").resolve())


@pytest.mark.parametrize("place", ["moved.ckpt", LAST])
@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_typed_options_win_over_a_checkpoint(place, subcommand, tmp_path, monkeypatch):
    mine = ["--config={model: {init_args: {keep: last}}}", "--model.eps=0.05"]
    model = built(subcommand, f"--ckpt_path={place}", *mine, monkeypatch=monkeypatch).model
    assert model.pgd.eps == 0.05
    assert model.pgd.keep == "last"
    # What nobody typed is the checkpoint's.
    assert model.pgd.steps == 1
    assert model.hparams["network"]["init_args"]["width"] == 4


def test_another_network_than_the_checkpoints_is_refused(capsys):
    wider = ["test", "--ckpt_path=moved.ckpt", "--model.network.width=8"]
    assert "and the model has" in refused(wider, capsys)


def test_a_file_names_the_checkpoint_as_an_option_does(monkeypatch):
    Path("mine.yaml").write_text(f"ckpt_path: {LAST}")
    resumed = built("fit", "--config=mine.yaml", monkeypatch=monkeypatch)
    assert resumed.trainer.max_epochs == 2
    assert resumed.model.pgd.steps == 1
