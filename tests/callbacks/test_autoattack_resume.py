"""An AutoAttack that was killed goes on behind its last finished chunk, or attacks anew."""

from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from networks_for_tests import tiny_body
from torch import nn
from torch.utils.data import TensorDataset
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import AutoAttack, RobustEarlyStopping
from robust_flatness.callbacks.final_evaluation import AUTOATTACK_FOLDER as FOLDER
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.measures import AutoAttackError

EPS = 0.02


class Killed(Exception):
    """Stands in for a kill."""


class Counting(AutoAttackError):
    """Counts the chunks that it attacks, and may be killed."""

    def __init__(self, *, killed_after=None, **kwargs):
        super().__init__(**{"attacks": ["apgd-ce"], "chunk_size": 4, "eps": EPS, **kwargs})
        self.chunks, self.killed_after = [], killed_after

    def attack(self, network, images, labels):
        if len(self.chunks) == self.killed_after:
            raise Killed
        self.chunks.append(len(images))
        return super().attack(network, images, labels)


class Pretending(Counting):
    """Only counts: every image is robust."""

    def attack(self, network, images, labels):
        self.chunks.append(len(images))
        return torch.ones_like(labels, dtype=torch.bool)


def callback_of(measure, **kwargs):
    """The callback with a measure that counts."""
    callback = AutoAttack(**kwargs)
    callback.measure = measure
    return callback


def trained(epochs=15):
    torch.manual_seed(0)
    module = AT(tiny_body, **{**PLAIN, "eps": EPS})
    quiet_trainer(max_epochs=epochs).fit(module, loader(16))
    return module.eval()


class FirstEpoch(RobustEarlyStopping):
    """Takes the first epoch for the best."""

    def compute(self, trainer, module):
        return {"val/robust_error": 0.1 + 0.1 * trainer.current_epoch}


def fit(folder, killed_after=None, **kwargs):
    """Trains and attacks 10 images in 3 chunks, with last and with early-stopped weights."""
    ten = TensorDataset(*dataset(16)[:10])
    attack = callback_of(Counting(killed_after=killed_after), dataset=ten)
    last = ModelCheckpoint(folder / "checkpoints", filename="last", enable_version_counter=False)
    torch.manual_seed(0)
    trainer = quiet_trainer(
        max_epochs=30,
        logger=EpochCSVLogger(folder),
        callbacks=[attack, FirstEpoch(dataset=dataset(4), steps=1), last],
        enable_checkpointing=True,
    )
    with suppress(Killed):
        trainer.fit(AT(tiny_body, **{**PLAIN, "eps": EPS}), loader(16), **kwargs)
    return attack


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The attack of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    attack = fit(folder)
    assert attack.measure.chunks == [4, 4, 2] * 2
    assert not (folder / FOLDER).exists()
    return attack


