"""Variants that take turns, and the loop that stands in for research code."""

import importlib
import time

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_network
from torch.nn.functional import cross_entropy


@pytest.fixture
def timing(monkeypatch, pytestconfig):
    """The module that benchmarks share, which is not part of the package."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    return importlib.import_module("timing")


def test_variants_take_turns_whose_order_is_reversed(timing, capsys):
    called = []

    def run(name: str) -> float:
        called.append(name)
        return float(len(called))

    seconds = timing.compare("title", {"time": {n: lambda n=n: run(n) for n in "abc"}}, 2)
    # Each runs once before it is timed.
    assert "".join(called) == "abcabccba"
    assert seconds == {"time": {"a": [4.0, 9.0], "b": [5.0, 8.0], "c": [6.0, 7.0]}}
    printed = capsys.readouterr().out
    assert "2 rounds" in printed
    assert "time: b / a 1.07 (0.889 to 1.25)" in printed


def test_cpu_seconds_are_those_of_one_call(timing):
    def work() -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    assert 0.02 <= timing.cpu_seconds(work)() < 0.04


def test_research_code_has_a_backward_for_each_step_and_one_forward_more(timing):
    network, (images, labels) = tiny_network().eval(), images_and_labels(8)
    counter = PassCounter(network)
    timing.textbook_pgd(network, images, labels, eps=0.1, step_size=0.02, steps=3)
    assert (counter.forwards, counter.backwards) == (8 * 4, 8 * 3)
    # It pays for gradients of the weights too, which costs the time.
    assert all(weight.grad is not None for weight in network.parameters())


def test_research_code_attacks_within_ball_and_box(timing):
    network, (images, labels) = tiny_network().eval(), images_and_labels(8)
    settings = {"eps": 0.1, "step_size": 0.02}
    found, losses = timing.textbook_pgd(network, images, labels, **settings, steps=10)
    assert (found - images).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(losses, cross_entropy(network(found), labels, reduction="none"))
    assert losses.mean() > cross_entropy(network(images), labels) + 0.03
