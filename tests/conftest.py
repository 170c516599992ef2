"""Fixtures for all tests."""

import logging
import os
import sys
import tempfile

import lightning.pytorch
import pytest
import torch

# Nothing in a test may reach for an account or the network.
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")
# W&B's tables and artifacts wait for their upload there, by default below the home folder.
os.environ.setdefault("WANDB_DATA_DIR", tempfile.mkdtemp(prefix="wandb-"))
logging.getLogger(lightning.pytorch.__name__).setLevel(logging.WARNING)
# The tests' tensors are tiny: more threads only wait for each other. Lightning's DDP sets the
# number of threads unless this variable does, and a forked process waits forever for threads of its
# parent.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
sys.path.insert(0, os.path.dirname(__file__))
# Its scripts import each other by name, as scripts do.
sys.path.insert(1, os.path.join(os.path.dirname(__file__), "soak"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: started last, one would leave the other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds the test and hides pytest's own arguments from LightningCLI."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["cli.py"])


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the CPU count as a device with bfloat16, which it computes slowly but truly."""
    monkeypatch.setattr("robust_flatness.functional.attack.has_bfloat16", lambda device: True)
