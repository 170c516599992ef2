import json

import numpy as np
import pytest
import torch
import wandb
from averaging_runs import Final, FirstWeight, Scripted
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers import CSVLogger
from networks_for_tests import same, snapshot, tiny_body
from torch import nn
from torch.utils.data import TensorDataset
from trainers import PLAIN, ToyData, dataset, quiet_trainer
from wandb_reader import read_runs

from robust_flatness.callbacks import (
    AutoAttack,
    FinalEvaluation,
    Results,
    RobustEarlyStopping,
    evaluate,
)
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger, make_wandb_logger


def test_measures_last_and_early_stopped_weights_and_gives_the_last_back():
    weight, stopping = Final(), Scripted()
    module = AT(tiny_body, **PLAIN)
    quiet_trainer(max_epochs=3, callbacks=[weight, stopping]).fit(module, ToyData())
    last = module.network[0].weight[0, 0, 0, 0].item()
    best = stopping.best_weights["network.0.weight"][0, 0, 0, 0].item()
    assert weight.final_results["final"] == {"test/weight": last}
    assert weight.final_results["early_stopped"] == {"test/weight": best}
    assert last != best
    assert weight.final_results["num_examples"]["test/weight"] == 7


def test_equal_weights_are_measured_once():
    weight, stopping = Final(), Scripted()
    quiet_trainer(max_epochs=1, callbacks=[weight, stopping]).fit(AT(tiny_body, **PLAIN), ToyData())
    assert len(weight.seen) == 1
    assert weight.final_results["early_stopped"] == weight.final_results["final"]


def test_early_stopped_weights_that_no_longer_fit_are_left_out():
    weight, stopping = Final(), Scripted()
    # It renames weights when training has ended.
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)
    module = AT(tiny_body, **PLAIN)
    trainer = quiet_trainer(max_epochs=3, callbacks=[pruning, weight, stopping])
    with pytest.warns(UserWarning, match="Final measures the final weights alone: .*weight"):
        trainer.fit(module, ToyData())
    assert len(weight.seen) == 1
    assert same(weight.seen[0], snapshot(module))
    assert weight.final_results["early_stopped"] == {}


def test_bad_images_are_refused_before_training():
    final = FinalEvaluation(datasets={"test": dataset(0)}, steps=1, restarts=1)
    module = AT(tiny_body, **PLAIN)
    before = module.network[0].weight.detach().clone()
    with pytest.raises(ValueError, match="`dataset` to have images"):
        quiet_trainer(callbacks=[final]).fit(module, ToyData())
    assert torch.equal(before, module.network[0].weight)


def test_fast_dev_run_leaves_the_protocol_out():
    weight = Final()
    quiet_trainer(callbacks=[weight], fast_dev_run=True).fit(AT(tiny_body, **PLAIN), ToyData())
    assert not weight.seen


def test_loggers_get_the_figures_beside_those_of_the_epochs(tmp_path):
    loggers = [
        EpochCSVLogger(tmp_path),
        make_wandb_logger(tmp_path, project="p", name="n"),
        CSVLogger(tmp_path, name="stock", version=""),
    ]
    weight = Final()
    trainer = quiet_trainer(max_epochs=2, callbacks=[weight, Scripted()], logger=loggers)
    trainer.fit(AT(tiny_body, **PLAIN), ToyData())
    wandb.finish()
    (run,) = read_runs(tmp_path)
    for weights in ("final", "early_stopped"):
        figure = weight.final_results[weights]["test/weight"]
        assert run.summary[f"{weights}/test/weight"] == figure
        # A chart of one point would say nothing.
        assert not any(f"{weights}/test/weight" in step for step in run.history)
    assert "early_stopped/test/weight" in (tmp_path / "stock" / "metrics.csv").read_text()
    assert "final" not in (tmp_path / "metrics.csv").read_text()


def test_resuming_a_finished_run_measures_again(tmp_path):
    path, seen = tmp_path / "last.ckpt", []
    for _ in range(2):
        weight = Final()
        trainer = quiet_trainer(
            max_epochs=2,
            default_root_dir=tmp_path,
            callbacks=[weight, Scripted(), Results()],
        )
        resume = path if path.exists() else None
        trainer.fit(AT(tiny_body, **PLAIN), ToyData(), ckpt_path=resume)
        trainer.save_checkpoint(path)
        seen.append(weight.final_results)
    assert seen[0] == seen[1]
    assert json.loads((tmp_path / "results.json").read_text())["final"]["test/weight"]


def test_protocol_figures_carry_their_counts():
    final = FinalEvaluation(num_examples=6, steps=1, restarts=2, num_perturbations=2)
    quiet_trainer(callbacks=[final]).fit(AT(tiny_body, **PLAIN), ToyData())
    figures = final.final_results["final"]
    for split in ("test", "train_eval"):
        assert 0 <= figures[f"{split}/robust_error"] <= 1
    assert {"flatness/average/test", "flatness/average/train_sem"} <= set(figures)
    assert final.final_results["num_examples"]["test/robust_error"] == 6
    assert final.final_results["early_stopped"] == {}


def test_flatness_can_be_left_out():
    final = FinalEvaluation(splits=["test"], num_examples=4, steps=1, num_perturbations=0)
    torch.manual_seed(0)
    quiet_trainer(callbacks=[final]).fit(AT(tiny_body, **PLAIN), ToyData())
    assert not any(name.startswith("flatness") for name in final.final_results["final"])


