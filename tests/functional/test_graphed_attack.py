import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from networks_for_tests import Recorder, images_and_labels, tiny_network

from robust_flatness.functional import PGD
from robust_flatness.functional.graphed_attack import GraphedAttack
from robust_flatness.functional.iterate import example_losses
from robust_flatness.functional.trades import divergences

PGD_3 = PGD(0.1, steps=3)


def given(seed=1, count=8):
    images, labels = images_and_labels(count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return images, labels, (torch.rand(images.shape, generator=generator) - 0.5) / 5


def check(graphed, network, tensors, criterion=example_losses):
    before = [tensor.clone() for tensor in tensors]
    found = graphed(network, *tensors, criterion, nullcontext)
    assert torch.equal(found, PGD_3.attack(network, *tensors, criterion).images)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))
    return found


def test_replays_are_the_attack_on_each_batch_and_each_weight():
    recorder, network = Recorder(), tiny_network()
    graphed = GraphedAttack(PGD_3, recorder)
    first = check(graphed, network, given(1))
    kept = first.clone()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1)
    second = check(graphed, network, given(2))
    assert not torch.equal(first, second)
    # A result is the caller's own: the next replay does not write to it.
    assert torch.equal(first, kept)
    assert (recorder.recordings, recorder.replays) == (1, 2)


def test_records_anew_where_the_graph_would_not_see_what_changed():
    recorder, network = Recorder(), tiny_network()
    graphed = GraphedAttack(PGD_3, recorder)
    check(graphed, network, given(count=3))
    check(graphed, network, given(count=5))
    network[0].weight.data = network[0].weight.data + 0.1
    check(graphed, network, given(count=5))
    images, _, start = given(count=5)
    targets = network(images).detach()
    check(graphed, network, (images, targets, start), divergences)
    assert recorder.recordings == 4


def test_a_smaller_batch_is_attacked_without_a_graph_and_leaves_it():
    recorder, network = Recorder(), tiny_network()
    graphed = GraphedAttack(PGD_3, recorder)
    for seed, count in enumerate((8, 5, 8, 5, 8)):
        check(graphed, network, given(seed, count))
    assert (recorder.recordings, recorder.replays) == (1, 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_record_their_own(duplicate):
    network = tiny_network()
    graphed = GraphedAttack(PGD_3, Recorder())
    check(graphed, network, given())
    other = duplicate(graphed)
    assert other._recorded is None
    assert other.pgd == PGD_3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_graph_is_the_attack():
    network, tensors = tiny_network().cuda(), [tensor.cuda() for tensor in given()]
    graphed = GraphedAttack(PGD_3)
    for _ in range(2):
        with torch.no_grad():
            network[0].weight.add_(0.1)
        found = graphed(network, *tensors, example_losses, nullcontext)
        expected = PGD_3.attack(network, *tensors).images
        assert (found != expected).float().mean() < 0.01
