"""Every benchmark runs to its end at the smallest size."""

import importlib
import json
import re

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from robust_flatness.cli import main

ONCE = ["--rounds=1"]
WITHOUT = "--without=[autoattack,wandb,final,flatness,train_flatness,trajectory]"
SMALL = ["--width=2", "--digits_batch=2", "--steps=1"]
COMMANDS = {
    "crafting": [*SMALL, "--batches", "2"],
    "flatness": [*SMALL, "--batch=2", "--directions=1"],
    "speed": ["--width=2", "--steps=1", "--batches", "2"],
    "data": ["--images=16", "--batch=8"],
    "overhead": ["--steps=4"],
    "epoch": ["--images=8", "--batch=4", "--width=2"],
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
    # A clean forward for the attack, and the objective on clean and adversarial images, twice.
    assert passes["trades_awp"] == (8, 6)
    assert costs["at"]["relative"] == 1.0
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert "| trades_awp |" in capsys.readouterr().out


@pytest.mark.slow
def test_all_that_a_gpu_is_asked_for(command, tmp_path, capsys):
    for number in range(48):
        folder = tmp_path / "images" / ("test" if number < 24 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
        to_pil_image(pixels).save(folder / f"{number}.png")
    file = tmp_path / "gpu.json"
    small = ["--steps=1", "--warm_up=1", "--width=2", "--batch=8", "--measured=8"]
    short = ["--measure_steps=1", "--no_compile", "--images", str(tmp_path / "images")]
    command("gpu", [str(file), "--device=cpu", *small, *short, "--epochs=2"])
    found = json.loads(file.read_text())
    assert len(found["seconds_a_step"]) == 6
    assert all(seconds[0] > 0 for seconds in found["seconds_a_step"].values())
    # On a CPU `fast` changes nothing, so its value is that of float32.
    fast, plain = (found["measures"]["robust_loss"][way]["value"] for way in ("fast", "float32"))
    assert fast == plain > 0
    assert [row["epoch"] for row in found["training"]["trajectory"]] == [0, 1]
    assert "flatness/average/test" in found["training"]["trajectory"][-1]
    assert found["training"]["paper"]["method"] == "at"
    assert len(found["goals"]) == 5
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.slow
def test_scaling_compares_one_process_and_two(command, capsys):
    tiny = ["--images=16", "--batch=8", "--width=2", "--epochs=1", "--attacked=4"]
    command("scaling", tiny)
    printed = capsys.readouterr().out
    assert printed.count("| 1 process |") == printed.count("| 2 processes |") == 3


@pytest.mark.slow
def test_autoattack_by_three(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchattacks")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_epochs=1", "--data.num_train=64", "--model.steps=1"]
    quiet = ["--trainer.enable_progress_bar=false"]
    main(["fit", "--model=AT", "--data=Digits", "--folder=run", *short, *quiet, WITHOUT])
    command("autoattack", ["run", "--images=2"])
    printed = capsys.readouterr().out
    assert len(set(re.findall(r"\| ([\d.]+ %) \|", printed))) == 1
    assert printed.count(" % |") == 4
