"""The measure's own noise: what the standard error says against what 20 seeds show."""

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from torch import nn
from torch.nn.functional import cross_entropy

from robust_flatness.functional import average_case_flatness, pgd_attack

SEEDS = 20
ATTACK = {"eps": 0.03, "steps": 2}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that adversarial training has fitted to 64 images."""
    images, labels = images_and_labels(64, classes=4)
    network = tiny_network(classes=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for step in range(60):
        adversarial = pgd_attack(network, images, labels, seed=step, **ATTACK)
        loss = cross_entropy(network(adversarial), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7
    return network


@pytest.mark.parametrize("choice", [{"steps": 1}, {"loss": "clean", "per_batch": True}])
def test_the_standard_error_is_the_spread_over_seeds_of_directions(trained, choice):
    images, labels = images_and_labels(64, classes=4)
    settings = {"batch_size": 32, **ATTACK, **choice}
    found = [
        average_case_flatness(trained, images, labels, seed=seed, **settings)
        for seed in range(SEEDS)
    ]
    spread = torch.tensor([result.value for result in found]).std().item()
    reported = sum(result.standard_error for result in found) / SEEDS
    assert spread > 0.01
    assert reported / 1.5 < spread < reported * 1.5


def test_the_standard_error_over_examples_is_the_spread_over_sets(trained):
    # Sets of 64 out of 1920 images whose labels are those that the network gives.
    images, _ = images_and_labels(64 * SEEDS, classes=4, seed=7)
    with torch.no_grad():
        labels = trained.eval()(images).argmax(1)
    found = [
        average_case_flatness(
            trained, part, part_labels, loss="clean", num_perturbations=20, indices=range(64)
        )
        for part, part_labels in zip(images.split(64), labels.split(64))
    ]
    # The directions are the same for all sets.
    spread = torch.tensor([result.value for result in found]).std().item()
    reported = sum(result.standard_error_examples for result in found) / SEEDS
    assert reported / 1.5 < spread < reported * 1.5
