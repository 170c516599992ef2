"""The variant that docs/variants.md adds, run as a reader would."""

import json
import re
import sys
from pathlib import Path

import pytest

from robust_flatness.cli import main

DOCS = Path(__file__).parent.parent / "docs" / "variants.md"


def test_the_documented_variant_trains_from_the_command_line(tmp_path, monkeypatch):
    text = DOCS.read_text().split("## A variant of your own")[1]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```\npython cli.py (.*?)\n```", text)
    assert len(code.splitlines()) < 30
    (tmp_path / "logit_pairing.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "logit_pairing", None)
    del sys.modules["logit_pairing"]
    light = ["--final.steps=1", "--final.restarts=1", "--final.num_perturbations=1"]
    without = "--without=[autoattack,wandb,flatness,train_flatness,early_stopping]"
    root = f"--trainer.default_root_dir={tmp_path}"
    main([*command.split(), "--trainer.max_epochs=1", root, without, *light])
    results = json.loads((tmp_path / "LogitPairingAWP-Digits-s0" / "results.json").read_text())
    row = results["trajectory"][0]
    assert row["train/pairing"] > 0
    assert row["awp/relative_norm_max"] == pytest.approx(0.01, rel=1e-4)
    assert row["label_noise/changed"] == pytest.approx(0.18, abs=0.08)
    # The pairing is part of what is minimised.
    assert row["train/loss"] > row["train/robust_loss"]
