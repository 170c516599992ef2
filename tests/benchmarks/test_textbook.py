"""The loop that stands in for research code."""

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_network
from torch.nn.functional import cross_entropy


@pytest.fixture
def textbook_pgd(monkeypatch, pytestconfig):
    """The loop, which is no part of the package."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    return pytest.importorskip("textbook").textbook_pgd


def test_has_the_passes_of_research_code(textbook_pgd):
    network, (images, labels) = tiny_network().eval(), images_and_labels(8)
    counter = PassCounter(network)
    textbook_pgd(network, images, labels, eps=0.1, step_size=0.02, steps=3)
    assert (counter.forwards, counter.backwards) == (8 * 4, 8 * 3)
    # It pays for gradients of the weights too, which is what costs the time.
    assert all(weight.grad is not None for weight in network.parameters())


def test_is_an_attack_within_ball_and_box(textbook_pgd):
    network, (images, labels) = tiny_network().eval(), images_and_labels(8)
    settings = {"eps": 0.1, "step_size": 0.02}
    found, losses = textbook_pgd(network, images, labels, **settings, steps=10)
    assert (found - images).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(losses, cross_entropy(network(found), labels, reduction="none"))
    assert losses.mean() > cross_entropy(network(images), labels) + 0.03
