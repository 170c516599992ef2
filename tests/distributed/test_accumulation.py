"""Gradients accumulated over parts of a batch are those of the batch."""

import pytest
import torch
from networks_for_tests import tiny_body
from torch.utils.data import DataLoader
from trainers import PLAIN, EvalBatchNorm, dataset, quiet_trainer


def trained(batch_size, accumulate, **kwargs):
    """Weights after two epochs in float64, of attacks that start at the images."""
    torch.manual_seed(0)
    module = EvalBatchNorm(tiny_body, **PLAIN, start="zero", **kwargs).double()
    loader = DataLoader(dataset(24, double=True), batch_size)
    quiet_trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(module, loader)
    return {name: value.detach() for name, value in module.named_parameters()}


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing": 0.3, "incorrect": "ignore"}])
def test_two_parts_are_one_batch_of_twice_the_size(kwargs):
    parts, whole = trained(4, 2, **kwargs), trained(8, 1, **kwargs)
    alone = trained(4, 1, **kwargs)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-12)
    assert not torch.allclose(alone["network.0.weight"], whole["network.0.weight"], atol=1e-6)
