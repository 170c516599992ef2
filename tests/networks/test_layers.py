import pytest
import torch
from torch import nn

from robust_flatness.networks import (
    Normalize,
    ReparameterizedBatchNorm2d,
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
        ([0.1, 0.2], [1.0], "one value a channel each but got 2 and 1 values"),
        ([], [], "got 0 and 0 values"),
        ([0.5], [0.0], r"each value of `std` to be finite and > 0 but got \[0.0\]"),
        ([0.5], [float("nan")], r"each value of `std` to be finite and > 0 but got \[nan\]"),
        ("abc", [0.5], "`mean` to be one number a channel but got abc"),
        (0.5, [0.5], "`mean` to be one number a channel but got 0.5"),
        ([0.5], None, "`std` to be one number a channel but got None"),
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
