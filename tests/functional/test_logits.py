"""What a network may return: logits of shape (N, K), not probabilities."""

import warnings

import pytest
import torch
from networks_for_tests import images_and_labels, tiny_network
from torch import nn

from robust_flatness.functional import (
    average_case_flatness,
    evaluate_robustness,
    hessian_extreme_eigenvalues,
    pgd_attack,
    trades_loss,
    worst_case_flatness,
)

CALLS = {
    "attack": lambda *of: pgd_attack(*of, eps=0.1, steps=1),
    "trades": lambda *of: trades_loss(*of, eps=0.1, steps=1),
    "robustness": lambda *of: evaluate_robustness(*of, eps=0.1, steps=1, restarts=1),
    "average": lambda *of: average_case_flatness(*of, eps=0.1, steps=1, num_perturbations=1),
    "worst": lambda *of: worst_case_flatness(*of, eps=0.1, steps=1, restarts=1),
    "hessian": hessian_extreme_eigenvalues,
}


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny_network(), change

    def forward(self, images):
        return self.change(self.net(images))


OUTPUTS = {
    "tuple of 2": lambda z: (z, z.mean()),
    "list of 1": lambda z: [z],
    "dict of 1": lambda z: {"logits": z},
    "NoneType": lambda z: None,
    r"shape \(3, 10, 1, 1\)": lambda z: z[..., None, None],
    r"shape \(3,\)": lambda z: z[:, 0],
    r"shape \(10, 3\)": lambda z: z.T,
    "binary classifier": lambda z: z[:, :1],
    "torch.int64": lambda z: z.long(),
}


@pytest.mark.parametrize("what", OUTPUTS)
@pytest.mark.parametrize("call", CALLS)
def test_other_outputs_are_refused_in_a_sentence(call, what):
    with pytest.raises(ValueError, match=f"`model` to return logits of shape .* but got .*{what}"):
        CALLS[call](Returns(OUTPUTS[what]), *images_and_labels(3))


@pytest.mark.parametrize("call", CALLS)
def test_probabilities_cause_one_warning(call):
    network, data = Returns(lambda z: z.softmax(1)), images_and_labels(3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for wrapped in (network, nn.Sequential(network)):
            CALLS[call](wrapped, *data)
    assert sum("probabilities" in str(warning.message) for warning in seen) == 1


@pytest.mark.parametrize("change", [lambda z: z, lambda z: z.log_softmax(1), lambda z: z.sigmoid()])
def test_logits_cause_none(change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_robustness(Returns(change), *images_and_labels(3), eps=0.1, steps=1, restarts=1)


def test_images_enter_in_the_type_of_the_weights_and_stay_exact_outside():
    images, labels = images_and_labels(6)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        network = tiny_network().to(dtype)
        adversarial = pgd_attack(network, images, labels, eps=8 / 255, steps=3)
        assert adversarial.dtype == torch.float32
        assert 0.03 < (adversarial - images).abs().max() <= 8 / 255 + 1e-7
    # A function without weights gets what the caller's images are.
    half = images.bfloat16()
    adversarial = pgd_attack(lambda x: network(x.double()), half, labels, eps=8 / 255)
    assert adversarial.dtype == torch.float32
    assert (adversarial - half.float()).abs().max() <= 8 / 255 + 1e-7
