"""Fixtures for all tests."""

import os
import sys

import pytest
import torch

# Nothing in a test may reach for an account or the network.
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")
sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds the test and hides pytest's own arguments from LightningCLI."""
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
