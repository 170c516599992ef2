"""Promise 1 on networks of other people: measuring leaves training as it is, bit for bit.

`tests/soak/random_networks.py` trains more of them.
"""

import random

import pytest
import torch
from random_layers import random_network
from random_networks import Plain, faults, measures, outcome, train


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore")
def test_watching_changes_nothing(seed):
    found, text = outcome(seed)
    network, *_ = random_network(random.Random(seed))
    assert found in ("equal", "refused in a sentence"), f"{text}\n{network}"


@pytest.mark.filterwarnings("ignore")
def test_the_comparison_sees_a_draw_a_step_and_a_wrong_error(monkeypatch):
    plain, watched = train(0, []), train(0, measures()[:1])
    assert not [fault for fault in faults(plain, watched) if "not logged" not in fault]
    watched.metrics |= {"val/error": 0.5, "val/robust_error": 0.25}
    assert "val: RErr 0.25 below the error 0.5" in faults(plain, watched)
    original = Plain.validation_step

    def draws(self, batch, index):
        torch.rand(())
        original(self, batch, index)

    monkeypatch.setattr(Plain, "validation_step", draws)
    moved = faults(plain, train(0, []))
    assert "torch's random state moved" in moved
    assert any(fault.startswith("measuring changed network") for fault in moved)
