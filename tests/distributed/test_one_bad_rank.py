"""What one process refuses is refused by all, and none waits for another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "one_bad_rank.py"
WAIT = 60


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes raised; the wait of one for the other ends in a timeout."""
    folder = tmp_path_factory.mktemp("bad")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    command = [sys.executable, str(SCRIPT), str(folder)]
    options = {"check": True, "timeout": 4 * WAIT, "cwd": folder, "capture_output": True}
    subprocess.run(command, env=environment, **options)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "bad", "kind", "message"),
    [
        ("pixel", 1, "ValueError", "Expected `images` to have pixels in [0, 1] but got [0"),
        ("label", 0, "ValueError", "Expected `labels` to be >= 0 and below the 10 classes but"),
        ("broken", 0, "OSError", "The disk is gone."),
        ("unreadable", 0, "FileNotFoundError", "There is no such folder."),
    ],
)
def test_all_processes_raise_what_one_of_them_refuses(ranks, case, bad, kind, message):
    for rank, found in enumerate(ranks):
        name, text, seconds, steps = found[case]
        assert text.startswith(message)
        assert name == (kind if rank == bad else "ValueError")
        assert text.endswith(f" This was on process {bad}.") == (rank != bad)
        assert seconds < WAIT
        assert steps == 0


def test_all_processes_refuse_other_measured_images_on_one_of_them(ranks):
    for found in ranks:
        name, text, seconds, steps = found["measured"]
        assert (name, steps) == ("ValueError", 0)
        assert text.startswith("Expected all ranks to measure the same images but")
        assert seconds < WAIT
