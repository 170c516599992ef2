"""Self-supervision by rotations."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_body
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.functional import perturbed_weights
from robust_flatness.functional.objectives import rotate
from robust_flatness.lightning_modules import ATAWP, ATSelfSupervision
from robust_flatness.lightning_modules.awp_mixin import AWPMixin
from robust_flatness.networks import ResNet18

STEPS = 3
BODY = partial(ResNet18, width=2)


class Spy(ATSelfSupervision):
    """Remembers attacks and objectives."""

    def craft(self, images, labels, *args, **kwargs):
        self.__dict__.setdefault("attacks", []).append((images, labels))
        return super().craft(images, labels, *args, **kwargs)

    def objective(self, images, adversarial, labels):
        found = super().objective(images, adversarial, labels)
        self.__dict__.setdefault("objectives", []).append((images, adversarial, labels, found))
        return found


def built(cls=Spy, **kwargs):
    torch.manual_seed(0)
    return cls(network=BODY, **{**PLAIN, "steps": STEPS, "hidden": 8, **kwargs})


def fit(module, count=8, **kwargs):
    trainer = quiet_trainer(**kwargs)
    trainer.fit(module, loader(count))
    return trainer


def test_half_of_the_batch_is_classified_and_half_turned_then_attacked():
    module = built()
    trainer = fit(module)
    (first, second), (images, adversarial, labels, _) = module.attacks, module.objectives[0]
    assert torch.equal(first[0], images[:4])
    assert torch.equal(first[1], labels[:4])
    turned, turns = second
    assert torch.equal(turned, rotate(images[4:], turns))
    assert adversarial.shape == images.shape
    for source, found in ((images[:4], adversarial[:4]), (turned, adversarial[4:])):
        moved = (found - source).abs()
        assert moved.max() <= module.pgd.eps + 1e-6
        assert (moved.flatten(1).amax(1) > 0).all()
    assert 0 <= trainer.callback_metrics["train/rotation_error"] <= 1


@pytest.mark.parametrize("rotations", ["half", "all"])
def test_two_steps_are_those_of_one_joint_forward_in_float64(rotations):
    module = built(rotations=rotations, lam=4.0).double()
    module.trainer = quiet_trainer()
    twin = copy.deepcopy(module)
    images, labels = images_and_labels(8)
    count = 4 if rotations == "half" else 8
    for _ in range(2):
        adversarial = module.attack(images.double(), labels)
        _, turns = module.attacks[-1]
        step(module, module.objective(images, adversarial, labels)[0])
        # Both heads on the features of all, as in the code of the paper and of Hendrycks et al.
        features = twin.network.features(twin.normalize(adversarial))
        classes, rotated = twin.network.classifier(features), twin.rotation_head(features)
        loss = cross_entropy(classes[:count], labels[:count])
        step(twin, loss + 4 * cross_entropy(rotated[count:], turns))
    for (name, value), other in zip(module.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)


def step(module, loss):
    """Plain gradient descent."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    with torch.no_grad():
        for weight, gradient in zip(module.parameters(), gradients):
            weight.sub_(0.1 * gradient)


def test_all_turns_every_image_by_every_multiple():
    module = built(rotations="all", lam=0.5)
    fit(module)
    (_, labels), (turned, turns) = module.attacks
    images, adversarial, given, _ = module.objectives[0]
    assert torch.equal(labels, given)
    assert adversarial.shape[0] == 5 * 8
    assert torch.equal(turned[:8], images)
    for k in range(4):
        assert torch.equal(turned[8 * k : 8 * k + 8], torch.rot90(images, k, (2, 3)))
    assert torch.equal(turns, torch.arange(4).repeat_interleave(8))


@pytest.mark.parametrize(("fraction", "attacked"), [(0.5, 2), (0.0, 0), (1.0, 4)])
def test_fraction_of_each_half_is_attacked(fraction, attacked):
    module = built(adversarial_fraction=fraction)
    trainer = fit(module)
    images, adversarial, _, (_, logits, _) = module.objectives[0]
    moved = (adversarial[:4] != images[:4]).flatten(1).any(1)
    assert moved.tolist() == [True] * attacked + [False] * (4 - attacked)
    assert len(module.attacks[1][0]) == attacked
    # Robust loss and error of training count attacked examples alone.
    assert len(logits) == attacked
    assert ("train/robust_error" in trainer.callback_metrics) == (attacked > 0)


def test_with_all_rotations_each_has_its_share_of_attacks():
    module = built(rotations="all", adversarial_fraction=0.5)
    module.trainer = quiet_trainer()
    images, labels = images_and_labels(8)
    adversarial = module.attack(images, labels)
    # Of the images attacked ones come first, and of the rotated ones likewise.
    clean = [images]
    clean += [torch.rot90(half, turns, (2, 3)) for half in images.split(4) for turns in range(4)]
    moved = (adversarial != torch.cat(clean)).flatten(1).any(1)
    assert torch.equal(
        moved, torch.tensor([True, False] + [True] * 4 + [False] * 4).repeat_interleave(4)
    )


@pytest.mark.parametrize("count", [2, 3])
def test_a_rest_too_small_to_halve_is_classified(count):
    module = built()
    fit(module, count=8 + count)
    images, adversarial, _, (loss, logits, _) = module.objectives[-1]
    assert adversarial.shape == images.shape
    assert len(logits) == count
    assert loss.isfinite()


