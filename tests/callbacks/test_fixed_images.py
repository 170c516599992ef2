"""Promise 14: measures look at the images that the trainer delivers to the module."""

import re
import warnings

import pytest
import torch
from foreign_project import MEAN, NORMALIZATION, STD, Foreign, fitted, normalised, watch
from lightning.pytorch import LightningDataModule
from networks_for_tests import images_and_labels, same, snapshot
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)
from trainers import ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import RobustEarlyStopping
from robust_flatness.datamodules import Digits


def collate(items):
    images, labels = zip(*items)
    return normalised((torch.stack(images), torch.tensor(labels)))


class BeforeTransfer(Foreign):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return normalised(batch)


class AfterTransfer(Foreign):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - self.mean) / STD, *batch[1:]


class Transfer(Foreign):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(normalised(batch), device, dataloader_idx)


class ForeignData(LightningDataModule):
    """Somebody else's datamodule, which sets up its test set late."""

    def setup(self, stage):
        if stage == "test":
            self.test = dataset(9, seed=7)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(12)

    def test_dataloader(self):
        return DataLoader(self.test, 4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return normalised(batch)


class OwnHook(ToyData):
    """A `split_dataset`, and a hook of the user behind it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return normalised(batch)


@pytest.mark.parametrize("how", ["collate", BeforeTransfer, AfterTransfer, Transfer])
@pytest.mark.parametrize("split", ["val", "train"])
def test_normalisation_on_the_way_to_the_module_is_seen(how, split):
    module = Foreign() if how == "collate" else how()
    made = DataLoader(dataset(12), 5, collate_fn=collate if how == "collate" else None)
    measure = watch(split=split, normalization=NORMALIZATION)
    assert torch.allclose(fitted(measure, made, made, module).images, dataset(12).tensors[0])
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\] but got .*normalization="):
        fitted(watch(split=split), made, made, module)


@pytest.mark.parametrize(("data", "seed"), [(ForeignData, 1), (OwnHook, 5)])
def test_hooks_of_a_datamodule_are_seen(data, seed):
    measure = watch(normalization=NORMALIZATION)
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(Foreign(), datamodule=data())
    images = measure.examples(trainer, trainer.lightning_module).images
    assert torch.allclose(images, dataset(len(images), seed=seed).tensors[0])


@pytest.mark.parametrize("source", ["loader", "dataset", "split_dataset"])
def test_pixels_that_were_not_normalised_are_refused(source):
    measure = watch(
        normalization=NORMALIZATION, dataset=dataset(12) if source == "dataset" else None
    )
    data = {"datamodule": ToyData()} if source == "split_dataset" else {}
    data = data or {"train_dataloaders": loader(), "val_dataloaders": loader(12)}
    with pytest.raises(ValueError, match=r"which look like pixels in \[0, 1\] already"):
        quiet_trainer(callbacks=[measure]).fit(Foreign(), **data)


@pytest.mark.parametrize("normalises", [True, False])
def test_pixels_beside_normalised_training_are_a_warning(normalises):
    made = DataLoader(dataset(12), 5, collate_fn=collate if normalises else None)
    measure = watch(dataset=dataset(12))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted(measure, made, max_epochs=2)
    pattern = (
        r"gives the module pixels in \[0, 1\] of split val, but training gives it images in \[-"
    )
    assert len([w for w in found if re.search(pattern, str(w.message))]) == normalises


@pytest.mark.parametrize(
    ("pixels", "mean"),
    [
        (torch.ones(2, 3, 8, 8), MEAN),
        (torch.ones(2, 3, 8, 8) - 0.4 * torch.eye(8), MEAN),
        # Paler than the mean.
        (torch.linspace(0.55, 0.65, 192).view(1, 3, 8, 8), MEAN),
        (torch.full((1, 3, 8, 8), MEAN), MEAN),
        # One dark pixel.
        (torch.ones(4, 3, 8, 8).index_fill(3, torch.tensor(1), 0.4), MEAN),
        # A division by the standard deviation alone.
        (0.2 * images_and_labels(4)[0], 0.0),
    ],
)
def test_normalised_images_are_not_taken_for_pixels(pixels, mean):
    data = TensorDataset((pixels - mean) / STD, torch.arange(len(pixels)))
    measure = watch(dataset=data, normalization=([mean] * 3, [STD] * 3))
    torch.testing.assert_close(fitted(measure).images, pixels)


def test_the_logged_error_is_that_of_the_delivered_images():
    class Turned(Foreign):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].flip(-1), (batch[1] + 3) % 10

    module, trainer = Turned(), quiet_trainer(callbacks=[watch()], max_epochs=2)
    trainer.fit(module, loader(40), loader(40))
    images, labels = dataset(40).tensors
    wrong = module.eval()(images.flip(-1)).argmax(1) != (labels + 3) % 10
    assert float(trainer.callback_metrics["val/error"]) == pytest.approx(wrong.float().mean())


def test_a_test_after_a_fit_has_the_images_of_the_fit():
    measure, module = watch(), Foreign()
    trainer = quiet_trainer(callbacks=[measure], limit_val_batches=0)
    trainer.fit(module, loader(), loader(12, seed=3))
    (logged,) = trainer.test(module, loader(8), verbose=False)
    images = measure.examples(trainer, module).images
    assert torch.equal(images, dataset(12, seed=3).tensors[0])
    assert logged["val/error"] == trainer.callback_metrics["val/error"]
    # Another trainer, as for a test on a single device; and a test that brings the split itself.
    other = quiet_trainer(callbacks=[measure])
    other.test(module, loader(8), verbose=False)
    assert torch.equal(measure.examples(other, module).images, images)
    other.test(module, datamodule=ToyData(), verbose=False)
    assert torch.equal(measure.examples(other, module).images, ToyData().measured.tensors[0])


def test_a_test_has_the_images_of_its_own_loader():
    measure, module = watch(split="test"), Foreign()
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(module, datamodule=ToyData())
    trainer.test(module, loader(8, seed=3), verbose=False)
    assert torch.equal(measure.examples(trainer, module).images, dataset(8, seed=3).tensors[0])


def test_a_missing_split_is_refused_before_it_begins():
    module = Foreign()
    before = snapshot(module)
    with pytest.raises(ValueError, match="DataLoader for `split` test but got NoneType"):
        quiet_trainer(callbacks=[watch(split="test")]).fit(module, loader())
    assert same(before, snapshot(module))
    with pytest.raises(ValueError, match="DataLoader for `split` val but got NoneType"):
        quiet_trainer(callbacks=[watch()]).test(Foreign(), loader(8), verbose=False)
    # There is nothing to select on in a test.
    stopping = RobustEarlyStopping(num_examples=8, steps=1)
    quiet_trainer(callbacks=[stopping]).test(Foreign(), loader(8), verbose=False)


def test_the_test_set_of_a_datamodule_is_set_up_for_a_measure_in_fit():
    measure, data = watch(split="test", normalization=NORMALIZATION), ForeignData()
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(Foreign(), datamodule=data)
    images = measure.examples(trainer, trainer.lightning_module).images
    assert torch.allclose(images, dataset(9, seed=7).tensors[0])
    assert not hasattr(data, "test")


class Staged(LightningDataModule):
    """Sets up the data of a stage, and holds None before."""

    train = val = test = None

    def setup(self, stage):
        if stage == "fit":
            self.train, self.val = dataset(8, seed=3), dataset(9, seed=7)
        elif stage == "test":
            self.test = dataset(9, seed=7)

    def train_dataloader(self):
        return DataLoader(self.train, 4)

    def val_dataloader(self):
        return [DataLoader(self.val, 4)]

    def test_dataloader(self):
        return DataLoader(self.test, 4)


class Lacking(Staged):
    """Has no such attributes before."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name in ("train", "val", "test") and value is None:
            raise AttributeError(name)
        return value


@pytest.mark.parametrize("data", [Staged, Lacking])
@pytest.mark.parametrize(
    ("run", "split", "seed"), [("fit", "test", 7), ("test", "val", 7), ("test", "train", 3)]
)
def test_a_datamodule_is_set_up_for_the_stage_of_a_split(data, run, split, seed):
    measure, data = watch(split=split), data()
    trainer = quiet_trainer(callbacks=[measure])
    getattr(trainer, run)(Foreign(), datamodule=data)
    images = measure.examples(trainer, trainer.lightning_module).images
    assert torch.equal(images, dataset(len(images), seed=seed).tensors[0])
    assert vars(data).get(split) is None


def test_a_loader_without_a_dataset_is_refused():
    class Never(Staged):
        def setup(self, stage):
            if stage == "fit":
                super().setup(stage)

    message = "the loader of `split` test to have a dataset but got None; pass `dataset=`"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=[watch(split="test")]).fit(Foreign(), datamodule=Never())


