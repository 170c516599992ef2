"""Promise 10 with SIGKILL: a killed run resumes to the weights and rows of one that was not killed.

`tests/soak/random_kills.py` kills more of them.
"""

import tempfile
from pathlib import Path

import pytest
from random_kills import KINDS, Kills, memory_folder


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=memory_folder()) as temporary:
        kills = Kills(tmp_path, Path(temporary))
        outcomes = [kills.kill(number) for number in range(len(KINDS))]
    assert [outcome for outcome, _ in outcomes] == [f"equal: {kind}" for kind in KINDS], outcomes
