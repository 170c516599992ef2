import subprocess
import sys

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_network
from torch import nn

from robust_flatness.functional import PGD, average_case_flatness, evaluate_robustness, pgd_attack
from robust_flatness.functional.evaluation import (
    bfloat16_autocast,
    crafts_fast,
    fast_crafting,
    full_float32,
    has_bfloat16,
)

CPU = torch.device("cpu")


class Seen(nn.Module):
    """Notes the type of the logits of each forward."""

    def __init__(self, network):
        super().__init__()
        self.network, self.types = network, []

    def forward(self, images):
        logits = self.network(images)
        self.types.append(logits.dtype)
        return logits


def trained_network(images, labels):
    network = tiny_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(60):
        adversarial = pgd_attack(network, images, labels, eps=0.02, steps=3, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(adversarial), labels).backward()
        optimizer.step()
    return network.eval()


def test_the_cpu_is_left_in_float32():
    assert not has_bfloat16(CPU)
    images, labels = images_and_labels()
    network = Seen(tiny_network())
    with fast_crafting():
        fast = evaluate_robustness(network, images, labels, eps=0.1, steps=2, restarts=2)
    assert set(network.types) == {torch.float32}
    plain = evaluate_robustness(network, images, labels, eps=0.1, steps=2, restarts=2)
    assert torch.equal(fast.losses, plain.losses)


def test_fast_attacks_search_in_bfloat16_and_tell_in_float32(cpu_as_gpu):
    images, labels = images_and_labels()
    network = Seen(tiny_network())
    with fast_crafting():
        found = PGD(0.1, steps=3).attack(network, images, labels, torch.zeros_like(images))
    assert network.types == [torch.bfloat16] * 4 + [torch.float32]
    assert found.images.dtype == torch.float32
    assert (found.images - images).abs().max() <= 0.1 + 1e-6
    logits = tiny_network().eval()(found.images)
    assert torch.equal(found.predictions, logits.argmax(1))
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found.losses, expected, rtol=1e-5, atol=1e-6)


def test_the_last_iterate_needs_no_more_forwards(cpu_as_gpu):
    images, labels = images_and_labels()
    network = tiny_network()
    passes = PassCounter(network)
    with fast_crafting():
        PGD(0.1, steps=3, keep="last").attack(network, images, labels, torch.zeros_like(images))
    assert (passes.forwards, passes.backwards) == (3 * 8, 3 * 8)


def test_robust_loss_is_that_of_float32_within_a_hundredth(cpu_as_gpu):
    images, labels = images_and_labels(64)
    network = trained_network(images, labels)
    settings = {"eps": 0.03, "steps": 10, "restarts": 3}
    plain = evaluate_robustness(network, images, labels, **settings)
    with fast_crafting():
        fast = evaluate_robustness(network, images, labels, **settings)
    assert fast.robust_loss == pytest.approx(plain.robust_loss, rel=0.01)
    assert fast.robust_loss != plain.robust_loss
    assert abs(fast.robust_error - plain.robust_error) <= 1 / 64
    assert torch.equal(fast.clean_losses, plain.clean_losses)


def test_fast_flatness_feels_each_perturbation(cpu_as_gpu):
    images, labels = images_and_labels(32)
    network = trained_network(images, labels)
    settings = {"eps": 0.03, "steps": 5, "num_perturbations": 3}
    plain = average_case_flatness(network, images, labels, **settings)
    with fast_crafting():
        fast = average_case_flatness(network, images, labels, **settings)
        none = average_case_flatness(network, images, labels, xi=0.0, **settings)
    assert fast.value == pytest.approx(plain.value, rel=0.02)
    assert none.value == 0.0


def test_contexts_nest_and_end():
    with fast_crafting(), fast_crafting(False):
        assert not crafts_fast(CPU)
    with pytest.raises(RuntimeError, match="inside"), fast_crafting():
        raise RuntimeError("inside")
    network, (images, _) = tiny_network().eval(), images_and_labels()
    with bfloat16_autocast(CPU):
        assert network(images).dtype == torch.bfloat16
        with full_float32(CPU):
            assert network(images).dtype == torch.float32
        assert network(images).dtype == torch.bfloat16


def test_weights_that_changed_are_cast_anew():
    network, (images, _) = tiny_network().eval(), images_and_labels()
    with torch.no_grad(), bfloat16_autocast(CPU):
        before = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(images)
        with torch.no_grad():
            network[-1].weight.zero_()
        with bfloat16_autocast(CPU):
            assert not torch.equal(network(images), before)


SETTINGS = [
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
]
# In a process of its own: settings of the two kinds cannot all be taken back.
SCRIPT = """
import torch
from robust_flatness.functional.evaluation import without_tf32
{setting}
def state():
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,
    ):
        try:
            found.append(read())
        except (RuntimeError, AttributeError) as error:
            found.append(type(error).__name__)
    return found
before = state()
try:
    with without_tf32():
        inside = state()
        raise ValueError
except ValueError:
    assert state() == before, (before, state())
assert not any("tf32" == value for value in inside[3:]), inside
assert True not in inside[1:3], inside
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_is_given_back(setting):
    if "fp32_precision" in setting and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("PyTorch before 2.9 knows one way to say it")
    script = SCRIPT.format(setting=setting)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
