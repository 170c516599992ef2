"""AutoAttack in larger batches beside the official call."""

import pytest
import torch
from networks_for_tests import tiny_body
from pyautoattack import AutoAttack
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.lightning_modules import AT
from robust_flatness.measures import AutoAttackError


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    module = AT(tiny_body, **{**PLAIN, "eps": 0.02})
    quiet_trainer(max_epochs=15).fit(module, loader(32))
    return module.eval().requires_grad_(False)


class Counted(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.batches = network, []

    def forward(self, images):
        self.batches.append(len(images))
        return self.network(images)


def official(network, images, labels, norm, eps, attacks, queries):
    attack = AutoAttack(network, norm=norm, eps=eps, seed=0, version="custom", attacks=attacks)
    attack.square.n_queries = queries
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 9
    return attack.run_standard_evaluation(images, labels, batch_size=len(images))[1] == labels


@pytest.mark.parametrize(
    ("norm", "eps", "attack", "share"),
    [
        ("linf", 0.058, "apgd-t", 0.7),
        ("linf", 0.058, "fab-t", 0.7),
        ("linf", 0.17, "square", 0.7),
    ],
)
def test_verdicts_are_those_of_the_package_in_fewer_forwards(trained, norm, eps, attack, share):
    images, _ = dataset(16)[:]
    labels = trained(images).argmax(1)
    own, other = Counted(trained), Counted(trained)
    measure = AutoAttackError(eps=eps, norm=norm, attacks=[attack])
    measure.square_queries = 200
    verdicts = measure.attack(own, images, labels)
    name = {"linf": "Linf", "l2": "L2"}[norm]
    expected = official(other, images, labels, name, eps, [attack], 200)
    assert 0 < expected.sum() < len(expected)
    assert torch.equal(verdicts, expected)
    assert len(own.batches) < share * len(other.batches)
    assert max(own.batches) <= 100


@pytest.mark.parametrize("others", [lambda batch: batch[:1], lambda batch: batch])
def test_a_network_that_couples_images_is_attacked_by_the_package_itself(
    trained, monkeypatch, others
):
    called = []
    module = "robust_flatness.measures.batched_attacks.use_larger_batches"
    monkeypatch.setattr(module, lambda *_: called.append(1))
    images, labels = dataset(8)[:]
    measure = AutoAttackError(eps=0.02, attacks=["apgd-t"])

    class Coupled(torch.nn.Module):
        def forward(self, batch):
            return trained(batch) + others(batch).square().mean() * torch.eye(10)[:1]

    measure.attack(Coupled(), images, labels)
    assert not called
    measure.attack(trained, images, labels)
    assert called
