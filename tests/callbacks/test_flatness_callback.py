import pytest
import torch
from networks_for_tests import images_and_labels, tiny_body
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
from trainers import PLAIN, ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import Flatness, RobustEvaluation
from robust_flatness.functional import average_case_flatness, evaluate_robustness
from robust_flatness.lightning_modules import AT

SETTINGS = {"eps": 0.1, "steps": 2, "batch_size": 5}


def test_logs_the_functional_value_of_the_first_examples():
    module, data = AT(tiny_body, **PLAIN), dataset(30, seed=4)
    callback = Flatness(dataset=data, num_examples=13, num_perturbations=3, **SETTINGS)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(module, loader())
    images, labels = data[:13]
    found = average_case_flatness(module.eval(), images, labels, num_perturbations=3, **SETTINGS)
    logged = trainer.callback_metrics
    assert logged["flatness/average/test"].item() == pytest.approx(found.value, rel=1e-6)
    assert logged["flatness/average/test_sem"].item() == pytest.approx(
        found.standard_error, rel=1e-5
    )


def test_robust_evaluation_logs_the_functional_value():
    module, data = AT(tiny_body, **PLAIN), dataset(30, seed=4)
    callback = RobustEvaluation(dataset=data, num_examples=13, restarts=2, **SETTINGS)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(module, loader())
    found = evaluate_robustness(module.eval(), *data[:13], restarts=2, **SETTINGS)
    logged = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert logged["test/robust_loss"] == pytest.approx(found.robust_loss, rel=1e-6)
    assert logged["test/robust_error"] == pytest.approx(found.robust_error)
    assert logged["test/error"] == pytest.approx(found.error)
    assert logged["test/robust_loss_incorrect"] == pytest.approx(
        found.robust_loss_incorrect, rel=1e-6
    )


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunk_size_does_not_change_the_value(chunk):
    module = AT(tiny_body, **PLAIN).double()
    data = dataset(13, double=True)
    settings = {"dataset": data, "num_perturbations": 2, "eps": 0.1, "steps": 2}
    plain = Flatness(batch_size=5, **settings).compute(quiet_trainer(), module)
    other = Flatness(batch_size=chunk, **settings).compute(quiet_trainer(), module)
    assert other["flatness/average/test"] == pytest.approx(plain["flatness/average/test"], abs=1e-9)


def test_measures_first_every_nth_and_last_epoch():
    callback = Flatness(dataset=dataset(4), num_perturbations=1, every_n_epochs=3, **SETTINGS)
    epochs = []
    compute = callback.compute
    callback.compute = lambda trainer, module: (
        epochs.append(trainer.current_epoch) or compute(trainer, module)
    )
    quiet_trainer(max_epochs=6, callbacks=[callback]).fit(AT(tiny_body, **PLAIN), loader(8))
    assert epochs == [0, 3, 5]


def test_takes_split_and_radius_from_the_datamodule():
    data = ToyData()
    callback = Flatness(split="train", num_perturbations=1, steps=2)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(AT(tiny_body, **PLAIN), data)
    assert torch.equal(callback.examples(trainer, trainer.lightning_module).images, data.measured.tensors[0])
    assert trainer.callback_metrics["flatness/average/train"] != 0


def test_takes_the_trainers_loaders_in_order_without_shuffling():
    train, val = dataset(16), dataset(16, seed=9)
    callbacks = [
        Flatness(split=split, num_perturbations=1, **SETTINGS) for split in ("train", "val")
    ]

    class WithValidation(AT):
        def validation_step(self, batch, batch_idx):
            pass

    trainer, module = quiet_trainer(callbacks=callbacks), WithValidation(tiny_body, **PLAIN)
    trainer.fit(module, DataLoader(train, 8, shuffle=True), DataLoader(val, 8, shuffle=True))
    for callback, expected in zip(callbacks, (train, val)):
        assert torch.equal(callback.examples(trainer, module).images, expected.tensors[0])


def test_a_missing_split_is_named_before_training():
    module = AT(tiny_body, **PLAIN)
    before = module.network[0].weight.detach().clone()
    with pytest.raises(ValueError, match="DataLoader for `split` test but got NoneType"):
        quiet_trainer(callbacks=[Flatness()]).fit(module, loader())
    assert torch.equal(before, module.network[0].weight)


