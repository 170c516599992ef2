"""Every benchmark runs to its end at the smallest size."""

import importlib
import importlib.util
import json
import logging
import os
import re

import pytest
import torch

from robust_flatness.cli import main

SMALL = {"rounds": 1, "width": 2}
COMMANDS = {
    "attacks.crafting": {**SMALL, "batches": [2], "steps": 1},
    "attacks.flatness": {**SMALL, "batch": 2, "directions": 1, "steps": 1},
    "training.epoch": {**SMALL, "images": 8, "batch": 4},
    "training.overhead": {"rounds": 1, "count": 4},
}
TINY = ["--model.steps=2", "--model.network.width=2", "--data.num_train=128"]


@pytest.fixture
def benchmark(monkeypatch, pytestconfig):
    """Imports a benchmark."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    lightning = logging.getLogger("lightning.pytorch")
    threads, level = torch.get_num_threads(), lightning.level
    yield importlib.import_module
    torch.set_num_threads(threads)
    lightning.setLevel(level)


@pytest.mark.parametrize("name", COMMANDS)
def test_prints_a_table_and_its_setting(name, benchmark, capsys):
    script, function = name.split(".")
    if script == "attacks":
        pytest.importorskip("torchattacks")
    getattr(benchmark(script), function)(**COMMANDS[name])
    printed = capsys.readouterr().out
    assert re.search(r"20\d\d-\d\d-\d\d, .+ one thread, torch .+, lightning .+ 1 rounds", printed)
    assert re.search(r"(ours|AT without attack).* / ", printed)
    assert "nan" not in printed


@pytest.mark.slow
def test_training_callbacks_beside_atawp(benchmark, capsys):
    benchmark("training_callbacks").main([0, 1], epochs=1, width=2, images=8, restarts=1)
    lines = capsys.readouterr().out.splitlines()
    methods = [re.match(r"\| ([^|]*) \|", line) for line in lines if not line.startswith("|---")]
    assert [m[1] for m in methods[1:]] == ["clean", "callbacks", "ATAWP", "callbacks − ATAWP"]
    assert "nan" not in "".join(lines)


@pytest.mark.slow
def test_a_step_of_each_row_with_its_passes_and_the_table(benchmark, tmp_path, capsys):
    file, rows = tmp_path / "costs.json", ["at", "at_awp", "trades_awp"]
    benchmark("training").steps(rows, epochs=1, rounds=1, write=file, options=TINY)
    costs = json.loads(file.read_text())
    passes = {row: (cost["forwards"], cost["backwards"]) for row, cost in costs.items()}
    # Best iterate: one forward more than steps; then the objective, with AWP twice.
    assert passes["at"] == (4, 3)
    assert passes["at_awp"] == (5, 4)
    # A clean forward for the attack, and the objective on clean and adversarial images, twice.
    assert passes["trades_awp"] == (8, 6)
    assert costs["at"]["relative"] == 1.0
    assert all(cost["seconds"] > 0 for cost in costs.values())
    assert "trades_awp / at" in capsys.readouterr().out

    names = ["test/error", "test/robust_error", "train_eval/robust_error", "test/robust_loss"]
    names += ["flatness/average/test", "flatness/average/train"]
    for row, more in {"at": {}, "at_awp": {"awp/relative_norm_max": 0.01}}.items():
        (tmp_path / f"{row}-Digits-s0").mkdir()
        results = {"final": dict.fromkeys(names, 0.5), "early_stopped": {names[1]: 0.25}}
        results |= {
            "wall_time_seconds": 3.0,
            "trajectory": [{"epoch": 0, "train/loss": 1.5} | more],
        }
        (tmp_path / f"{row}-Digits-s0" / "results.json").write_text(json.dumps(results))
    benchmark("table1").main(tmp_path, file)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `at` | 50.0 % | 50.0 % | 50.0 % | 25.0 % | 0.50 | 0.50 | 0.50 |")
    assert lines[3].endswith("| 3 | awp/relative_norm_max 0.01, train/loss 1.5 |")
    assert len(lines) == 4


def global_flags():
    """cuDNN's benchmark mode, and TF32 in matrix products and convolutions."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return cudnn.benchmark, products.fp32_precision, cudnn.conv.fp32_precision
    return cudnn.benchmark, products.allow_tf32, cudnn.allow_tf32


