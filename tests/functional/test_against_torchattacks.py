"""Attack strength against another library's PGD at equal settings, on a trained network."""

import pytest
import torch
from networks_for_tests import tiny_body
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, quiet_trainer

from robust_flatness.datamodules import Digits
from robust_flatness.functional import pgd_attack
from robust_flatness.lightning_modules import AT

torchattacks = pytest.importorskip("torchattacks")
EPS, STEPS = 0.2, 10


@pytest.fixture(scope="module")
def trained():
    """A network trained adversarially on Digits for some seconds, and test images."""
    torch.manual_seed(0)
    data = Digits()
    images, labels = (torch.stack(part) for part in zip(*_items(data.split_dataset("train"))))
    module = AT(tiny_body, **{**PLAIN, "in_channels": 1, "mean": [0.3], "std": [0.4], "eps": EPS})
    quiet_trainer(max_epochs=6).fit(module, DataLoader(TensorDataset(images, labels), 50))
    images, labels = (torch.stack(part) for part in zip(*_items(data.split_dataset("test"))))
    return module.eval(), images[:300], labels[:300]


def _items(dataset):
    return [(image, torch.tensor(label)) for image, label in dataset]


def robust_loss(module, adversarial, labels) -> float:
    with torch.no_grad():
        return cross_entropy(module(adversarial), labels).item()


def test_is_as_strong_as_torchattacks_at_equal_settings(trained):
    module, images, labels = trained
    step = EPS * 0.25
    values = {"theirs": [], "last": [], "best": []}
    for seed in range(3):
        torch.manual_seed(seed)
        theirs = torchattacks.PGD(module, eps=EPS, alpha=step, steps=STEPS, random_start=True)
        values["theirs"].append(robust_loss(module, theirs(images, labels), labels))
        for keep in ("last", "best"):
            ours = pgd_attack(
                module,
                images,
                labels,
                eps=EPS,
                steps=STEPS,
                step_size=step,
                start="uniform",
                keep=keep,
                seed=seed,
            )
            values[keep].append(robust_loss(module, ours, labels))
    means = {name: sum(errors) / len(errors) for name, errors in values.items()}
    # Random starts move a single value by one per cent, theirs and ours alike.
    assert means["last"] == pytest.approx(means["theirs"], rel=0.01)
    assert means["best"] >= means["theirs"] * 0.99
    assert all(best >= last for best, last in zip(values["best"], values["last"]))
    assert means["theirs"] > robust_loss(module, images, labels) + 0.3
