"""README and docs: Python blocks run, commands parse, links have a target."""

import json
import re
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torchvision.datasets import FakeData

from robust_flatness.cli import main
from robust_flatness.command_line.parser import read_options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGE_IDS = [page.name for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Options that not every model has, with what they need.
NEEDED = {
    "--model.adversarial_fraction": ["--model=ATSelfSupervision"],
    "--model.awp_mode": ["--model=ATAWP"],
    "--model.loss": ["--model=ATUnlabeled"],
    "--model.lr_scheduler.cycle_momentum": ["--config=table1/cyclic.yaml"],
    "--model.network.depth": ["--model.network=package.Network"],
    "--model.network.num_classes": ["--model.network=package.Network"],
    "--model.order": ["--model=ATAWP"],
    "--model.rotations": ["--model=ATSelfSupervision"],
    "--model.trust_weights": ["--model=External"],
}
# Options of other commands and programs.
OTHER_OPTIONS = {
    *(
        "--configs",
        "--devices",
        "--dry_run",
        "--finished",
        "--jobs",
        "--only",
        "--rows",
        "--seeds",
        "--slurm",
    ),
    *("--sweep", "--sweep_file", "--published", "--profile"),
    # Checked like all others as soon as the command line has them.
    *("--eps", "--norm"),
}
PLACEHOLDERS = [["--model", "NAME"], ["--data", "CIFAR10", "--", "--config=cifar10.yaml"]]
# Modules of a user that the docs name.
USER_MODULES = {
    "my_model": "from robust_flatness.lightning_modules import AT as MyAT\n",
    "my_data": "from robust_flatness.datamodules import Digits as Data\n",
    "my_net": "from robust_flatness.networks import SmallResNet as Net\n",
    "package": """
from torch import nn, optim

class Optimizer(optim.SGD):
    pass

class Network(nn.Linear):
    def __init__(self, num_classes, in_channels, depth=1):
        super().__init__(in_channels, num_classes)
""",
}


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def run_block(
    page: str, names: dict[str, Any], replaced: dict[str, str] | None = None
) -> dict[str, Any]:
    """Executes the only Python block of a page."""
    (code,) = blocks(ROOT / page, "python")
    for old, new in (replaced or {}).items():
        assert old in code
        code = code.replace(old, new)
    exec(code, names)
    return names


def test_python_blocks_are_those_that_the_tests_below_run():
    having = {page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "python")}
    pages = {"README.md", "docs/any-module.md", "docs/getting-started.md", "docs/evaluate.md"}
    # The last one is run by test_docs_elsewhere.py.
    pages |= {"docs/variants.md", "docs/own-network-and-data.md", "docs/elsewhere.md"}
    assert having == pages


