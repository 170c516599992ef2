"""Every benchmark runs to its end at the smallest size."""

import importlib
import json
import re

import pytest
import torch

ONCE = ["--rounds=1"]
SMALL = ["--width=2", "--digits_batch=2", "--steps=1"]
COMMANDS = {
    "crafting": [*SMALL, "--batches", "2"],
    "flatness": [*SMALL, "--batch=2", "--directions=1"],
    "speed": ["--width=2", "--steps=1", "--batches", "2"],
    "data": ["--images=16", "--batch=8"],
    "overhead": ["--steps=4"],
}


@pytest.fixture
def command(monkeypatch, pytestconfig):
    """Runs a benchmark in this process and gives its module's `main`."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    threads = torch.get_num_threads()
    yield lambda name, arguments: importlib.import_module(name).main([*ONCE, *arguments])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", COMMANDS)
def test_prints_a_table_and_its_setting(name, command, capsys):
    if name == "crafting":
        pytest.importorskip("torchattacks")
    command(name, COMMANDS[name])
    printed = capsys.readouterr().out
    assert re.search(r"20\d\d-\d\d-\d\d, .+ threads, torch .+, lightning ", printed)
    assert printed.count("1 rounds") >= 1
    assert "nan" not in printed


@pytest.mark.slow
def test_a_step_of_each_row_with_its_passes(command, tmp_path, capsys):
    file = tmp_path / "costs.json"
    rows = ["at", "at_awp", "trades_awp"]
    tiny = ["--epochs=1", "--model.steps=2", "--model.network.width=2", "--data.num_train=64"]
    command("steps", ["--rows", *rows, "--write", str(file), *tiny])
    costs = json.loads(file.read_text())
    passes = {row: (cost["forwards"], cost["backwards"]) for row, cost in costs.items()}
    # Best iterate: one forward more than steps; then the objective, with AWP twice.
    assert passes["at"] == (4, 3)
    assert passes["at_awp"] == (5, 4)
    assert passes["trades_awp"][0] > passes["at_awp"][0]
    assert costs["at"]["relative"] == 1.0
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert "| trades_awp |" in capsys.readouterr().out
