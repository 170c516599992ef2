"""How the command line writes and reads checkpoints."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from robust_flatness.cli import CLI, main
from robust_flatness.run_folder.checkpoint_io import AtomicCheckpointIO

SHORT = ["--data.num_train=64", "--model.network.width=4", "--model.steps=1", "--model=AT"]
SHORT += ["--trainer.enable_progress_bar=false", "--early_stopping.num_examples=8"]
SHORT += [
    "--without=[wandb,evaluation,train_evaluation,flatness,train_flatness,final,autoattack]",
    "--trainer.accelerator=cpu",
]
FOLDER = Path("runs/AT-Digits-s0/checkpoints")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def used(monkeypatch, *arguments: str) -> TorchCheckpointIO:
    """What would write the checkpoints of a run."""
    made = []
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, _: made.append(self.trainer))
    main(["fit", *SHORT, *arguments])
    return made[0].strategy.checkpoint_io


def test_checkpoints_are_written_atomically_unless_the_user_has_a_plugin(monkeypatch):
    assert type(used(monkeypatch)) is AtomicCheckpointIO
    plugin = "--trainer.plugins=lightning.pytorch.plugins.io.TorchCheckpointIO"
    assert type(used(monkeypatch, plugin)) is TorchCheckpointIO
    assert type(used(monkeypatch, "--trainer.fast_dev_run=true")) is AtomicCheckpointIO


def test_what_a_kill_left_is_gone_after_the_run_went_on_and_bad_bytes_are_refused(capsys):
    main(["fit", *SHORT, "--trainer.max_epochs=1"])
    for name in ("best", "last"):
        (FOLDER / f"{name}.ckpt.tmp").write_bytes(b"PK half")
    last = FOLDER / "last.ckpt"
    main(["test", *SHORT, f"--ckpt_path={last}"])
    # Another process may be training there.
    assert (FOLDER / "best.ckpt.tmp").exists()
    main(["fit", *SHORT, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    assert {path.name for path in FOLDER.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert torch.load(last)["epoch"] == 1
    weights = max(torch.load(last)["state_dict"].values(), key=torch.Tensor.numel)
    whole = last.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(weights.numpy().tobytes()) + 3] ^= 64
    last.write_bytes(damaged)
    capsys.readouterr()
    for command in ("fit", "test"):
        with pytest.raises(SystemExit) as stopped:
            main([command, *SHORT, f"--ckpt_path={last}"])
        assert stopped.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "Expected `--ckpt_path` to be an undamaged checkpoint but in" in said
