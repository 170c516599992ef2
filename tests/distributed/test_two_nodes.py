"""`torchrun` on two nodes of one process each, both on this machine."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks_for_tests import same

SCRIPT = Path(__file__).parent / "two_nodes.py"
NODES = [
    "--trainer.accelerator=cpu",
    "--trainer.strategy=ddp",
    "--trainer.num_nodes=2",
    "--trainer.devices=1",
]
TINY = [
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--data.num_train=64",
    "--model.network.width=4",
    "--model.steps=2",
    "--evaluation.num_examples=8",
    "--train_evaluation.num_examples=8",
    "--flatness.num_examples=8",
    "--train_flatness.num_examples=8",
    "--early_stopping.num_examples=8",
    "--final.num_examples=9",
    "--final.batch_size=4",
    "--final.steps=2",
    "--final.restarts=2",
    "--final.num_perturbations=2",
    "--autoattack.num_examples=6",
    "--autoattack.chunk_size=2",
    "--autoattack.version=custom",
    "--autoattack.attacks=[apgd-ce]",
    "--without=[wandb]",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(node: int, port: int, folder: Path, arguments: list[str]) -> subprocess.Popen:
    """The command that one of two nodes runs."""
    where = [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    command = [*torchrun, "--nproc-per-node=1", str(SCRIPT), str(folder), *arguments]
    log = (folder / f"node{node}.log").open("w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_two_nodes_train_and_measure_as_one_run(tmp_path):
    arguments, port = ["fit", "--model=ATAWP", *TINY, *NODES], free_port()
    nodes = [start(node, port, tmp_path, arguments) for node in (0, 1)]
    try:
        codes = [node.wait(timeout=600) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0, 0], (tmp_path / "node0.log").read_text()[-2000:]
    first, second = (torch.load(tmp_path / f"node{node}.pt") for node in (0, 1))
    assert first["world"] == 2
    assert same(first["weights"], second["weights"])
    assert first["logged"] == second["logged"]
    assert first["final"] == second["final"]
    # One run, written by one process.
    (folder,) = (tmp_path / "runs").iterdir()
    with (folder / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    results = json.loads((folder / "results.json").read_text())
    assert [row["epoch"] for row in results["trajectory"]] == [0, 1]
    assert results["num_examples"]["test/autoattack_error"] == 6
    assert results["num_examples"]["test/robust_loss"] == 9
    found = first["final"]["AutoAttack"]["final"]["test/autoattack_error"]
    assert results["final"]["test/autoattack_error"] == found
    assert "APGD-CE, test" in (tmp_path / "node0.log").read_text()
    assert "APGD-CE, test" not in (tmp_path / "node1.log").read_text()
