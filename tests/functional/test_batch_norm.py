"""BatchNorm at lower cost while an attack runs: scales held, and layers folded."""

import copy

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_body, tiny_network
from operation_counts import Operations
from torch import nn
from torch.nn.utils import parametrizations

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.batch_norm import folded_batch_norm
from robust_flatness.functional.evaluation import held_scales
from robust_flatness.functional.flatness import average_case_flatness
from robust_flatness.lightning_modules import AT
from robust_flatness.measures import RobustLoss
from robust_flatness.networks import ResNet18, SmallResNet, WideResNet
from robust_flatness.networks.layers import ReparameterizedBatchNorm2d

FOLDED = PGD(0.1, 3, fold_batch_norm=True)


def trained(network):
    """In float64 and eval mode, with scales, shifts and statistics of their own."""
    network = network.double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        network(images_and_labels(16)[0].double())
    return network.eval()


class TwoUses(nn.Module):
    """The output of the first convolution is used by BatchNorm and, times 0 at first, beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.beside, self.head = nn.Parameter(torch.zeros(())), nn.Linear(4 * 16, 10)

    def forward(self, x):
        x = self.first(x)
        x = self.norm1(x).relu() + self.beside * x
        return self.head(self.norm2(self.second(x)).relu().flatten(1))


class Twice(nn.Module):
    """One BatchNorm for two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 36, 10)

    def forward(self, x):
        return self.head((self.norm(self.first(x)).relu() * self.norm(self.second(x))).flatten(1))


def hooked():
    network = tiny_network()
    network[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    return network


def parametrized():
    network = tiny_network()
    parametrizations.weight_norm(network[0])
    return network


@pytest.mark.parametrize(
    ("network", "left"),
    [
        (lambda: SmallResNet(10, 3, width=4, dropout=0.1), 0),
        (tiny_network, 0),
        # BatchNorm comes before convolutions: one of two in each block, the stem and the end stay.
        (lambda: ResNet18(10, width=4, preactivation=True, norm="batch"), 9),
        (lambda: WideResNet(10, depth=10, widen_factor=1), 4),
        (TwoUses, 1),
        (hooked, 1),
        (parametrized, 1),
    ],
)
def test_folds_a_batch_norm_that_alone_uses_a_convolution(network, left):
    model, (images, _) = trained(network()), images_and_labels()
    images = images.double()
    folding = folded_batch_norm(model, model, images[:1])
    with torch.no_grad(), held_scales(model), folding, Operations() as operations:
        folded = model(images)
    assert operations.counts["native_batch_norm"] == left
    torch.testing.assert_close(folded, model(images), rtol=0, atol=1e-10)
    # The layers are as before.
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.usefixtures("cpu_as_gpu")
def test_an_attack_on_folded_layers_agrees_at_weights_that_change(precision):
    model, (images, labels) = trained(SmallResNet(10, 3, width=4)), images_and_labels()
    if precision == "float32":
        images = images.double()
    else:
        model = model.float()
    plain, folded = (PGD(0.1, 3, precision=precision, fold_batch_norm=f) for f in (False, True))
    starts = plain.starts(images, range(8), seed=0, restart=0)
    passes = PassCounter(nn.Sequential(*[m for m in model.modules() if isinstance(m, nn.Linear)]))
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        before = copy.deepcopy(model.state_dict())
        expected = plain.attack(model, images, labels, starts)
        passes.forwards = 0
        kept = folded.attack(model, images, labels, starts)
        tolerance = 1e-9 if precision == "float32" else 0.05
        torch.testing.assert_close(kept.losses, expected.losses, rtol=tolerance, atol=tolerance)
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    # The trial was in the first attack.
    assert passes.forwards == 8 * (4 if precision == "float32" else 5)


def test_a_random_state_and_a_failed_attack_leave_no_trace():
    model, (images, labels) = tiny_network().eval(), images_and_labels()
    model.insert(7, nn.Dropout(0.5))
    state = torch.get_rng_state()

    def fail(logits, labels):
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        FOLDED.attack(model, images, labels, torch.zeros_like(images), fail)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(module) for module in model.modules())


def compiled():
    network = tiny_network()
    network.compile(backend="eager")
    return network


def a_function():
    network = tiny_network().eval()
    return lambda images: network(images)


@pytest.mark.parametrize(
    "network",
    [lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), Twice, a_function, compiled],
)
def test_another_network_is_attacked_as_it_is(network):
    model, (images, labels) = network(), images_and_labels()
    starts = torch.zeros_like(images)
    with pytest.warns(UserWarning, match="BatchNorm after convolutions, for `fold_batch_norm`"):
        kept = FOLDED.attack(model, images, labels, starts)
    expected = PGD(0.1, 3).attack(model, images, labels, starts)
    assert torch.equal(kept.images, expected.images)


def test_crafting_in_train_mode_is_refused():
    with pytest.raises(ValueError, match="`mode` to be one of eval but got train"):
        PGD(0.1, mode="train", fold_batch_norm=True)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_computes_scales_once_with_equal_bits(mode):
    model, (images, labels) = SmallResNet(10, 3, width=4).train(), images_and_labels()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pgd = PGD(0.1, 3, mode=mode)
    starts = pgd.starts(images, range(8), seed=0, restart=0)
    with Operations() as held:
        kept = pgd.attack(model, images, labels, starts)
    norms = [m for m in model.modules() if isinstance(m, ReparameterizedBatchNorm2d)]
    assert all(norm.held_scale is None for norm in norms)
    # The mode of the modules of a function is its own.
    with Operations() as computed:
        expected = pgd.attack(lambda x: model.train(mode == "train")(x), images, labels, starts)
    assert torch.equal(kept.images, expected.images)
    assert torch.equal(kept.losses, expected.losses)
    assert computed.counts["add"] - held.counts["add"] == 4 * len(norms)
    assert held.counts["_foreach_add"] == 1


def test_a_held_scale_is_that_of_the_parameter_alone():
    norm = ReparameterizedBatchNorm2d(3).eval()
    ones, images = torch.ones(3), torch.rand(2, 3, 4, 4)
    expected = torch.func.functional_call(norm, {"weight": ones}, images)
    with held_scales(norm):
        assert torch.equal(torch.func.functional_call(norm, {"weight": ones}, images), expected)


def test_flatness_folds_the_perturbed_weights():
    model, (images, labels) = trained(tiny_network()), images_and_labels()
    for xi in (0.0, 0.3):
        plain, folded = (
            average_case_flatness(
                *(model, images.double(), labels),
                **{"xi": xi, "num_perturbations": 2, "eps": 0.1, "steps": 2},
                fold_batch_norm=fold,
            )
            for fold in (False, True)
        )
        assert folded.value == pytest.approx(plain.value, abs=1e-9)
        assert (folded.value == 0) == (xi == 0)
    assert RobustLoss(fold_batch_norm=True).pgd.fold_batch_norm
    assert AT(tiny_body, fold_batch_norm=True).pgd.fold_batch_norm
