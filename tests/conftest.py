"""Fixtures for all tests."""

import logging
import os
import sys

import lightning.pytorch
import pytest
import torch

# Nothing in a test may reach for an account or the network.
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")
logging.getLogger(lightning.pytorch.__name__).setLevel(logging.WARNING)
# The tests' tensors are tiny: more threads only wait for each other.
torch.set_num_threads(1)
sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds the test and hides pytest's own arguments from LightningCLI."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
