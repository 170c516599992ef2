"""Two processes of which one has less to do: no hang, one decision, and what one process finds."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from distributed.uneven_ranks import (
    FOREIGN,
    Attack,
    Counting,
    attack,
    attacked_data,
    measuring_callbacks,
    module,
)
from networks_for_tests import same
from trainers import quiet_trainer

from robust_flatness.callbacks.final_evaluation import AUTOATTACK_FOLDER as FOLDER

SCRIPT = Path(__file__).parent / "uneven_ranks.py"


class KilledMeasure(Counting):
    """Is killed after the first two chunks, one of each process that goes on."""

    def attack(self, *args):
        if self.attacked == 2:
            raise InterruptedError
        return super().attack(*args)


class Killed(Attack):
    kind = KilledMeasure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with the verdicts of two of six chunks, beside what two processes leave."""
    folder = tmp_path_factory.mktemp("uneven")
    with suppress(InterruptedError):
        attack(folder / "run", Killed(dataset=attacked_data()))
    assert len(list((folder / "run" / FOLDER).iterdir())) == 2
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of two processes saw; a hang ends in a timeout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    command = [sys.executable, str(SCRIPT), str(folder)]
    options = {"check": True, "timeout": 600, "cwd": folder, "capture_output": True}
    subprocess.run(command, env=environment, **options)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_ranks_end_together_with_the_same_weights_and_figures(ranks):
    first, second = (rank["trained"] for rank in ranks)
    assert same(first["weights"], second["weights"])
    assert first["logged"] == second["logged"]
    assert first["autoattack"] == second["autoattack"]
    # A chunk for the last weights and one for the early-stopped ones, all of the first process.
    assert (first["attacked"], second["attacked"]) == (2, 0)


def test_early_stopping_ends_training_on_both_ranks_in_the_same_epoch(ranks):
    for rank in ranks:
        assert rank["trained"]["epochs"] == 2
        assert rank["trained"]["best_epoch"] == 0


def test_what_one_rank_measured_is_what_one_process_measures(ranks):
    found = ranks[0]["trained"]
    network, trainer = module(), quiet_trainer()
    network.load_state_dict(found["before"])
    callbacks = measuring_callbacks()
    for name in ("evaluation", "flatness", "worst", "curvature", "sharpness"):
        for figure, value in callbacks[name].compute(trainer, network).items():
            assert found["logged"][figure] == torch.tensor(value).item(), figure


def test_two_processes_take_kept_verdicts_and_attack_the_rest(ranks, folder, tmp_path):
    whole = attack(tmp_path / "whole")
    assert whole.attacked == 6
    verdicts = whole.final_arrays["final/test/autoattack_correct"]
    assert 0 < verdicts.sum() < len(verdicts)
    for rank in ranks:
        assert rank["resumed"]["attacked"] == 2
        assert rank["resumed"]["kept"] == 6
        assert torch.equal(rank["resumed"]["verdicts"], verdicts)
    assert not (folder / "run" / FOLDER).exists()
    assert not (folder / "wrong" / FOLDER).exists()


@pytest.mark.parametrize("case", FOREIGN)
def test_ranks_measure_the_images_of_a_foreign_loader_once_or_refuse_together(ranks, case):
    _, _, expected = FOREIGN[case]
    for rank in ranks:
        found = rank["foreign"][case]
        assert found == expected if isinstance(expected, list) else expected in found