@pytest.mark.parametrize("rotations", ["half", "all"])
@pytest.mark.parametrize(("total", "world"), [(6, 2), (14, 2), (15, 3), (28, 4)])
def test_processes_share_any_batch_as_one_process_splits_it(total, world, rotations):
    module = built(rotations=rotations, adversarial_fraction=0.5).double().eval()
    images, labels = (part.double() if part.ndim > 1 else part for part in images_and_labels(total))
    loss, whole = on_rank(module, images, labels, 0, 1)
    losses, parts = zip(
        *(
            on_rank(module, images[rank::world], labels[rank::world], rank, world)
            for rank in range(world)
        )
    )
    torch.testing.assert_close(sum(losses) / world, loss, rtol=0, atol=1e-12)
    rows = torch.cat(parts).flatten(1)
    assert len(rows) == len(whole)
    assert torch.cdist(whole.flatten(1), rows).amin(1).max() < 1e-6


def on_rank(module, images, labels, rank, world):
    """Loss and examples of one process."""
    trainer = mock.Mock(world_size=world, global_rank=rank)
    trainer.fit_loop.epoch_loop.total_batch_idx = 0
    module._trainer = trainer
    adversarial = module.attack(images, labels)
    loss, *_ = module.objective(images, adversarial, labels)
    return loss, adversarial


def test_each_task_is_attacked_on_its_own_loss():
    module = built(eps=0.3, steps=5)
    module.trainer = quiet_trainer()
    module.eval()
    images, labels = images_and_labels(32)
    adversarial = module.attack(images, labels)
    clean, turns = module.attacks[-1]

    def rotation_loss(batch):
        return cross_entropy(module.rotation_logits(batch), turns)

    assert rotation_loss(adversarial[16:]) > rotation_loss(clean) + 0.01
    assert cross_entropy(module(adversarial[:16]), labels[:16]) > cross_entropy(
        module(images[:16]), labels[:16]
    )


def test_crafting_leaves_statistics_of_network_and_head_to_the_update():
    module = built()
    norm = module.rotation_head.layers[2]
    fit(module, count=24)
    assert norm.num_batches_tracked.item() == 3
    assert module.network.body[1].statistics.num_batches_tracked.item() == 3
    assert module.training


@pytest.mark.parametrize(
    ("kwargs", "forwards", "backwards"),
    [
        # Both halves are one batch's worth of images through PGD and through the update.
        ({}, STEPS + 2, STEPS + 1),
        ({"adversarial_fraction": 0.5}, (STEPS + 1) / 2 + 1, STEPS / 2 + 1),
        ({"rotations": "all"}, 5 * (STEPS + 2), 5 * (STEPS + 1)),
    ],
)
def test_a_step_spends_the_minimum_of_passes(kwargs, forwards, backwards):
    module = built(**kwargs)
    passes = PassCounter(module.network)
    fit(module)
    assert (passes.forwards, passes.backwards) == (8 * forwards, 8 * backwards)


def test_turns_are_drawn_anew_in_each_batch():
    module = built()
    images, labels = images_and_labels(16)
    data = DataLoader(TensorDataset(images.repeat(3, 1, 1, 1), labels.repeat(3)), 16)
    quiet_trainer().fit(module, data)
    turns = [labels for _, labels in module.attacks[1::2]]
    assert not torch.equal(turns[0], turns[1])
    assert not torch.equal(turns[1], turns[2])


def test_the_head_takes_no_part_in_weight_perturbations():
    perturbed = set()

    class Both(AWPMixin, ATSelfSupervision):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.before = {name: p.detach().clone() for name, p in self.named_parameters()}

        def objective(self, *args):
            perturbed.update(n for n, p in self.named_parameters() if (p != self.before[n]).any())
            return super().objective(*args)

    fit(built(Both))
    assert perturbed
    assert all(name.startswith("network.") for name in perturbed)
    head = built(ATSelfSupervision)
    image = torch.rand(2, 3, 8, 8)
    logits = head.eval()(image)
    shift = {"rotation_head.layers.0.weight": torch.ones(8, head.network.num_features)}
    with perturbed_weights(head, shift):
        assert torch.equal(head(image), logits)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`network` to have `features`, `num_features` and `cl"):
        ATSelfSupervision(network=tiny_body)
    with pytest.raises(ValueError, match="`incorrect` to be attack for ATSelfSupervision"):
        built(incorrect="ignore")
    with pytest.raises(ValueError, match=r"`adversarial_fraction` to be in \[0, 1\] but got 2"):
        built(adversarial_fraction=2.0)
    with pytest.raises(ValueError, match="`rotations` to be one of half, all but got both"):
        built(rotations="both")
    assert not hasattr(ATAWP(network=tiny_body), "rotation_head")


def test_the_two_attacks_start_from_noise_of_their_own():
    module = built(steps=1, step_size=0.0, keep="last")
    module.trainer = quiet_trainer()
    images = torch.full((8, 3, 8, 8), 0.5)
    starts = module.attack(images, torch.zeros(8, dtype=torch.long)) - images
    first, second = starts.sign().flatten(1).split(4)
    assert ((first == second).float().mean(1) < 0.6).all()
