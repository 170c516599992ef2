"""Checkpoints that are whole whatever is killed, and that are not read if bytes in them differ."""

import io
import os
import signal
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from networks_for_tests import tiny_body
from torch.serialization import set_crc32_options
from trainers import PLAIN, ToyData, quiet_trainer

from robust_flatness.functional.checks import check_archive
from robust_flatness.lightning_modules import AT, External, load_checkpoint
from robust_flatness.run_folder.checkpoint_io import AtomicCheckpointIO


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A temporary folder of its own, on another file system if this machine has one."""
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK) else tmp_path.parent
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


def content(value: float) -> dict:
    return {"state_dict": {"weight": torch.full((1_000_000,), value)}, "epoch": int(value)}


def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    path, saver = tmp_path / "last.ckpt", AtomicCheckpointIO(tmp_path)
    (tmp_path / "best.ckpt.tmp").touch()
    saver.save_checkpoint(content(0), path)
    for kill in range(12):
        if (child := os.fork()) == 0:
            try:
                for value in range(kill + 1, 10_000):
                    saver.save_checkpoint(content(value), path)
            finally:
                os._exit(1)
        time.sleep(0.005 + 0.004 * kill)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        check_archive("path", path)
        loaded = torch.load(path)
        assert torch.equal(
            loaded["state_dict"]["weight"], content(loaded["epoch"])["state_dict"]["weight"]
        )
    saver.save_checkpoint(content(-1), path)
    assert torch.load(path)["epoch"] == -1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Watcher:
    """Looks at a file while it is pickled, and can fail."""

    def __init__(self, path: Path, fail: bool) -> None:
        self.path, self.fail = path, fail

    def __reduce__(self):
        assert torch.load(self.path)["epoch"] == 1
        if self.fail:
            raise OSError("No space left on device")
        return OrderedDict, ()


@pytest.mark.parametrize("fail", [False, True])
def test_the_old_checkpoint_is_whole_while_the_new_one_is_written(tmp_path, fail):
    path, saver = tmp_path / "new" / "best.ckpt", AtomicCheckpointIO()
    saver.save_checkpoint(content(1), path)
    if fail:
        with pytest.raises(OSError, match="No space left"):
            saver.save_checkpoint({**content(2), "watcher": Watcher(path, fail)}, path)
    else:
        saver.save_checkpoint({**content(2), "watcher": Watcher(path, fail)}, str(path))
    assert torch.load(path)["epoch"] == (1 if fail else 2)
    assert [file.name for file in path.parent.iterdir()] == ["best.ckpt"]


def test_other_processes_files_stay_unless_the_folder_is_ours(tmp_path):
    other = tmp_path / "other.ckpt.tmp"
    other.touch()
    AtomicCheckpointIO().save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert other.exists()
    AtomicCheckpointIO(tmp_path).save_checkpoint(content(1), tmp_path / "last.ckpt")
    assert not other.exists()


def test_remote_paths_are_lightnings(tmp_path):
    saver = AtomicCheckpointIO()
    saver.save_checkpoint(content(3), "memory://runs/last.ckpt")
    assert saver.load_checkpoint("memory://runs/last.ckpt")["epoch"] == 3
    saver.remove_checkpoint("memory://runs/last.ckpt")
    saver.save_checkpoint(content(4), f"file://{tmp_path}/last.ckpt")
    assert saver.load_checkpoint(f"file://{tmp_path}/last.ckpt")["epoch"] == 4
    with pytest.raises(FileNotFoundError):
        saver.load_checkpoint(tmp_path / "none.ckpt")


def test_a_trainer_never_removes_best_before_there_is_another(tmp_path, monkeypatch):
    removed: list[str] = []
    monkeypatch.setattr(AtomicCheckpointIO, "remove_checkpoint", lambda self, p: removed.append(p))
    keep = ModelCheckpoint(
        tmp_path, "best", monitor="train/loss", mode="min", enable_version_counter=False
    )
    trainer = quiet_trainer(
        max_epochs=4, callbacks=[keep], plugins=[AtomicCheckpointIO()], enable_checkpointing=True
    )
    trainer.fit(AT(network=tiny_body, **PLAIN), ToyData())
    assert ([file.name for file in tmp_path.iterdir()], removed) == (["best.ckpt"], [])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of two epochs."""
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(AT(network=tiny_body, **PLAIN), ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def flip(path: Path, where: float) -> None:
    """Flips a bit in the weights, which lie in the middle of the archive."""
    damaged = bytearray(path.read_bytes())
    damaged[int(where * len(damaged))] ^= 64
    path.write_bytes(damaged)


def weight_bytes(path: Path) -> float:
    """Where the largest tensor of a checkpoint lies, as a share of the file."""
    tensors = torch.load(path)["state_dict"].values()
    bytes_of = max(tensors, key=torch.Tensor.numel).numpy().tobytes()
    return (path.read_bytes().index(bytes_of) + 3) / path.stat().st_size


def fit_from(path: Path) -> None:
    trainer = quiet_trainer(max_epochs=3, plugins=[AtomicCheckpointIO()])
    trainer.fit(AT(network=tiny_body, **PLAIN), ToyData(), ckpt_path=str(path))


READERS = {
    "fit": fit_from,
    "load_checkpoint": lambda path: load_checkpoint(path, network=tiny_body),
    "External": lambda path: External(AT(network=tiny_body, **PLAIN), str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_flipped_bytes_are_refused_wherever_a_checkpoint_is_read(saved, reader):
    READERS[reader](saved)
    flip(saved, weight_bytes(saved))
    torch.load(saved)  # reads other weights without a word
    with pytest.raises(ValueError, match=r"undamaged checkpoint but .*last.ckpt the checksum of"):
        READERS[reader](saved)


def test_flipped_bytes_of_a_script_are_refused(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1000, 10))
    torch.jit.trace(network, torch.zeros(1, 1000)).save(str(tmp_path / "a.ts"))
    External(weights=str(tmp_path / "a.ts"))
    flip(tmp_path / "a.ts", 0.5)
    with pytest.raises(ValueError, match="Expected `weights` to be an undamaged checkpoint"):
        External(weights=str(tmp_path / "a.ts"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["legacy", "without checksums"])
def test_checkpoints_without_checksums_are_read(saved, reader, kind):
    checkpoint = torch.load(saved)
    set_crc32_options(kind == "legacy")
    try:
        torch.save(checkpoint, saved, _use_new_zipfile_serialization=kind != "legacy")
    finally:
        set_crc32_options(True)
    READERS[reader](saved)


def test_any_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    buffer, path = io.BytesIO(), tmp_path / "a.ckpt"
    weight = torch.arange(40.0)
    torch.save({"weight": weight, "epoch": 3}, buffer)
    whole, refused = buffer.getvalue(), 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            check_archive("path", path)
            loaded = torch.load(path)
        except Exception:
            refused += 1
        else:
            assert loaded["epoch"] == 3
            assert torch.equal(loaded["weight"], weight)
    assert refused > len(whole) / 20


def test_a_tensor_that_is_marked_as_a_folder_is_refused(saved):
    damaged = bytearray(saved.read_bytes())
    damaged[damaged.rindex(b"PK\1\2", 0, damaged.rindex(b"/data/0")) + 38] ^= 16
    saved.write_bytes(damaged)
    torch.load(saved)
    with pytest.raises(ValueError, match="the checksum of .*/data/0 differs"):
        fit_from(saved)


def test_half_a_checkpoint_is_one_sentence(saved):
    saved.write_bytes(saved.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match="undamaged checkpoint but .*last.ckpt is no whole archive"
    ):
        fit_from(saved)


def test_plugins_of_lightning_still_take_its_place():
    for plugin in (TorchCheckpointIO(), AsyncCheckpointIO()):
        assert quiet_trainer(plugins=[plugin]).strategy.checkpoint_io is plugin