def test_flatness_and_extras_may_take_fewer_images():
    def measured(**counts):
        counts |= {"steps": 2, "restarts": 1, "num_perturbations": 2}
        final = FinalEvaluation(extras="margins", **counts)
        quiet_trainer(callbacks=[final]).fit(AT(tiny_body, **PLAIN), ToyData())
        return final.final_results

    few, all_of_few = measured(num_examples=6, num_flatness_examples=3), measured(num_examples=3)
    everything = measured(num_examples=6)
    for name in ("flatness/average/test", "margin/mean/train"):
        assert few["final"][name] == all_of_few["final"][name] != everything["final"][name]
        assert few["num_examples"][name] == 3
    assert few["final"]["test/robust_loss"] == everything["final"]["test/robust_loss"]
    assert few["num_examples"]["test/robust_loss"] == 6
    sorted_images = TensorDataset(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.warns(UserWarning, match="All 3 measured images of split test are of class 0"):
        measured(num_flatness_examples=3, datasets={"test": sorted_images})
    with pytest.raises(ValueError, match="Expected `num_flatness_examples` to be"):
        FinalEvaluation(num_flatness_examples=0)


def test_measures_where_the_module_was_trained():
    # Lightning moves the module to the CPU before `on_fit_end`: on a GPU machine the full protocol
    # would run there. What is called is looked at, as the tests have no other device.
    calls = []

    class Moved(AT):
        def to(self, *args, **kwargs):
            calls.append(args)
            return super().to(*args, **kwargs)

    class Device(FirstWeight):
        def measure(self, network, examples):
            calls.append("measured")
            return super().measure(network, examples)

    weight = Final()
    weight.measure = Device()
    trainer = quiet_trainer(callbacks=[weight])
    trainer.fit(Moved(tiny_body, **PLAIN), ToyData())
    place = calls.index("measured")
    assert calls[place - 1] == (trainer.strategy.root_device,)
    assert calls[place + 1] == (torch.device("cpu"),)


PROTOCOL = {"num_examples": 12, "steps": 2, "restarts": 2, "num_perturbations": 1}


def test_arrays_of_each_example_explain_the_figures(tmp_path):
    final, table = FinalEvaluation(**PROTOCOL), EpochCSVLogger(tmp_path)
    attack = AutoAttack(num_examples=5, version="custom", attacks=["apgd-ce"])
    stopping = RobustEarlyStopping(num_examples=12, steps=2)
    trainer = quiet_trainer(
        max_epochs=2, callbacks=[stopping, final, attack, Results()], logger=table
    )
    trainer.fit(AT(tiny_body, **PLAIN), ToyData())
    arrays = np.load(tmp_path / "examples.npz", allow_pickle=False)
    for weights in ("final", "early_stopped"):
        figures = final.final_results[weights]
        for split in ("test", "train_eval"):
            losses, correct = (arrays[f"{weights}/{split}/robust_{x}"] for x in ("loss", "correct"))
            assert losses.mean() == pytest.approx(figures[f"{split}/robust_loss"])
            assert 1 - correct.mean() == pytest.approx(figures[f"{split}/robust_error"])
            clean = arrays[f"{weights}/{split}/clean_correct"]
            assert 1 - clean.mean() == pytest.approx(figures[f"{split}/error"])
        for name in ("robust_loss", "robust_error"):
            gap = figures[f"test/{name}"] - figures[f"train_eval/{name}"]
            assert figures[f"gap/{name}"] == pytest.approx(gap)
        verdicts = arrays[f"{weights}/test/autoattack_correct"]
        error = attack.final_results[weights]["test/autoattack_error"]
        assert 1 - verdicts.mean() == pytest.approx(error)
        assert len(verdicts) == 5


def test_one_call_measures_what_a_test_does():
    module, data = AT(tiny_body, **PLAIN), ToyData()
    final = FinalEvaluation(**PROTOCOL)
    (logged,) = quiet_trainer(callbacks=[final]).test(module, datamodule=data, verbose=False)
    settings = {"enable_progress_bar": False, "accelerator": "cpu"}
    for network in (module, nn.Sequential(module.normalize, module.network)):
        found = evaluate(network, data, [FinalEvaluation(**PROTOCOL)], **settings)
        assert found == pytest.approx(final.final_results["final"])
        assert found["test/robust_loss"] == pytest.approx(logged["test/robust_loss"])


class Huge(nn.Module):
    """Logits so large that no gradient is left."""

    def forward(self, logits):
        return 1e6 * logits


@pytest.mark.parametrize("masked", [True, False])
def test_results_have_checks_curve_and_classes_and_name_failures(tmp_path, capsys, masked):
    module, data = AT(tiny_body, **PLAIN), ToyData()
    if masked:
        module.network.append(Huge())
    with torch.no_grad():
        images = torch.stack([image for image, _ in data.measured])
        data.measured = TensorDataset(images, module.eval()(images).argmax(1))
    final = FinalEvaluation(splits=["test"], extras=["checks"], **PROTOCOL, eps=0.02)
    trainer = quiet_trainer(callbacks=[final, Results()], logger=EpochCSVLogger(tmp_path))
    trainer.test(module, datamodule=data, verbose=False)
    results = json.loads((tmp_path / "results_test.json").read_text())
    passed = {check["name"]: check["passed"] for check in results["checks"]["final"]}
    assert passed["largest radius"] is not masked
    assert passed["AutoAttack"] is None
    printed = capsys.readouterr().out
    assert ("Check failed (final weights): RErr at ε = 1 is" in printed) == masked
    curve = results["error_curve"]["final"]
    assert curve["eps"][:2] == [0.01, 0.02]
    assert curve["robust_error"][-1] == results["final"]["attack/largest_eps_error/test"]
    arrays = np.load(tmp_path / "examples_test.npz")
    labels, correct = (arrays[f"final/test/{name}"] for name in ("labels", "robust_correct"))
    for label in np.unique(labels):
        error = 1 - correct[labels == label].mean()
        assert results["class_errors"]["final"]["test"][label] == pytest.approx(error)
