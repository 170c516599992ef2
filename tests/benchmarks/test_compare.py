"""The comparison of two checkouts sees what differs, and what a flow passes through."""

import importlib

import numpy as np
import pytest
import torch


@pytest.fixture
def script(monkeypatch, pytestconfig):
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    return importlib.import_module


def run_folder(folder, *, weight=1.0, loss="0.5", name="runs/at"):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.csv").write_text(f"epoch,val/robust_loss\n0,{loss}\n")
    results = '{"final": {"test/error": 0.5}, "wall_time_seconds": 3, "versions": {"torch": "x"}}'
    (folder / "results.json").write_text(results)
    np.savez(folder / "examples.npz", losses=np.ones(3))
    checkpoint = {"state_dict": {"w": torch.full((2,), weight)}, "optimizer_states": [{"m": 0}]}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder, name


def test_a_run_folder_is_compared_by_metrics_arrays_and_tensors(script, tmp_path):
    facts = script("checkout_facts").run_facts
    first = dict(facts(*run_folder(tmp_path / "a")))
    assert first["runs/at/results.json/final/test/error"] == "0.5"
    assert {name.split("/")[2] for name in first} >= {"metrics.csv", "examples.npz", "last.ckpt"}
    assert not any("wall_time" in name or "versions" in name for name in first)
    differences = script("compare").differences
    assert differences(first, dict(facts(*run_folder(tmp_path / "b"))), []) == {}
    third = dict(facts(*run_folder(tmp_path / "c", weight=1 + 2**-23, loss="0.50")))
    names = ["runs/at/last.ckpt/state_dict/w", "runs/at/metrics.csv/0/val/robust_loss"]
    assert sorted(differences(first, third, [])) == names
    assert list(differences(first, third, ["*/metrics.csv/*"])) == names[:1]


def test_the_cache_holds_one_file_for_each_contents(script, tmp_path, monkeypatch):
    compare, made = script("compare"), []
    monkeypatch.setattr(compare, "facts_of", lambda folder, job: made.append(job) or {"n": 1})
    (tmp_path / "cli.py").write_text("a = 1")
    job = {"presets": ["at"]}
    for _ in range(2):
        assert compare.cached_facts(tmp_path, job, tmp_path / "cache") == {"n": 1}
    assert len(made) == 1
    (tmp_path / "cli.py").write_text("a = 2")
    compare.cached_facts(tmp_path, job, tmp_path / "cache")
    compare.cached_facts(tmp_path, {"presets": []}, tmp_path / "cache")
    assert len(made) == 3


def test_neither_folder_nor_revision_is_refused(script):
    compare = script("compare")
    with pytest.raises(ValueError, match="checkout's folder or a revision but got no-such"):
        compare.main(["no-such", "no-such"])


def test_a_flow_counts_named_functions_of_the_package(script, tmp_path, monkeypatch):
    source = "def outer():\n    return [inner(i) for i in range(3)]\ndef inner(i):\n    return i\n"
    (tmp_path / "small_package.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    profile = script("checkout_facts").Profile()
    package = importlib.import_module("small_package")
    profile.start()
    package.outer()
    max(range(3), key=lambda number: number)
    profile.stop()
    assert profile.counts == [4, 2, 1]