def test_a_killed_run_attacks_what_is_left_and_ends_as_the_whole_one(whole, tmp_path):
    # In the middle of the early-stopped weights' chunks.
    fit(tmp_path / "killed", killed_after=4)
    assert len(list((tmp_path / "killed" / FOLDER).iterdir())) == 4
    ended = fit(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert ended.measure.chunks == [4, 2]
    assert ended.final_results == whole.final_results
    assert ended.final_arrays.keys() == whole.final_arrays.keys()
    for name, verdicts in whole.final_arrays.items():
        assert torch.equal(ended.final_arrays[name], verdicts)
    both = torch.stack(list(whole.final_arrays.values()))
    assert both.any()
    assert not both.all()
    assert not (tmp_path / "killed" / FOLDER).exists()


def kept_by(folder, module, data=None, **kwargs):
    """Number of chunks that are attacked although the verdicts of `trained` are kept."""
    measure = Pretending(**kwargs)
    measure.folder = folder
    measure(module, *(data or dataset(8))[:])
    return len(measure.chunks)


OTHERS = {
    "eps": {"eps": 2 * EPS},
    "norm": {"norm": "l2"},
    "attacks": {"attacks": ["apgd-dlr"]},
    "seed": {"seed": 1},
    "images": {"data": dataset(8, seed=2)},
    "labels": {"data": TensorDataset(dataset(8)[:][0], (dataset(8)[:][1] + 1) % 10)},
    "type": {"data": dataset(8, double=True)},
}


@pytest.mark.parametrize("changed", OTHERS)
def test_verdicts_of_other_settings_are_not_taken(changed, tmp_path):
    module = trained(1)
    assert [kept_by(tmp_path, module) for _ in range(2)] == [2, 0]
    other = module.double() if changed == "type" else module
    assert kept_by(tmp_path, other, **OTHERS[changed]) == 2


def test_verdicts_of_other_weights_or_statistics_are_not_taken(tmp_path):
    module = trained(1)
    assert kept_by(tmp_path, module) == 2
    tensors = [module.network[0].weight, module.network[1].running_mean]
    for tensor in tensors:
        first = (0,) * tensor.dim()
        with torch.no_grad():
            tensor[first] = torch.nextafter(tensor[first], torch.tensor(9.0))
        assert [kept_by(tmp_path, module) for _ in range(2)] == [2, 0]


def test_verdicts_of_equal_weights_in_another_network_are_not_taken(tmp_path):
    module = trained(1)
    assert kept_by(tmp_path, module) == 2
    places = [i for i, layer in enumerate(module.network) if isinstance(layer, nn.ReLU)]
    module.network[places[0]] = nn.SiLU()
    assert kept_by(tmp_path, module) == 2


def test_images_of_a_type_that_numpy_lacks_are_kept_too(tmp_path):
    module, (images, labels) = trained(1), dataset(8)[:]
    half = TensorDataset(images.bfloat16(), labels)
    assert [kept_by(tmp_path, module, half) for _ in range(2)] == [2, 0]


def test_a_chunk_at_another_place_is_another_one(tmp_path):
    module = trained(1)
    images, labels = dataset(4)[:]
    assert kept_by(tmp_path, module, TensorDataset(images, labels)) == 1
    twice = TensorDataset(images.repeat(2, 1, 1, 1), labels.repeat(2))
    assert kept_by(tmp_path, module, twice) == 1


def test_broken_files_and_folders_that_cannot_be_written_cost_an_attack(tmp_path):
    module = trained(1)
    assert kept_by(tmp_path / "run", module) == 2
    first, second = (tmp_path / "run").iterdir()
    first.write_bytes(first.read_bytes()[:40])
    second.write_bytes(b"")
    assert [kept_by(tmp_path / "run", module) for _ in range(2)] == [2, 0]
    (tmp_path / "file").touch()
    assert [kept_by(tmp_path / "file", module) for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("logger", [False, CSVLogger("logs")])
def test_without_a_run_folder_nothing_is_kept(logger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = callback_of(Pretending(), dataset=dataset(4))
    trainer = quiet_trainer(logger=logger, callbacks=[attack], default_root_dir=tmp_path)
    trainer.fit(AT(tiny_body, **PLAIN), loader(8))
    assert attack.measure.chunks == [4]
    assert attack.measure.folder is None
    assert not list(tmp_path.rglob(f"*{FOLDER}*"))


def test_clearing_leaves_what_others_put_there(tmp_path):
    module = trained(1)
    kept_by(tmp_path / FOLDER, module)
    (tmp_path / FOLDER / "mine.txt").touch()
    measure = AutoAttackError()
    measure.folder = tmp_path / FOLDER
    measure.remove_verdicts()
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["mine.txt"]


def test_images_that_are_wrong_when_clean_are_not_attacked():
    module, sizes = trained(), []
    images, _ = dataset(8)[:]
    predicted = module(images).argmax(1).detach()
    labels = torch.where(torch.arange(8) < 3, predicted, (predicted + 1) % 10)

    def attacked(labels):
        sizes.clear()
        hook = module.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        Counting(chunk_size=8)(module, images, labels)
        hook.remove()
        return sizes

    none = len(attacked((predicted + 1) % 10))
    # What tells the classes, and the package's look at the network: no attack.
    assert none < 12
    assert set(attacked(labels)[none:]) <= {1, 2, 3}
    assert len(sizes) > 100
