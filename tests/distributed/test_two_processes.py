"""Promises 2 and 4: two gloo processes measure and train as one."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from distributed.two_processes import (
    CHUNK,
    VARIANTS,
    measuring_callbacks,
    module,
    trained_weights,
)
from networks_for_tests import same
from trainers import ToyData, quiet_trainer

from robust_flatness.lightning_modules import ATAWP
from robust_flatness.measures.base import Processes
from robust_flatness.run_folder.files import read_landscapes

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folder of two processes."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of two processes left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Another test's seed_everything would make Lightning seed the processes anew.
    environment.pop("PL_GLOBAL_SEED", None)
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment,
        check=True,
        timeout=600,
        cwd=folder,
        capture_output=True,
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_as_one(ranks, variant):
    single = trained_weights(variant, 1)
    assert same(ranks[0][variant], ranks[1][variant])
    # Statistics of the global batch are added up in another order.
    tolerance = 1e-9 if variant == "synchronised trades awp" else 1e-10
    for parameter, value in single.items():
        torch.testing.assert_close(ranks[0][variant][parameter], value, rtol=0, atol=tolerance)


def test_variants_train_to_other_weights(ranks):
    ends = [
        weights["network.0.weight"]
        for weights in ranks[0].values()
        if "network.0.weight" in weights
    ]
    assert len(ends) == len(VARIANTS) - 2
    assert all(not torch.allclose(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_ranks_share_one_measure_though_their_statistics_differ(ranks):
    first, second = (rank["measured"] for rank in ranks)
    drift = first["before"]["network.1.running_mean"] - second["before"]["network.1.running_mean"]
    assert drift.abs().max() > 1e-4
    assert first["logged"] == second["logged"]
    assert first["autoattack"] == second["autoattack"]
    # Each rank has its own statistics back.
    for found in (first, second):
        assert same(found["before"], found["after"])


def test_two_processes_measure_what_one_does_bit_for_bit(ranks, folder):
    found = ranks[0]["measured"]
    network, trainer = module(ATAWP), quiet_trainer()
    network.load_state_dict(found["before"])
    data = ToyData()
    trainer.datamodule = data
    for name, callback in measuring_callbacks().items():
        callback.dataset = data.measured
        if name == "autoattack":
            result = callback.measure_split(trainer, network, "test", callback.measure)
            assert callback.measure.metrics(result, "test") == found["autoattack"]
            continue
        if name == "landscape":
            landscapes, settings = read_landscapes(folder / "landscapes.npz")
            assert settings["num_examples"] == 21
            result = callback.measure_split(trainer, network, "test", callback.measure)
            assert list(result) == ["random", "adversarial", "hessian", "surface"]
            for kind, landscape in result.items():
                assert (landscapes[f"final/{kind}"].losses == landscape.losses.numpy()).all()
            continue
        for metric, value in callback.compute(trainer, network).items():
            assert found["logged"][metric] == torch.tensor(value).item(), metric


def test_early_stopping_is_decided_once_for_all_ranks(ranks):
    first, second = (rank["measured"] for rank in ranks)
    assert first["epochs"] == second["epochs"]
    assert first["best_epoch"] == second["best_epoch"]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_example_belongs_to_one_rank_in_whole_chunks(world):
    shares = [Processes(rank, world).indices(21, CHUNK) for rank in range(world)]
    assert sorted(chain.from_iterable(shares)) == list(range(21))
    for share in shares:
        chunks = {index // CHUNK for index in share}
        assert len(share) == sum(len(range(c * CHUNK, min(c * CHUNK + CHUNK, 21))) for c in chunks)
