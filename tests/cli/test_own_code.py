"""A user's own modules, networks and data in the current folder, also with normalised images."""

import json
import sys
from pathlib import Path

import pytest

from robust_flatness.cli import CLI, main

OWN_DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class Pixels(LightningDataModule):
    num_classes, in_channels, mean, std, eps = 3, 1, [0.3], [0.4], 0.1
    normalized = False

    def loader(self, seed):
        images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        images = (images - 0.3) / 0.4 if self.normalized else images
        return DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=8)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)

class Normalized(Pixels):
    normalized, normalization = True, ([0.3], [0.4])

class Untold(Pixels):
    normalized = True

class Mistaken(Pixels):
    normalization = ([0.3], [0.4])

class Named(Pixels):
    normalization = "imagenet"
"""
OWN_MODEL = """
import torch
from lightning.pytorch import LightningModule
from robust_flatness.lightning_modules import AT
from torch import nn

class MyAT(AT):
    def training_step(self, batch, batch_idx):
        assert 0 <= batch[0].min() and batch[0].max() <= 1
        return super().training_step(batch, batch_idx)

class Plain(LightningModule):
    def __init__(self, normalizes: bool = False):
        super().__init__()
        self.normalizes = normalizes
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def forward(self, images):
        return self.net((images - 0.3) / 0.4 if self.normalizes else images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
"""
OWN_NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, width: int = 2):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 7), nn.Flatten(),
                                    nn.Linear(width * 4, num_classes))

    def forward(self, images):
        return self.layers(images)
"""
AT_ON_OWN = ["--model=own_model.MyAT", "--model.network=own_network.Net", "--model.steps=1"]
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--without=[wandb,trajectory,train_evaluation,train_flatness]",
    "--flatness.num_perturbations=1",
    "--final.steps=2",
    "--final.restarts=1",
    "--final.num_perturbations=1",
    "--final.extras=[worst,curvature]",
    "--autoattack.num_examples=4",
    "--autoattack.version=custom",
    "--autoattack.attacks=[apgd-ce]",
    "--weight_averaging.decay=0.5",
    "--weight_averaging.batch_norm=reestimate",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {"own_data": OWN_DATA, "own_model": OWN_MODEL, "own_network": OWN_NETWORK}
    for name, content in names.items():
        Path(f"{name}.py").write_text(content)
    yield
    for name in names:
        sys.modules.pop(name, None)


def figures(*arguments: str) -> dict[str, float]:
    main(["fit", "--folder=run", *SHORT, *arguments])
    results = json.loads(Path("run/results.json").read_text())
    Path("run").rename(f"run{len(list(Path().glob('run*')))}")
    return {**results["final"], **{f"best/{k}": v for k, v in results["early_stopped"].items()}}


def test_the_current_folder_is_importable_behind_all_else(monkeypatch, tmp_path):
    Path("torchmetrics.py").write_text("raise ImportError('a file hides a package')")
    monkeypatch.delitem(sys.modules, "torchmetrics", raising=False)
    built = []
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, _: built.append(self))
    main(["fit", *SHORT, *AT_ON_OWN, "--model.network.width=3", "--data=own_data.Pixels"])
    assert sys.path[-1] == str(tmp_path)
    assert type(built[0].model).__name__ == "MyAT"
    assert built[0].model.network.layers[0].out_channels == 3
    import torchmetrics

    assert tmp_path not in Path(torchmetrics.__file__).parents


@pytest.mark.parametrize(
    ("on_pixels", "on_normalized"),
    [(AT_ON_OWN, AT_ON_OWN), (["--model=own_model.Plain", "--model.normalizes=true"],
                              ["--model=own_model.Plain"])],
    ids=["AT", "a module of the user's own"],
)  # fmt: skip
def test_own_data_with_normalised_images_are_measured_as_pixels(on_pixels, on_normalized):
    expected = figures(*on_pixels, "--data=own_data.Pixels")
    found = figures(*on_normalized, "--data=own_data.Normalized")
    assert {"test/robust_loss", "flatness/worst/test", "test/autoattack_error"} <= set(found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert found["test/robust_loss"] > 0


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("Untold", "pixels in [0, 1]"),
        ("Mistaken", "`normalization` to be (mean, std) that was applied"),
        ("Named", "`normalization` of Named to be (mean, std)"),
    ],
)
def test_a_normalisation_that_is_not_told_is_refused(data, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *SHORT, *AT_ON_OWN, f"--data=own_data.{data}"])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("import nowhere_else\nclass MyAT: pass", "nowhere_else"),
        ("class MyAT(", "own_broken"),
        ("class MyAT: pass", "`--model` to be a class path of LightningModule"),
        ("", "`--model`"),
        (
            "from lightning.pytorch import LightningModule\nclass MyAT(LightningModule):\n"
            "    def __init__(self):\n        {}['a key']",
            "KeyError: 'a key' (own_broken.py, line 4)",
        ),
    ],
)
def test_what_is_wrong_with_a_module_of_the_user_is_said(content, named, capsys):
    Path("own_broken.py").write_text(content)
    sys.modules.pop("own_broken", None)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *SHORT, "--model=own_broken.MyAT"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said.splitlines()) == 1