@pytest.fixture
def my_project(tmp_path, monkeypatch):
    """Another project, in the current folder."""
    # Another project has its own `callbacks` folder, another forward, normalized inputs.
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
    for name in ("callbacks", "my_project"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


def test_readme_callbacks_in_another_project(my_project):
    torch.manual_seed(0)
    names = run_block("README.md", {})
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


def test_training_callbacks_in_another_project(my_project):
    torch.manual_seed(0)
    logged = run_block("docs/any-module.md", {})["trainer"].callback_metrics
    assert {"flatness/average/val", "val/robust_error"} <= set(logged)
    assert logged["awp/relative_norm_max"] == pytest.approx(0.01, rel=1e-4)


def test_own_datamodule_from_the_command_line(tmp_path, monkeypatch):
    datamodule, _ = blocks(ROOT / "docs/own-network-and-data.md", "python")
    (tmp_path / "my_data.py").write_text(datamodule.replace("NUM_VAL = 1000", "NUM_VAL = 8"))

    def street_numbers(root, part, transform, download):
        return FakeData(32 if part == "train" else 16, (3, 32, 32), 10, transform)

    monkeypatch.setattr("torchvision.datasets.SVHN", street_numbers)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_data", None)
    del sys.modules["my_data"]
    command = next(
        c for c in commands(ROOT / "docs/own-network-and-data.md") if "my_data.Data" in c
    )
    light = ["--final.steps=1", "--final.restarts=1", "--final.num_perturbations=1"]
    light += ["--model.network=SmallResNet", "--model.network.width=4", "--trainer.max_epochs=1"]
    without = "--without=[autoattack,wandb,flatness,train_flatness]"
    main([*command, *light, without, f"--trainer.default_root_dir={tmp_path}"])
    results = json.loads((tmp_path / "ATAWP-Data-s0" / "results.json").read_text())
    images = results["num_examples"]
    assert (images["train_eval/robust_error"], images["test/robust_error"]) == (24, 16)
    assert results["settings"]["data"]["init_args"]["batch_size"] == 64


def test_training_in_python_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, training = blocks(ROOT / "docs/own-network-and-data.md", "python")
    light = 'max_epochs=1, accelerator="cpu", logger=False'
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(training.replace("max_epochs=10", light), names)
    assert {"val/robust_error", "flatness/average/test"} <= set(names["trainer"].callback_metrics)
    assert names["module"].network is names["network"]


def test_run_in_a_notebook_as_documented():
    folder = str(ROOT / "tests/fixtures/run_ba960bd")
    replaced = {'"runs/ATAWP-Digits-s0"': repr(folder), '"runs"': repr(folder)}
    with matplotlib.rc_context({"backend": "agg"}):
        names = run_block("docs/getting-started.md", {}, replaced)
    assert len(names["run"]) > 1
    assert names["axes"].collections
    assert list(names["table"]["weights"]) == ["final", "early_stopped"]


def test_evaluate_as_documented():
    torch.manual_seed(0)
    light = 'extras=["worst"], num_examples=4, steps=1, restarts=1, num_perturbations=1'
    smaller = {'extras=["worst"]': light, "AutoAttack()": "AutoAttack(num_examples=4)"}
    results = run_block("docs/evaluate.md", {}, smaller)["results"]
    assert {"test/robust_loss", "flatness/worst/test", "test/autoattack_error"} <= set(results)


def test_documented_variant_trains_from_the_command_line(tmp_path, monkeypatch):
    (code,) = blocks(ROOT / "docs/variants.md", "python")
    command = next(c for c in commands(ROOT / "docs/variants.md") if "logit_pairing" in str(c))
    assert len(code.splitlines()) < 30
    (tmp_path / "logit_pairing.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "logit_pairing", None)
    del sys.modules["logit_pairing"]
    light = ["--final.steps=1", "--final.restarts=1", "--final.num_perturbations=1"]
    without = "--without=[autoattack,wandb,flatness,train_flatness,early_stopping]"
    root = f"--trainer.default_root_dir={tmp_path}"
    main([*command, "--trainer.max_epochs=1", root, without, *light])
    results = json.loads((tmp_path / "LogitPairingAWP-Digits-s0" / "results.json").read_text())
    row = results["trajectory"][0]
    assert row["train/pairing"] > 0
    assert row["awp/relative_norm_max"] == pytest.approx(0.01, rel=1e-4)
    assert row["label_noise/changed"] == pytest.approx(0.18, abs=0.08)
    # The pairing is part of the objective.
    assert row["train/loss"] > row["train/robust_loss"]


def commands(page: Path) -> list[list[str]]:
    """Commands in the fenced blocks of a page, as arguments."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    for variable, value in {"$row": "table1/at.yaml", "$model": "AT", "$seed": "2"}.items():
        text = text.replace(variable, value)
    # A synopsis has optional parts.
    text = re.sub(r" \[(--|any)[^]]*\]", "", text)
    text = text.replace("docs/examples/two_nodes.sh", "cli.py fit")
    return [shlex.split(c) for c in re.findall(r"cli\.py ((?:fit|test|study) [^#;&\n]*)", text)]


def inline_options() -> list[list[str]]:
    """Options with a value in the text of all pages, and what they need."""
    texts = [FENCE.sub("", page.read_text()) for page in PAGES]
    spans = [span for text in texts for span in re.findall(r"`([^`\n]+)`", text)]
    options = [shlex.split(span) for span in spans if re.match(r"'?--\w[^<]*$", span)]
    valued = [o for o in options if (len(o) > 1 or "=" in o[0]) and o not in PLACEHOLDERS]
    of_fit = [o for o in valued if re.split(r"[.=+]", o[0])[0] not in OTHER_OPTIONS]
    return [[*NEEDED.get(option[0], []), *option] for option in of_fit]


def conflict(first: list[str], second: list[str]) -> bool:
    """Whether both set an option, or one chooses the class that the other's options belong to.

    Equal options, such as `--model=ATAWP`, are for both.
    """
    own, other = ({o.name.rstrip("+"): o.value for o in read_options(s)} for s in (first, second))
    equal = {name for name, _ in own.items() & other.items()}
    pairs = [(f"{a}.", f"{b}.") for a in own.keys() - equal for b in other.keys() - equal]
    files = own.get("config") != other.get("config")
    return files or any(a.startswith(b) or b.startswith(a) for a, b in pairs)


def merged(snippets: list[list[str]]) -> list[list[str]]:
    """Puts options that do not conflict into one command line: each takes half a second."""
    groups: list[list[str]] = []
    for snippet in snippets:
        fitting = [group for group in groups if not conflict(group, snippet)]
        if fitting:
            fitting[0].extend(snippet)
        else:
            groups.append(list(snippet))
    return groups


@pytest.fixture
def user_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pairing,) = blocks(ROOT / "docs/variants.md", "python")
    for name, text in {**USER_MODULES, "logit_pairing": pairing}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def check_parses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([arguments[0], "--print_config", *arguments[1:]])
    assert not end.value.code, f"{arguments}: {capsys.readouterr().err}"


COMMANDS = list(dict.fromkeys(tuple(c) for page in PAGES for c in commands(page)))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_parses(command, user_modules, capsys):
    if command[0] == "study":
        main([command[0], "--dry_run", *command[1:]])
    else:
        check_parses(list(command), capsys)


@pytest.mark.slow
def test_inline_options_parse(user_modules, capsys):
    for options in merged(inline_options()):
        check_parses(["fit", *options], capsys)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_have_a_target(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in slugs, anchor


def test_images_of_the_readme_are_absolute_if_the_project_has_an_address():
    """PyPI shows no images with relative paths."""
    metadata = ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert images
    if {"url", "project_urls"} & set(metadata["metadata"]):
        assert all(image.startswith("https://") for image in images)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_files_that_a_page_names_exist(page):
    pattern = r"[` ]((?:benchmarks|configs|docs|tests)/[a-z0-9_/-]+\.(?:py|yaml|md|sh|sbatch))\b"
    for path in re.findall(pattern, page.read_text()):
        assert (ROOT / path).exists(), path