class Named(Staged):
    """What it returns is given."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def split_dataset(self, name):
        return self.result[name]


@pytest.mark.parametrize(
    ("data", "came"),
    [(Named({"val": None}), "NoneType"), (Named({}), "KeyError: 'val'"), (Named(3), "TypeError: ")],
)
def test_a_split_dataset_that_returns_something_else_is_refused(data, came):
    message = f"`split_dataset` of Named to return the dataset of a split, but for val got {came}"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=[watch()]).fit(Foreign(), datamodule=data)


@pytest.mark.parametrize(
    "method",
    [lambda: 1 / 0, lambda ratio=0.1: 1 / 0, lambda images, ratio: 1 / 0, ["train", "val"]],
)
def test_a_split_dataset_that_serves_something_else_is_left_alone(method):
    measure, data = watch(), Staged()
    data.split_dataset = method
    trainer = quiet_trainer(callbacks=[measure])
    trainer.fit(Foreign(), datamodule=data)
    images = measure.examples(trainer, trainer.lightning_module).images
    assert torch.equal(images, dataset(9, seed=7).tensors[0])


def test_own_datamodules_are_read_without_a_fork(monkeypatch):
    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr("robust_flatness.callbacks.delivery.in_fork", forbidden)
    measure = watch(num_examples=6)
    module = Foreign()
    module.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    trainer = quiet_trainer(callbacks=[measure], limit_train_batches=1)
    trainer.fit(module, datamodule=Digits(batch_size=20))
    assert len(measure.examples(trainer, module)) == 6


IMAGES, LABELS = images_and_labels(8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dataset(0), "`dataset` to have images but got an empty one"),
        ([{"image": 1}], "begin with an image tensor, all of one shape"),
        ([("a picture", 1)], "begin with an image tensor, all of one shape"),
        ([(torch.rand(3, 8, 8), "cat")], "begin with an image tensor, all of one shape"),
        (TensorDataset(IMAGES * 2 - 1, LABELS), r"pixels in \[0, 1\] but got .*normalization="),
        (TensorDataset(IMAGES, LABELS + 10), "below the 10 classes but got"),
    ],
)
def test_datasets_that_are_something_else_are_refused_before_training(data, message):
    module = Foreign()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        fitted(watch(dataset=data), module=module)
    assert same(before, snapshot(module))


@pytest.mark.parametrize("split", ["val", "test"])
def test_images_of_a_single_class_are_a_warning(split):
    images, _ = images_and_labels(12)
    made = DataLoader(TensorDataset(images, torch.arange(12) // 6), 4)
    trainer = quiet_trainer(callbacks=[watch(split=split, num_examples=6)])
    run = trainer.test if split == "test" else lambda m, val: trainer.fit(m, loader(), val)
    with pytest.warns(UserWarning, match="All 6 measured images of split .* class 0 .* 10 classes"):
        run(Foreign(), made)


@pytest.mark.parametrize("through_loader", [True, False])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: y[:, None], None),
        (lambda y: y.float()[:, None], None),
        (lambda y: y.to(torch.uint8), None),
        (lambda y: torch.nn.functional.one_hot(y, 10), r"torch.int64 of shape \(12, 10\)"),
        (lambda y: torch.rand(12, 10).softmax(1), r"torch.float32 of shape \(12, 10\)"),
        (lambda y: y + 0.5, r"torch.float32 of shape \(12,\) with fractions"),
        (lambda y: torch.rand(12, 1), r"torch.float32 of shape \(12,\) with fractions"),
    ],
)
def test_labels_are_one_class_of_each_image(through_loader, make, message):
    images, labels = images_and_labels(12)
    data = TensorDataset(images, make(labels))
    # One image is a batch of its own, whose labels must not be taken for another dimension.
    measure = watch() if through_loader else watch(dataset=data)
    if message is None:
        found = fitted(measure, None, DataLoader(data, 11)).labels
        assert torch.equal(found, labels)
    else:
        with pytest.raises(ValueError, match=f"one class index for each image, .*{message}"):
            fitted(measure, None, DataLoader(data, 11))


@pytest.mark.parametrize("through_loader", [True, False])
@pytest.mark.parametrize(
    ("second", "third", "refused"),
    [
        (torch.arange(12), torch.arange(12) % 10, True),
        (torch.arange(12).flip(0), torch.arange(12) % 10, True),
        # One image of each class, with an index, a weight or a mask.
        (torch.arange(12), torch.arange(12).flip(0), False),
        (torch.arange(12), torch.rand(12), False),
        (torch.arange(12), torch.arange(12) > 6, False),
        (torch.arange(12) % 10, torch.arange(12), False),
    ],
)
def test_indices_in_the_place_of_labels_are_refused(through_loader, second, third, refused):
    data = TensorDataset(images_and_labels(12)[0], second, third)
    measure, module = watch() if through_loader else watch(dataset=data), Foreign()
    module.net[-1] = torch.nn.Linear(256, 100)
    if refused:
        with pytest.raises(ValueError, match=r"0 to 11, each once, .* as in \(image, index, label"):
            fitted(measure, None, DataLoader(data, 5), module)
    else:
        assert torch.equal(fitted(measure, None, DataLoader(data, 5), module).labels, second)