@pytest.mark.slow
def test_a_gpu_file_has_all_parts_and_the_errors_of_those_that_fail(
    benchmark, tmp_path, monkeypatch, capsys
):
    gpu, file = benchmark("gpu"), tmp_path / "gpu.json"
    monkeypatch.setitem(gpu.TRAINING, "broken", {"precision": "no such", "benchmark": True})
    # Compiling and AutoAttack take a minute.
    monkeypatch.delitem(gpu.TRAINING, "AT, bfloat16, compiled")
    parts = gpu.parts

    def light(options):
        return {name: part for name, part in parts(options).items() if name != "AutoAttack"}

    monkeypatch.setattr(gpu, "parts", light)
    # Lightning's DDP sets the number of threads only without it.
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = global_flags(), {*os.environ}, torch.get_num_threads()
    gpu.main([str(file), "--device=cpu", "--tiny"])
    # With the ranks of DDP, the next trainer would wait for other processes, and with more threads,
    # a process that is forked later.
    assert (global_flags(), {*os.environ}, torch.get_num_threads()) == before
    results = json.loads(file.read_text())
    errors = {n for n, part in results.items() if isinstance(part, dict) and "error" in part}
    without = importlib.util.find_spec("torchattacks") is None
    assert errors == {"broken"} | {name for name in results if without and "torchattacks" in name}
    assert "no such" in results["broken"]["error"]
    for name in ("AT-AWP, bfloat16", "crafting, ours, best, TF32", "crafting, textbook, bfloat16"):
        assert results[name]["seconds"][0] > 0
        assert results[name]["operations"] > 100
    assert results["flatness, float32"]["flatness/average/test"] is not None
    printed = capsys.readouterr().out
    assert re.match(r"no GPU, torch .+: about \d+ s, budget \d+ s\n", printed)
    gpu.main([str(file), "--device=cpu", "--tiny", "--budget=0"])
    assert "are left" in json.loads(file.read_text())["AT, float32"]["left out"]


def test_flags_of_a_part_are_set_and_restored_even_if_it_fails(benchmark):
    gpu, before, seen = benchmark("gpu"), global_flags(), []

    def fail():
        seen.extend(global_flags())
        raise RuntimeError("no memory")

    assert gpu.outcome(fail, {"benchmark": True, "tf32": True}) == {
        "error": "RuntimeError: no memory"
    }
    assert seen in ([True, "tf32", "tf32"], [True, True, True])
    assert global_flags() == before


def test_a_profile_names_the_operations_of_a_step(benchmark, capsys):
    benchmark("training").profile("ATAWP", batch=2, width=2, rows=200)
    printed = capsys.readouterr().out
    assert "ATAWP, ResNet-18 of width 2, three steps of 2 images" in printed
    # Forwards of 20 convolutions a pass: eight of PGD-7 with the best iterate, one for the weight
    # perturbation and one for the step.
    line = next(line for line in printed.splitlines() if "aten::convolution " in line)
    assert int(line.split()[-1]) == 3 * 20 * 10


@pytest.mark.slow
def test_scaling_compares_one_process_and_two(benchmark, capsys):
    light = ["--model.steps=1", "--data.num_train=64", "--trainer.max_epochs=1"]
    light += ["--flatness.num_examples=4", "--flatness.steps=1", "--model.network.width=2"]
    benchmark("training").scaling(["flatness"], rounds=1, options=light)
    assert "flatness: 2 of 2 cores / 1 of 2 cores" in capsys.readouterr().out


@pytest.mark.slow
def test_autoattack_by_three(benchmark, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchattacks")
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    without = "--without=[autoattack,wandb,final,flatness,train_flatness,trajectory]"
    main(["fit", "--model=AT", "--folder=run", *TINY, *quiet, without])
    benchmark("attacks").autoattack(tmp_path / "run", images=2, rounds=1)
    printed = capsys.readouterr().out
    errors = re.findall(r"^(.+): robust error ([\d.]+ %)", printed, re.MULTILINE)
    # One call of each before it is timed.
    assert len(errors) == 8
    assert len({error for _, error in errors}) == 1
