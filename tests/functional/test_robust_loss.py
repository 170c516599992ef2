import math
from dataclasses import replace

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_network
from torch.nn.functional import cross_entropy

from robust_flatness.functional import (
    PGD,
    adaptive_sharpness,
    attack,
    average_case_flatness,
    evaluate_robustness,
    loss_landscape,
    robust_loss,
)
from robust_flatness.functional.attack import Iterate
from robust_flatness.functional.noise import keyed_generator
from robust_flatness.functional.robust_loss import AttackedSet


def test_restarts_keep_the_worst_loss_of_each_example(monkeypatch):
    images, labels = images_and_labels(3)
    scripted = iter([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0], [2.0, 1.0, 9.0]])
    correct = iter([[True, True, True], [False, True, True], [True, True, True]])

    def attack(self, model, inputs, targets, start):
        right = torch.tensor(next(correct))
        return Iterate(inputs, torch.tensor(next(scripted)), torch.where(right, targets, -1))

    monkeypatch.setattr(PGD, "attack", attack)
    attacked = AttackedSet(images, labels, PGD(0.1), restarts=3)
    losses, robust = attacked.attack(tiny_network(), slice(0, 3))
    assert losses.tolist() == [3.0, 5.0, 9.0]
    assert robust.tolist() == [False, True, True]


def test_robust_loss_is_monotone_in_nested_restarts():
    images, labels = images_and_labels(32)
    network = tiny_network()
    values = [robust_loss(network, images, labels, eps=0.1, steps=2, restarts=r) for r in (1, 2, 5)]
    assert (values[1] >= values[0]).all()
    assert (values[2] >= values[1]).all()
    assert (values[2] > values[0]).any()


def test_large_eps_fools_everything_and_eps_zero_is_the_clean_error():
    images, labels = images_and_labels(64)
    network = tiny_network().eval()
    labels = torch.where(torch.arange(64) < 48, network(images).argmax(1), labels)
    huge = evaluate_robustness(network, images, labels, eps=1.0, steps=20, restarts=2)
    assert huge.robust_error == 1.0
    none = evaluate_robustness(network, images, labels, eps=0.0, steps=5, restarts=2)
    assert none.robust_error == none.error
    assert 0 < none.error < 0.3
    torch.testing.assert_close(
        none.losses, cross_entropy(network(images), labels, reduction="none").detach()
    )


def test_clean_errors_count_as_robust_errors(monkeypatch):
    images, labels = images_and_labels(16)
    network, attack = tiny_network().eval(), PGD.attack

    def harmless(self, model, inputs, targets, start):
        # The clean images are an attack without steps.
        if self.steps == 0:
            return attack(self, model, inputs, targets, start)
        return Iterate(inputs, torch.zeros(len(targets)), targets)

    monkeypatch.setattr(PGD, "attack", harmless)
    result = evaluate_robustness(network, images, labels, eps=0.1)
    assert result.robust_error == result.error > 0


def test_splits_the_loss_by_clean_correctness():
    images, labels = images_and_labels(32)
    result = evaluate_robustness(tiny_network(), images, labels, eps=0.05, steps=2, restarts=1)
    right = result.clean_correct.double()
    share = right.mean().item()
    mixed = share * result.robust_loss_correct + (1 - share) * result.robust_loss_incorrect
    assert mixed == pytest.approx(result.robust_loss, abs=1e-9)
    assert result.robust_loss_incorrect > result.robust_loss_correct


def test_chunks_and_indices_do_not_change_the_value():
    images, labels = images_and_labels(20)
    images, network = images.double(), tiny_network().double()
    whole = robust_loss(network, images, labels, eps=0.1, steps=5, restarts=2)
    small = robust_loss(network, images, labels, eps=0.1, steps=5, restarts=2, batch_size=3)
    torch.testing.assert_close(whole, small, rtol=0, atol=1e-9)
    tail = evaluate_robustness(
        network, images[13:], labels[13:], eps=0.1, steps=5, restarts=2, indices=range(13, 20)
    )
    torch.testing.assert_close(whole[13:], tail.losses, rtol=0, atol=1e-9)


def test_another_seed_or_index_is_another_start():
    images, labels = images_and_labels(8)
    network = tiny_network()
    settings = {"eps": 0.1, "steps": 1, "restarts": 1}
    first = evaluate_robustness(network, images, labels, **settings).losses
    other = evaluate_robustness(network, images, labels, seed=1, **settings).losses
    moved = evaluate_robustness(network, images, labels, indices=range(8, 16), **settings).losses
    assert not torch.equal(first, other)
    assert not torch.equal(first, moved)


def test_spends_the_minimum_of_passes():
    images, labels = images_and_labels(8)
    network = tiny_network()
    passes = PassCounter(network)
    evaluate_robustness(network, images, labels, eps=0.1, steps=4, restarts=3)
    assert passes.forwards == 8 * (3 * (4 + 1) + 1)
    assert passes.backwards == 8 * 3 * 4


def test_nothing_to_measure_gives_empty_tensors():
    images, labels = images_and_labels(4)
    result = evaluate_robustness(tiny_network(), images[:0], labels[:0], eps=0.1)
    assert result.losses.shape == (0,)
    assert math.isnan(result.robust_loss)


def test_adversarial_examples_are_those_of_the_worst_restart():
    images, labels = images_and_labels(9)
    network, pgd = tiny_network().double().eval(), PGD(0.1, steps=2)
    attacked = AttackedSet(images.double(), labels, pgd, restarts=4)
    found = attacked.adversarial(network, slice(0, 9))
    losses = cross_entropy(network(found), labels, reduction="none").detach()
    assert torch.equal(losses, attacked.losses(network))
    single = [attacked.losses(network, restarts=[restart]) for restart in range(4)]
    assert len(torch.stack(single).argmax(0).unique()) > 2
    clean = attacked.for_loss("clean").adversarial(network, slice(2, 5))
    assert torch.equal(clean, images[2:5].double())


@pytest.mark.parametrize("measure", ["flatness", "landscape", "sharpness", "clean"])
def test_starts_are_drawn_once_for_all_perturbations(monkeypatch, measure):
    drawn = []

    def draw(seed, *key):
        drawn.append(key)
        return keyed_generator(seed, *key)

    monkeypatch.setattr(attack, "keyed_generator", draw)
    images, labels = images_and_labels(6)
    data = (tiny_network(), images, labels)
    settings = {"eps": 0.1, "steps": 1, "restarts": 2, "batch_size": 4}
    if measure == "landscape":
        loss_landscape(*data, num_directions=2, num_steps=3, **settings)
    elif measure == "sharpness":
        adaptive_sharpness(*data, num_perturbations=3, **settings)
    else:
        loss = "clean" if measure == "clean" else "robust"
        average_case_flatness(*data, num_perturbations=3, loss=loss, **settings)
    keys = [("start", index, restart) for index in range(6) for restart in range(2)]
    assert sorted(drawn) == ([] if measure == "clean" else keys)


def test_losses_that_are_known_are_those_of_the_same_attack():
    images, labels = images_and_labels(6)
    network = tiny_network().eval()
    known = {}
    for restarts in (2, 1, 3):
        attacked = AttackedSet(images, labels, PGD(0.1), restarts, batch_size=4)
        assert torch.equal(attacked.losses(network, known=known), attacked.losses(network))
    # Of two batches and three restarts.
    assert len(known) == 6
    for changed in ({"pgd": PGD(0.05)}, {"seed": 1}, {"batch_size": 3}, {"indices": range(1, 7)}):
        other = replace(attacked, **changed)
        assert torch.equal(other.losses(network, known=known), other.losses(network))
