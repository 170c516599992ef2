import subprocess
import sys

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_network
from torch import nn

from robust_flatness.functional import PGD, pgd_attack
from robust_flatness.functional.evaluation import bfloat16_autocast, full_float32, has_bfloat16
from robust_flatness.functional.flatness import measure_flatness
from robust_flatness.functional.robust_loss import AttackedSet, measure_robustness

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


def test_without_bfloat16_an_attack_is_in_float32():
    assert not has_bfloat16(CPU)
    images, labels = images_and_labels()
    network, start = Seen(tiny_network()), torch.zeros(8, 3, 8, 8)
    plain, fast = (
        PGD(0.1, steps=2, precision=precision).attack(network, images, labels, start)
        for precision in ("float32", "bfloat16")
    )
    assert set(network.types) == {torch.float32}
    assert torch.equal(fast.images, plain.images)


def test_searches_in_bfloat16_and_evaluates_in_float32(cpu_as_gpu):
    images, labels = images_and_labels()
    network = Seen(tiny_network())
    pgd = PGD(0.1, steps=3, precision="bfloat16")
    kept = pgd.attack(network, images, labels, torch.zeros_like(images))
    assert network.types == [torch.bfloat16] * 4 + [torch.float32]
    assert kept.images.dtype == torch.float32
    assert (kept.images - images).abs().max() <= 0.1 + 1e-6
    logits = tiny_network().eval()(kept.images)
    assert torch.equal(kept.predictions, logits.argmax(1))
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(kept.losses, expected, rtol=1e-5, atol=1e-6)


def test_the_last_iterate_needs_no_more_forwards(cpu_as_gpu):
    images, labels = images_and_labels()
    network = tiny_network()
    passes = PassCounter(network)
    pgd = PGD(0.1, steps=3, keep="last", precision="bfloat16")
    pgd.attack(network, images, labels, torch.zeros_like(images))
    assert (passes.forwards, passes.backwards) == (3 * 8, 3 * 8)


def test_robust_loss_is_that_of_float32_within_a_hundredth(cpu_as_gpu):
    images, labels = images_and_labels(64)
    network = trained_network(images, labels)
    plain, fast = (
        measure_robustness(
            network, AttackedSet(images, labels, PGD(0.03, 10, precision=precision), restarts=3)
        )
        for precision in ("float32", "bfloat16")
    )
    assert fast.robust_loss == pytest.approx(plain.robust_loss, rel=0.01)
    assert fast.robust_loss != plain.robust_loss
    assert abs(fast.robust_error - plain.robust_error) <= 1 / 64
    assert torch.equal(fast.clean_losses, plain.clean_losses)


def test_flatness_in_bfloat16_depends_on_each_perturbation(cpu_as_gpu):
    images, labels = images_and_labels(32)
    network = trained_network(images, labels)

    def flatness(precision, xi=0.5):
        pgd = PGD(0.03, 5, precision=precision)
        return measure_flatness(
            network,
            AttackedSet(images, labels, pgd),
            xi=xi,
            num_perturbations=3,
            protocol="shared",
            loss="robust",
            distribution="sphere",
            relative_to="layer",
            per_batch=False,
        ).value

    assert flatness("bfloat16") == pytest.approx(flatness("float32"), rel=0.02)
    assert flatness("bfloat16", xi=0.0) == 0.0


def test_full_float32_inside_bfloat16():
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
# In processes of their own: settings of the two kinds cannot all be undone.
SCRIPT = """
import os, sys
import torch
from robust_flatness.functional.evaluation import without_tf32

def state():
    values = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.cudnn.conv.fp32_precision,
    ):
        try:
            values.append(read())
        except (RuntimeError, AttributeError) as error:
            values.append(type(error).__name__)
    return values

def check(setting):
    exec(setting)
    before = state()
    try:
        with without_tf32():
            inside = state()
            raise ValueError
    except ValueError:
        assert state() == before, (setting, before, state())
    assert "tf32" not in inside[3:] and True not in inside[1:3], (setting, inside)

for setting in sys.argv[1:]:
    child = os.fork()
    if not child:
        check(setting)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""


def test_tf32_settings_are_restored():
    new = hasattr(torch.backends.cudnn, "conv")
    # PyTorch before 2.9 has one kind of setting.
    settings = [setting for setting in SETTINGS if new or "fp32_precision" not in setting]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *settings], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
