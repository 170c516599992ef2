import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from robust_flatness.networks import (
    Normalize,
    ReparameterizedBatchNorm2d,
    ResNet18,
    make_activation,
    make_norm,
)


def test_normalize_subtracts_and_divides_by_channel():
    layer = Normalize([0.1, 0.2, 0.3], [0.5, 1.0, 2.0])
    images = torch.rand(2, 3, 4, 5)
    for c, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)]):
        torch.testing.assert_close(layer(images)[:, c], (images[:, c] - mean) / std)


def test_normalize_is_saved_but_not_trained():
    layer = Normalize([0.1], [0.5])
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "std"}
    assert layer.double()(torch.rand(2, 1, 4, 4).double()).dtype is torch.double


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.1, 0.2], [1.0], "one value per channel each but got 2 and 1 values"),
        ([], [], "got 0 and 0 values"),
        ([0.5], [0.0], r"each value of `std` to be finite and > 0 but got \[0.0\]"),
        ([0.5], [float("nan")], r"each value of `std` to be finite and > 0 but got \[nan\]"),
        ("abc", [0.5], "`mean` to be one number per channel but got abc"),
        (0.5, [0.5], "`mean` to be one number per channel but got 0.5"),
        ([0.5], None, "`std` to be one number per channel but got None"),
        ([0.5], [float("inf")], r"each value of `std` to be finite and > 0 but got \[inf\]"),
        ([float("nan")], [0.5], r"each value of `mean` to be finite but got \[nan\]"),
    ],
)
def test_normalize_refuses_bad_statistics(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)


def test_normalize_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match=r"\(..., 3, H, W\) but got shape \(2, 1, 4, 4\)"):
        Normalize([0.1] * 3, [1.0] * 3)(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", nn.functional.relu),
        ("silu", nn.functional.silu),
        ("gelu", nn.functional.gelu),
        ("mish", nn.functional.mish),
    ],
)
def test_activations_do_what_their_names_say(name, function):
    x = torch.linspace(-3, 3, 20)
    kept = x.clone()
    torch.testing.assert_close(make_activation(name)(x), function(kept))
    assert torch.equal(x, kept)


def test_norms_are_what_their_names_say():
    assert isinstance(make_norm("reparameterized", 3), ReparameterizedBatchNorm2d)
    assert isinstance(make_norm("batch", 3), nn.BatchNorm2d)


def test_unknown_names_are_listed_against():
    with pytest.raises(ValueError, match=r"`activation` to be one of \['relu', .*got 'ReLU'"):
        make_activation("ReLU")
    with pytest.raises(ValueError, match=r"`norm` to be one of \['reparam.*got 'layer'"):
        make_norm("layer", 3)


@pytest.fixture
def pair():
    """The paper's normalization and the stock one with the same scale and shift."""
    torch.manual_seed(0)
    ours, stock = ReparameterizedBatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    with torch.no_grad():
        ours.weight.uniform_(-0.5, 0.5)
        ours.bias.uniform_(-0.5, 0.5)
        stock.weight.copy_(1 + ours.weight)
        stock.bias.copy_(ours.bias)
    return ours, stock


def outcome(module, images):
    """Output, gradients of input, scale and shift, and the buffers afterwards."""
    images = images.clone().requires_grad_()
    out = module(images)
    grads = torch.autograd.grad((out**3).sum(), [images, module.weight, module.bias])
    inner = getattr(module, "statistics", module)
    return [out, *grads, inner.running_mean, inner.running_var, inner.num_batches_tracked]


def assert_same(ours, stock):
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_it_starts_as_scale_one_and_shift_zero():
    layer = ReparameterizedBatchNorm2d(3)
    assert layer.weight.tolist() == [0, 0, 0]
    assert layer.bias.tolist() == [0, 0, 0]
    images = torch.rand(4, 3, 2, 2)
    torch.testing.assert_close(layer(images), nn.BatchNorm2d(3)(images))


def test_it_equals_batch_norm_in_training_and_evaluation(pair):
    ours, stock = pair
    for _ in range(3):
        images = torch.randn(5, 3, 4, 4, dtype=torch.double)
        assert_same(outcome(ours, images), outcome(stock, images))
    assert ours.statistics.num_batches_tracked == 3
    assert_same(outcome(ours.eval(), images), outcome(stock.eval(), images))
    assert ours.statistics.num_batches_tracked == 3


def test_a_cumulative_average_works_as_in_update_bn(pair):
    ours, stock = pair
    loader = [torch.randn(5, 3, 4, 4, dtype=torch.double) for _ in range(3)]
    update_bn(loader, ours)
    update_bn(loader, stock)
    images = loader[0]
    assert_same(outcome(ours.eval(), images), outcome(stock.eval(), images))


def test_the_mode_of_the_inner_module_decides(pair):
    ours, _ = pair
    ours.statistics.eval()
    before = copy.deepcopy(ours.state_dict())
    ours(torch.randn(5, 3, 4, 4, dtype=torch.double))
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


def test_a_converted_network_is_the_same_network():
    torch.manual_seed(0)
    network = ResNet18(10, width=4)
    network(torch.rand(8, 3, 8, 8))
    for module in network.modules():
        if isinstance(module, ReparameterizedBatchNorm2d):
            nn.init.uniform_(module.weight, -0.5, 0.5)
    images = torch.rand(8, 3, 8, 8)
    expected = network.eval()(images)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network).eval()
    kinds = {type(m) for m in converted.modules()}
    assert nn.SyncBatchNorm in kinds
    assert nn.BatchNorm2d not in kinds
    torch.testing.assert_close(converted(images), expected)


def test_a_converted_layer_gathers_statistics_and_scales_in_training(pair, monkeypatch):
    ours, _ = pair
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    # The real one trains on accelerators only: a stand-in shows that it is asked.
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: 2 * x)
    images = torch.randn(5, 3, 4, 4, dtype=torch.double)
    scale, shift = (1 + ours.weight)[:, None, None], ours.bias[:, None, None]
    torch.testing.assert_close(converted(images), 2 * images * scale + shift)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Expected `x` to have 4 dimensions but got shape \(4, 3"):
        ReparameterizedBatchNorm2d(3)(torch.rand(4, 3))
