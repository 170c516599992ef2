"""Promise 13: bad input ends in one sentence, before anything is trained or written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from malformed import INPUTS, Malformed

from robust_flatness.cli import main


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that refuses arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3
    assert said.startswith("error: ")
    return said


def left() -> list[Path]:
    """The files that are there, and the run folders."""
    return [path for path in Path().rglob("*") if path.is_file() or path.parent.name == "runs"]


@pytest.mark.parametrize("malformed", INPUTS, ids=lambda malformed: malformed.label)
def test_malformed_input_is_one_sentence(malformed: Malformed, capsys, monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("Weights & Biases was opened.")

    monkeypatch.setattr("wandb.init", started)
    monkeypatch.setattr("robust_flatness.cli.CLI._run_subcommand", started)
    for name, content in malformed.files.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    quiet = ["--without=wandb"] if malformed.arguments[0] == "fit" else []
    said = refused([malformed.arguments[0], *quiet, *malformed.arguments[1:]], capsys)
    assert malformed.names in said
    assert {str(path) for path in left()} == set(malformed.files)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE", "WANDB_MODE"])
def test_the_environment_is_checked_before_lightning_reads_it(name):
    ended = subprocess.run(
        [sys.executable, "-m", "robust_flatness.cli", "fit"],
        env={name: "abc", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: Expected the environment's {name} to be ")
    assert len(ended.stderr.splitlines()) == 1


def test_sharded_weights_are_refused_before_training(capsys, monkeypatch):
    # FSDP and DeepSpeed need GPUs.
    monkeypatch.setattr("robust_flatness.functional.checks.SHARDED", ("SingleDeviceStrategy",))
    said = refused(["fit", "--model=AT", "--data=Digits"], capsys)
    assert re.search(r"such as ddp, for \w+ but got SingleDeviceStrategy\.", said)
    assert left() == []
