"""Training and every measure work with a process group that refuses tensors of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks_for_tests import same

SCRIPT = Path(__file__).parent / "refused_host_tensors.py"


@pytest.mark.slow
def test_training_and_measures_send_tensors_of_the_device_alone(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, timeout=600, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["logged"] == second["logged"]
    for variant in ("label noise", "awp", "entropy sgd", "callbacks"):
        weights = [
            {name: v for name, v in rank[variant].items() if "running" not in name}
            for rank in (first, second)
        ]
        assert same(*weights)
    assert first["trained by"]["all_reduce"] > 0
    assert {"all_reduce", "broadcast", "all_gather"} <= first["calls"].keys()
    assert "device type cpu" in first["refused"]
