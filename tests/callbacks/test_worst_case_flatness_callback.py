import math

import pytest
import torch
from networks_for_tests import same, snapshot, tiny_body
from torch.utils.data import TensorDataset
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import Flatness, WorstCaseFlatness
from robust_flatness.functional import average_case_flatness, worst_case_flatness
from robust_flatness.lightning_modules import AT

SETTINGS = {"eps": 0.1, "steps": 2, "batch_size": 5}
WORST = {**SETTINGS, "restarts": 2, "xi": 0.05, "weight_step": 0.03}


def module() -> AT:
    torch.manual_seed(0)
    return AT(tiny_body, **PLAIN)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"loss": "clean"},
        # Weights stay at their start and images overshoot, so that the last iterate is not best.
        {"keep": "best", "weight_step": 0.0, "step_size": 0.2},
        {"per_batch": True},
        {"norm": "l2"},
    ],
)
def test_logs_the_functional_value_of_the_first_examples(choice):
    data, network = dataset(30, seed=4), module()
    callback = WorstCaseFlatness(dataset=data, num_examples=13, **{**WORST, **choice})
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(network, loader())
    found = worst_case_flatness(network, *data[:13], **{**WORST, **choice})
    name = f"flatness/{'clean_worst' if 'loss' in choice else 'worst'}/test"
    assert trainer.callback_metrics[name].item() == pytest.approx(found.value, rel=1e-6)
    assert callback.arrays[name].mean().item() == pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize(
    "choice",
    [
        {"loss": "clean"},
        {"loss": "clean", "protocol": "paper"},
        {"distribution": "ball", "relative_to": "filter"},
        {"relative_to": "network"},
        {"per_batch": True},
    ],
)
def test_average_case_options_reach_the_functional_value(choice):
    data, network = dataset(30, seed=4), module()
    callback = Flatness(dataset=data, num_examples=13, num_perturbations=3, **SETTINGS, **choice)
    logged = callback.compute(quiet_trainer(), network)
    found = average_case_flatness(network, *data[:13], num_perturbations=3, **SETTINGS, **choice)
    name = f"flatness/{'clean_average' if 'loss' in choice else 'average'}/test"
    assert logged == {name: found.value, f"{name}_sem": found.standard_error}
    assert callback.arrays[name].mean().item() == pytest.approx(found.value)
    plain = average_case_flatness(network, *data[:13], num_perturbations=3, **SETTINGS)
    assert found.value != plain.value


@pytest.mark.parametrize("loss", ["robust", "clean"])
@pytest.mark.parametrize(
    ("measure", "choice"),
    [(Flatness, {}), (Flatness, {"protocol": "paper"}), (WorstCaseFlatness, {})],
)
def test_progress_ends_where_it_was_announced(monkeypatch, measure, choice, loss):
    totals, calls = [], []

    class Bar:
        def __init__(self, trainer, what, total):
            totals.append(total)

        def __enter__(self):
            return lambda: calls.append(0)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("robust_flatness.callbacks.measuring._progress_bar", Bar)
    callback = measure(dataset=dataset(13), loss=loss, restarts=2, **SETTINGS, **choice)
    callback.compute(quiet_trainer(), module())
    assert [len(calls)] == totals


class Watched(AT):
    """Also tests."""

    def test_step(self, batch, batch_idx):
        pass

    def test_dataloader(self):
        return loader()


def test_training_is_bit_identical_with_all_flatness_measures_on():
    def trained(callbacks):
        torch.manual_seed(0)
        network = AT(tiny_body, **PLAIN)
        quiet_trainer(max_epochs=2, callbacks=callbacks).fit(network, loader())
        return snapshot(network)

    data = dataset(12, seed=2)
    callbacks = [
        measure(dataset=data, loss=loss, **SETTINGS)
        for measure in (Flatness, WorstCaseFlatness)
        for loss in ("robust", "clean")
    ]
    assert same(trained([]), trained(callbacks))


def test_works_in_real_inference_mode():
    torch.manual_seed(0)
    network = Watched(tiny_body, **PLAIN)
    before, state = snapshot(network), [p.requires_grad for p in network.parameters()]
    callbacks = [
        WorstCaseFlatness(dataset=dataset(13), loss=loss, **WORST) for loss in ("robust", "clean")
    ]
    (logged,) = quiet_trainer(callbacks=callbacks).test(network, verbose=False)
    expected = worst_case_flatness(network, *dataset(13)[:], **WORST)
    assert logged["flatness/worst/test"] == pytest.approx(expected.value, rel=1e-6)
    assert math.isfinite(logged["flatness/clean_worst/test"])
    assert same(before, snapshot(network))
    assert state == [p.requires_grad for p in network.parameters()]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunk_size_does_not_change_the_value(chunk):
    network, data = module().double(), dataset(13, double=True)
    plain, other = (
        WorstCaseFlatness(dataset=data, **{**WORST, "batch_size": size}).compute(
            quiet_trainer(), network
        )["flatness/worst/test"]
        for size in (5, chunk)
    )
    assert other == pytest.approx(plain, abs=1e-9)


def test_normalised_datasets_are_measured_in_pixels():
    mean, std = [0.5] * 3, [0.5] * 3
    images, labels = dataset(13)[:]
    given = {"normalization": (mean, std), **WORST}

    class Normalised(AT):
        """Expects images that its loader has normalised."""

        def forward(self, images):
            return self.network(images)

    torch.manual_seed(0)
    network = Normalised(tiny_body, **PLAIN).eval()
    data = TensorDataset((images - 0.5) / 0.5, labels)
    found = WorstCaseFlatness(dataset=data, **given).compute(quiet_trainer(), network)

    class InPixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return self.inner((x - 0.5) / 0.5)

    expected = worst_case_flatness(InPixels(), images, labels, **WORST)
    assert found["flatness/worst/test"] == pytest.approx(expected.value, rel=1e-4)


@pytest.mark.parametrize(
    ("measure", "kwargs", "message"),
    [
        (WorstCaseFlatness, {"xi": -0.5}, "`xi` to be >= 0 but got -0.5"),
        (WorstCaseFlatness, {"steps": 0}, "`steps` to be >= 1 but got 0"),
        (WorstCaseFlatness, {"weight_step": -1.0}, "`weight_step` to be >= 0 but got -1.0"),
        (WorstCaseFlatness, {"loss": "both"}, "`loss` to be one of robust, clean but got both"),
        (WorstCaseFlatness, {"keep": "first"}, "`keep` to be one of best, last but got first"),
        (Flatness, {"loss": "both"}, "`loss` to be one of robust, clean but got both"),
        (Flatness, {"protocol": "own"}, "`protocol` to be one of shared, paper but got own"),
        (Flatness, {"distribution": "box"}, "`distribution` to be one of sphere, ball but got box"),
        (Flatness, {"relative_to": "row"}, "`relative_to` to be one of layer, .* but got row"),
    ],
)
def test_bad_arguments_are_named(measure, kwargs, message):
    with pytest.raises(ValueError, match=message):
        measure(**kwargs)
