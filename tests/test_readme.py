"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippet(after: str) -> str:
    """The Python block that follows a heading."""
    part = README[README.index(after) :]
    return re.search(r"```python\n(.*?)```", part, re.DOTALL)[1]


def test_reuse_in_a_foreign_project(tmp_path, monkeypatch):
    # A stranger's project: a `callbacks/` folder of its own, another forward, normalised inputs.
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "my_project.py").write_text(
        "import torch\n"
        "from lightning.pytorch import LightningModule\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from callbacks import MINE\n"
        "class MyModule(LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))\n"
        "    def forward(self, pictures):\n"
        "        return self.head(pictures)\n"
        "    def training_step(self, batch, index):\n"
        "        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])\n"
        "    def validation_step(self, batch, index):\n"
        "        pass\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=0.1)\n"
        "def loader(seed):\n"
        "    generator = torch.Generator().manual_seed(seed)\n"
        "    images = torch.rand(64, 3, 8, 8, generator=generator)\n"
        "    labels = torch.randint(10, (64,), generator=generator)\n"
        "    return DataLoader(TensorDataset((images - 0.5) / 0.25, labels), 16, shuffle=True)\n"
        "train_loader, val_loader = loader(0), loader(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(snippet("## In your own Lightning project"), names)
    logged = names["trainer"].callback_metrics
    assert {"flatness/average/val", "val/robust_error"} <= set(logged)
    assert 0 <= logged["val/robust_error"] <= 1
    assert "val/autoattack_error" in names["attack"].final_results["final"]
    watched = {k: v.clone() for k, v in names["module"].state_dict().items()}
    from lightning.pytorch import Trainer
    from my_project import MyModule, loader

    torch.manual_seed(0)
    alone = MyModule()
    Trainer(max_epochs=names["trainer"].max_epochs, logger=False, accelerator="cpu").fit(
        alone, loader(0), loader(1)
    )
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched[name]), name


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
