import pytest
import torch
from foreign_project import Foreign
from networks_for_tests import images_and_labels, same, snapshot, tiny_network
from torch import nn
from trainers import dataset, loader, quiet_trainer

from robust_flatness.callbacks import CatastrophicOverfitting, MeasuredCheckpoint
from robust_flatness.functional import PGD
from robust_flatness.measures import Examples, SingleStepRobustness

# Errors under FGSM and PGD by epoch.
OVERFITS = [(0.6, 0.7), (0.4, 0.5), (0.45, 0.55), (0.2, 0.9), (0.1, 0.4), (0.1, 1.0)]


class Scripted(CatastrophicOverfitting):
    """Measures errors of a list, epoch by epoch."""

    def __init__(self, errors, **kwargs):
        super().__init__(dataset=dataset(4), **kwargs)
        self.errors, self.weights = errors, []

    def compute(self, trainer, module):
        self.weights.append(snapshot(module))
        return dict(zip(self.metric_names, (*self.errors[trainer.current_epoch], 0.5)))


def fit(callback, epochs, *others, **kwargs):
    trainer = quiet_trainer(
        max_epochs=epochs, callbacks=[callback, *others], enable_checkpointing=bool(others)
    )
    trainer.fit(Foreign(), loader(8), **kwargs)
    return trainer


def test_warns_once_and_keeps_the_weights_from_before(recwarn):
    callback = Scripted(OVERFITS)
    fit(callback, 6)
    assert (callback.overfitted_epoch, callback.epoch_before) == (3, 1)
    assert same(callback.weights_before, callback.weights[1])
    (message,) = [str(w.message) for w in recwarn if "Catastrophic" in str(w.message)]
    assert "FGSM fell from 40.0% to 20.0%" in message
    assert "PGD-10 rose from 50.0% to 90.0%" in message


@pytest.mark.parametrize(
    "errors",
    [
        # Robust overfitting: both rise. Then a smaller rise than `jump`.
        [(0.4, 0.5), (0.5, 0.7), (0.6, 0.8)],
        [(0.4, 0.5), (0.3, 0.55), (0.2, 0.59)],
    ],
)
def test_other_courses_are_not_catastrophic(errors):
    callback = Scripted(errors)
    fit(callback, 3)
    assert callback.overfitted_epoch is None


def test_a_resumed_run_remembers_and_a_checkpoint_holds_the_weights(tmp_path):
    checkpoint = MeasuredCheckpoint(
        tmp_path, "before", monitor="single_step/pgd_error/val", mode="min"
    )
    first = Scripted(OVERFITS)
    fit(first, 3, checkpoint).save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "before.ckpt", weights_only=True)["state_dict"]
    assert same(saved, first.weights[1])
    resumed = Scripted(OVERFITS)
    fit(resumed, 4, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (resumed.overfitted_epoch, resumed.epoch_before) == (3, 1)
    assert same(resumed.weights_before, first.weights[1])


def test_watching_changes_no_weight_and_logs():
    torch.manual_seed(0)
    callback = CatastrophicOverfitting(dataset=dataset(9), eps=0.1, steps=2, batch_size=4)
    watched = fit(callback, 2)
    torch.manual_seed(0)
    alone = quiet_trainer(max_epochs=2)
    alone.fit(Foreign(), loader(8))
    assert same(snapshot(watched.lightning_module), snapshot(alone.lightning_module))
    assert set(callback.metric_names) <= set(watched.callback_metrics)


def test_a_process_may_have_no_images():
    images, labels = images_and_labels(0)
    result = SingleStepRobustness().measure(tiny_network(), Examples(images, labels, []))
    shapes = [tensor.shape for tensor in (result.fgsm_correct, result.alignments)]
    assert shapes == [(0,), (0,)]


def test_measures_what_the_names_say():
    images, network = images_and_labels(30)[0].double(), tiny_network().double().eval()
    labels = network(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    measure = SingleStepRobustness(eps=0.01, steps=2, restarts=2, batch_size=7)
    result = measure(network, images, labels)
    fgsm = PGD(0.01, 1, 0.01, start="zero")
    attacked = fgsm.attack(network, images, labels, torch.zeros_like(images)).predictions
    correct = attacked == labels
    correct[:3] = False
    assert 3 < correct.sum() < 27
    assert torch.equal(result.fgsm_correct, correct)
    noise = PGD(0.01, start="uniform").starts(images, range(30), seed=0, restart=0)
    assert noise.abs().max() > 0.0095
    gradients = []
    for inputs in (images, images + noise):
        inputs = inputs.clone().requires_grad_()
        nn.functional.cross_entropy(network(inputs), labels, reduction="sum").backward()
        gradients.append(inputs.grad.flatten(1))
    expected = nn.functional.cosine_similarity(*gradients)
    torch.testing.assert_close(result.alignments, expected)
    assert measure.pgd.length == 0.0025
