"""One radius and norm for training and measures, and the precision that training gets."""

import json
import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from robust_flatness.cli import CLI, main

TINY = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--data.num_train=64",
    "--model.network.width=4",
    "--model.steps=2",
    *(f"--{name}.num_examples=8" for name in ("evaluation", "flatness", "early_stopping")),
    "--final={num_examples: 8, steps: 2, restarts: 1, num_perturbations: 1}",
    "--autoattack={num_examples: 4, attacks: [apgd-ce]}",
    "--without=[wandb,train_evaluation,train_flatness,trajectory]",
]
MEASURES = ("evaluation", "flatness", "early_stopping", "final", "autoattack")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def built(monkeypatch):
    """Builds what `fit` with some options would run."""

    def build(*options: str) -> CLI:
        kept = []
        monkeypatch.setattr(CLI, "_run_subcommand", lambda self, _: kept.append(self))
        main(["fit", *TINY, *options])
        return kept[0]

    return build


def said(caplog) -> list[str]:
    return [m for m in caplog.messages if m.startswith("Training attacks with a radius of")]


@pytest.fixture(autouse=True)
def _informed(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")


def test_a_run_in_l2_takes_two_options(caplog):
    main(["fit", *TINY, "--norm=l2", "--eps=0.5", "--worst_flatness={num_examples: 8, steps: 1}"])
    results = json.loads(Path("runs/AT-Digits-s0/results.json").read_text())
    settings = results["settings"]
    assert settings["data"]["init_args"]["eps"] == settings["model"]["init_args"]["eps"] == 0.5
    assert settings["model"]["init_args"]["norm"] == "l2"
    assert [settings[name]["norm"] for name in MEASURES] == ["l2"] * len(MEASURES)
    assert settings["worst_flatness"]["init_args"]["norm"] == "l2"
    assert {"test/robust_loss", "flatness/average/test"} <= set(results["final"])
    assert said(caplog) == []


def test_a_callback_of_the_user_measures_in_the_same_norm(built):
    added = ["--trainer.callbacks+=Flatness", "--trainer.callbacks.split=val"]
    (callback,) = built("--norm=l2", "--eps=0.5", *added).config.fit.trainer.callbacks
    assert (callback.init_args.norm, callback.init_args.eps) == ("l2", 0.5)
    added.append("--trainer.callbacks.norm=linf")
    (callback,) = built("--norm=l2", "--eps=0.5", *added).config.fit.trainer.callbacks
    assert callback.init_args.norm == "linf"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], None),
        (["--eps=0.1"], None),
        (["--model.eps=0.1"], "0.1 in linf, evaluation, flatness, early_stopping, final, "
                              "autoattack with 0.2 in linf."),
        (["--model.norm=l2"], "0.2 in l2, evaluation, flatness, early_stopping, final, autoattack "
                              "with 0.2 in linf."),
        (["--config=table1/larger_eps.yaml"], "0.225 in linf, evaluation"),
        (["--flatness.eps=0.1"], "0.2 in linf, flatness with 0.1 in linf."),
    ],
)  # fmt: skip
def test_a_run_says_if_it_measures_at_another_radius(options, line, built, caplog):
    built(*options)
    assert len(said(caplog)) == (line is not None)
    assert line is None or line in said(caplog)[0]


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        (["--trainer.accelerator=auto"], "bf16-mixed"),
        (["--trainer.accelerator=auto", "--trainer.precision=32-true"], None),
        (["--trainer.accelerator=auto", "--config={model: {init_args: {fast: false}}}"], None),
        (["--trainer.accelerator=cpu"], None),
    ],
)
def test_training_is_in_bfloat16_on_gpus_that_have_it(options, precision, built, monkeypatch):
    chosen = []
    build = LightningCLI.instantiate_trainer

    def instantiate(self, **kwargs):
        chosen.append(kwargs.pop("precision", None))
        return build(self, **kwargs)

    monkeypatch.setattr(LightningCLI, "instantiate_trainer", instantiate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    built(*options)
    assert chosen == [precision]
