"""One call that measures any network on any data."""

import importlib

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from networks_for_tests import images_and_labels, tiny_network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import ToyData

from robust_flatness.callbacks import AutoAttack, FinalEvaluation, evaluate

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def light(**kwargs):
    settings = {"num_examples": 8, "restarts": 1, "steps": 1, "num_perturbations": 1}
    return FinalEvaluation(**{**settings, "eps": 0.1, **kwargs})


def test_a_loader_a_dataset_and_tensors_give_the_same():
    images, labels = images_and_labels(12)
    dataset, network = TensorDataset(images, labels), tiny_network()
    figures = [
        evaluate(network, data, [light(splits=["test"])], **QUIET)
        for data in (dataset, DataLoader(dataset, 5), (images, labels), [images, labels])
    ]
    assert figures[0].keys() >= {"test/robust_loss", "flatness/average/test"}
    assert all(found == figures[0] for found in figures)
    whole = evaluate(network, ToyData(), [light()], **QUIET)
    assert "train_eval/robust_loss" in whole


def test_without_measurements_it_is_the_papers_protocol_on_the_splits_there_are(monkeypatch):
    asked = []

    class Light(FinalEvaluation):
        def __init__(self, **kwargs):
            asked.append(kwargs)
            settings = {"num_examples": 4, "restarts": 1, "steps": 1, "num_perturbations": 0}
            super().__init__(**settings, **kwargs)

    module = importlib.import_module("robust_flatness.callbacks.final_evaluation")
    monkeypatch.setattr(module, "FinalEvaluation", Light)
    assert "test/error" in evaluate(tiny_network(), images_and_labels(4), **QUIET)
    assert "train_eval/error" in evaluate(tiny_network(), ToyData(), **QUIET)
    assert asked == [{"splits": ["test"]}, {}]


def test_a_lightning_module_without_a_test_step_keeps_its_transfer_hooks():
    class Shifted(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = tiny_network()

        def forward(self, images):
            return self.network(images)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] / 2, batch[1]

    images, labels = images_and_labels(12)
    module = Shifted()
    found = evaluate(module, (images, labels), [light(splits=["test"])], **QUIET)
    halved = evaluate(module.network, (images / 2, labels), [light(splits=["test"])], **QUIET)
    assert found == pytest.approx(halved)
    assert not is_overridden("test_step", module)


def test_a_split_that_the_data_lacks_is_refused():
    with pytest.raises(ValueError, match="`split` train"):
        evaluate(tiny_network(), images_and_labels(4), [light()], **QUIET)


IMAGES, LABELS = images_and_labels(4)


@pytest.mark.parametrize(
    ("network", "data", "message"),
    [
        (tiny_network(), IMAGES, r"`data` to be a datamodule, .* but got Tensor"),
        (tiny_network(), (IMAGES, LABELS[:3]), r"got tuple of Tensor\[4, 3, 8, 8\], Tensor\[3\]"),
        (tiny_network(), [IMAGES], r"but got list of Tensor\[4, 3, 8, 8\]"),
        (tiny_network(), "cifar10", "but got str"),
        (tiny_network(), ToyData, "but got the class ToyData"),
        (tiny_network, (IMAGES, LABELS), "`network` to be a torch.nn.Module but got"),
        (nn.Linear(64, 10), (IMAGES, LABELS), r"images of shape \(3, 8, 8\) but it raises Runt"),
        (tiny_network(channels=1), (IMAGES, LABELS), "but it raises RuntimeError"),
        (nn.Identity(), (IMAGES, LABELS), "to return logits"),
        (tiny_network(classes=2), (IMAGES, LABELS), "`labels` to be >= 0 and below the 2 classes"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(network, data, message):
    for measurement in (light(splits=["test"]), AutoAttack(attacks=["apgd-ce"])):
        with pytest.raises(ValueError, match=message):
            evaluate(network, data, [measurement], **QUIET)
    assert torch.is_grad_enabled()
