import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_body
from torch.utils.data import TensorDataset
from trainers import PLAIN, ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import Curvature
from robust_flatness.functional import hessian_extreme_eigenvalues
from robust_flatness.lightning_modules import AT
from robust_flatness.measures import curvature as curvature_module

LIGHT = {"num_examples": 9, "batch_size": 4}


def test_logs_the_functional_value_of_the_first_examples():
    module, data = AT(tiny_body, **PLAIN), dataset(30, seed=4)
    trainer = quiet_trainer(callbacks=[Curvature(dataset=data, **LIGHT)])
    trainer.fit(module, loader())
    found = hessian_extreme_eigenvalues(module.eval(), *data[:9], batch_size=4)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert logged["hessian/max_eigenvalue"] == pytest.approx(found.max_eigenvalue, rel=1e-6)
    assert logged["hessian/min_eigenvalue"] == pytest.approx(found.min_eigenvalue, rel=1e-6)
    assert logged["hessian/convexity"] == pytest.approx(found.convexity_ratio, rel=1e-6)


def test_settings_reach_the_function(monkeypatch):
    given = {}
    original = curvature_module.hessian_extreme_eigenvalues

    def spy(*args, **kwargs):
        given.update(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(curvature_module, "hessian_extreme_eigenvalues", spy)
    settings = {"seed": 3, "tolerance": 0.9, "batch_size": 4}
    callback = Curvature(dataset=dataset(9), **settings)
    callback.compute(quiet_trainer(), AT(tiny_body, **PLAIN))
    assert given == settings


def test_splits_other_than_test_have_names_of_their_own():
    callbacks = [Curvature(**LIGHT), Curvature(split="train", dataset=dataset(9, seed=8), **LIGHT)]
    trainer = quiet_trainer(callbacks=callbacks)
    trainer.fit(AT(tiny_body, **PLAIN), ToyData())
    logged = trainer.callback_metrics
    assert logged["hessian/max_eigenvalue"] != logged["hessian/train/max_eigenvalue"]


def test_measures_in_inference_mode_what_it_does_in_fit():
    module, callback = AT(tiny_body, **PLAIN), Curvature(**LIGHT)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(module, ToyData())
    logged = trainer.callback_metrics["hessian/max_eigenvalue"].item()
    before = snapshot(module)
    (tested,) = quiet_trainer(callbacks=[Curvature(**LIGHT)]).test(module, ToyData(), verbose=False)
    assert tested["hessian/max_eigenvalue"] == logged
    assert same(before, snapshot(module))


@pytest.mark.parametrize("frozen", [True, False])
def test_training_is_bit_identical_with_and_without(frozen):
    ends = []
    for callbacks in ([], [Curvature(every_n_epochs=2, **LIGHT)]):
        torch.manual_seed(0)
        module = AT(tiny_body, **PLAIN)
        module.network[0].weight.requires_grad_(not frozen)
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks)
        torch.manual_seed(0)
        trainer.fit(module, ToyData())
        ends.append(snapshot(module))
    assert same(*ends)


def test_a_diverged_network_is_logged_as_not_finite():
    module = AT(tiny_body, **PLAIN)
    callback = Curvature(dataset=dataset(4), **LIGHT)
    with torch.no_grad():
        module.network[0].weight.fill_(float("nan"))
    trainer = quiet_trainer(callbacks=[callback])
    with pytest.warns(UserWarning, match="not finite"):
        trainer.test(module, loader(), verbose=False)
    assert trainer.callback_metrics["hessian/max_eigenvalue"].isnan()


def test_normalised_modules_are_measured_on_pixels():
    images, labels = images_and_labels(8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    shaped = [torch.tensor(values).view(-1, 1, 1) for values in (mean, std)]

    class Normalised(AT):
        """Expects images that its loader has normalised."""

        def forward(self, images):
            return self.network(images)

    torch.manual_seed(0)
    module = Normalised(tiny_body, **PLAIN).double().eval()
    normalised = (images.double() - shaped[0]) / shaped[1]
    callback = Curvature(
        dataset=TensorDataset(normalised, labels), normalization=(mean, std), tolerance=1e-9
    )
    found = callback.evaluate(quiet_trainer(), module)
    plain = Curvature(
        dataset=TensorDataset(images.double(), labels),
        normalization=([0.0] * 3, [1.0] * 3),
        tolerance=1e-9,
    )
    assert plain.evaluate(quiet_trainer(), module).max_eigenvalue != found.max_eigenvalue
    network = AT(tiny_body, **(PLAIN | {"mean": mean, "std": std})).double()
    network.network.load_state_dict(module.network.state_dict())
    expected = hessian_extreme_eigenvalues(network, images.double(), labels, tolerance=1e-9)
    assert found.max_eigenvalue == pytest.approx(expected.max_eigenvalue, rel=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`tolerance` to be in"):
        Curvature(tolerance=0.0)
    with pytest.raises(ValueError, match="`num_examples` to be >= 1"):
        Curvature(num_examples=0)