def test_normalised_datasets_are_measured_in_pixels():
    images, labels = images_and_labels(13)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    shaped = [torch.tensor(v).view(-1, 1, 1) for v in (mean, std)]

    class Normalised(AT):
        """Expects images that its loader has normalised."""

        def forward(self, images):
            return self.network(images)

    torch.manual_seed(0)
    module = Normalised(tiny_body, **PLAIN).double().eval()
    normalised = TensorDataset((images.double() - shaped[0]) / shaped[1], labels)
    callback = Flatness(
        dataset=normalised, normalization=(mean, std), num_perturbations=2, **SETTINGS
    )
    found = callback.compute(quiet_trainer(), module)

    class InPixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner((x - shaped[0].double()) / shaped[1].double())

    expected = average_case_flatness(
        InPixels(), images.double(), labels, num_perturbations=2, **SETTINGS
    )
    assert found["flatness/average/test"] == pytest.approx(expected.value, abs=1e-6)


def test_forgotten_normalization_is_named():
    images, labels = images_and_labels(8)
    callback = Flatness(dataset=TensorDataset(images * 2 - 1, labels))
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] but got .*normalization="):
        quiet_trainer(callbacks=[callback]).fit(AT(tiny_body, **PLAIN), loader())


def test_two_splits_live_side_by_side(tmp_path):
    callbacks = [
        Flatness(split=split, dataset=dataset(8, seed=seed), num_perturbations=1, **SETTINGS)
        for split, seed in (("test", 1), ("train", 2))
    ]
    trainer = quiet_trainer(callbacks=callbacks)
    trainer.fit(AT(tiny_body, **PLAIN), loader())
    assert {"flatness/average/test", "flatness/average/train"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "valid"}, "`split` to be one of train, val, test but got valid"),
        ({"num_perturbations": 0}, "`num_perturbations` to be >= 1 but got 0"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be >= 1 but got 0"),
        ({"eps": -1.0}, "`eps` to be >= 0 but got -1.0"),
        ({"xi": -0.5}, "`xi` to be >= 0 but got -0.5"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Flatness(**kwargs)


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="`dataset` to have images but got an empty one"):
        Flatness(dataset=dataset(0)).compute(quiet_trainer(), AT(tiny_body, **PLAIN))


def test_a_sampler_that_makes_the_split_is_followed():
    data = dataset(16)
    callback = Flatness(split="train", num_perturbations=1, **SETTINGS)
    sampler = SubsetRandomSampler([3, 5, 7, 9])
    trainer, module = quiet_trainer(callbacks=[callback]), AT(tiny_body, **PLAIN)
    trainer.fit(module, DataLoader(data, 2, sampler=sampler))
    assert torch.equal(callback.examples(trainer, module).images, data.tensors[0][[3, 5, 7, 9]])


def test_a_sampler_that_may_leave_images_out_is_refused():
    sampler = WeightedRandomSampler(torch.ones(16), 8)
    with pytest.raises(ValueError, match="but got a WeightedRandomSampler"):
        quiet_trainer(callbacks=[Flatness(split="train")]).fit(
            AT(tiny_body, **PLAIN), DataLoader(dataset(16), 2, sampler=sampler)
        )


@pytest.mark.parametrize(
    "items", [[{"image": 1}], [("a picture", 1)], [(torch.rand(3, 8, 8), "cat")]]
)
def test_items_of_another_form_are_named(items):
    with pytest.raises(ValueError, match="begin with an image tensor, all of one shape"):
        Flatness(dataset=items).compute(quiet_trainer(), AT(tiny_body, **PLAIN))


def test_labels_beyond_the_network_are_named_before_training():
    images, labels = images_and_labels(8)
    labels[0] = 12
    with pytest.raises(ValueError, match="below the 10 classes but got"):
        quiet_trainer(callbacks=[Flatness(dataset=TensorDataset(images, labels))]).fit(
            AT(tiny_body, **PLAIN), loader()
        )


def test_measures_in_l2_too():
    data, module = dataset(8), AT(tiny_body, **PLAIN)
    light = {"dataset": data, "eps": 0.5, "steps": 2}
    values = [
        RobustEvaluation(norm=norm, **light).compute(quiet_trainer(), module)["test/robust_loss"]
        for norm in ("linf", "l2")
    ]
    # The L2 ball lies within the Linf ball of the same radius.
    assert values[1] < values[0]
