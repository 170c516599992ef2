"""AutoAttack at the end of a run."""

import pytest
import torch
from averaging_runs import Scripted
from networks_for_tests import tiny_body
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import AutoAttack, FinalEvaluation, evaluate
from robust_flatness.functional import evaluate_robustness
from robust_flatness.lightning_modules import AT

FAST = {"version": "custom", "attacks": ["apgd-ce"]}


def some_classes(classes, count=8):
    images, labels = dataset(count)[:]
    return TensorDataset(images, labels % classes)


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (2, {"attacks": ["apgd-dlr"]}, "at least 3 classes for AutoAttack's apgd-dlr .* got 2"),
        (3, {"attacks": ["fab", "apgd-t"]}, "at least 4 classes for AutoAttack's apgd-t .* got 3"),
        (2, {"version": "rand"}, "at least 3 classes for AutoAttack's apgd-dlr .*rand.* got 2"),
        (3, {"version": "plus"}, "at least 4 classes for AutoAttack's apgd-t .*plus.* got 3"),
    ],
)
def test_attacks_that_cannot_run_are_refused_before_training(classes, settings, message):
    data = some_classes(classes)
    module, attack = (
        AT(tiny_body, **PLAIN, num_classes=classes),
        AutoAttack(dataset=data, **settings),
    )
    trainer = quiet_trainer(callbacks=[attack])
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, DataLoader(data, 4))
    assert trainer.global_step == 0
    with pytest.raises(ValueError, match=message):
        trainer.test(module, DataLoader(data, 4))


def test_square_on_small_images_is_refused_for_l2():
    data = TensorDataset(torch.rand(4, 1, 4, 9), torch.arange(4))
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4))
    with pytest.raises(ValueError, match=r"at least 5 pixels a side .* square .* got \(4, 9\)"):
        evaluate(network, data, [AutoAttack(norm="l2")], enable_progress_bar=False)


def test_last_and_early_stopped_weights_are_measured_at_the_end():
    data = dataset(16)
    stopping = Scripted(dataset=data, num_examples=4)
    attack = AutoAttack(dataset=data, eps=0.02, num_examples=8, **FAST)
    final = FinalEvaluation(
        splits=["test"], num_examples=8, eps=0.02, steps=2, restarts=2, num_perturbations=2
    )

    module = AT(tiny_body, **{**PLAIN, "eps": 0.02})
    module.test_dataloader = lambda: DataLoader(data, 8)
    trainer = quiet_trainer(max_epochs=6, callbacks=[attack, stopping, final])
    trainer.fit(module, loader(16))
    assert stopping.best_epoch == 0
    for results, names in (
        (attack.final_results, {"test/autoattack_error"}),
        (final.final_results, {"test/robust_loss", "flatness/average/test"}),
    ):
        assert names <= set(results["final"])
        assert names <= set(results["early_stopped"])
        assert results["num_examples"][min(names)] == 8
    losses = [final.final_results[k]["test/robust_loss"] for k in ("final", "early_stopped")]
    assert losses[0] != losses[1]
    module.load_state_dict(stopping.best_weights)
    again = evaluate_robustness(module.eval(), *data[:8], eps=0.02, steps=2, restarts=2).robust_loss
    assert losses[1] == pytest.approx(again, rel=1e-6)


def test_a_dev_run_measures_nothing_and_few_images_are_one_chunk():
    attack = AutoAttack(dataset=dataset(16), num_examples=3, eps=0.02, **FAST)
    quiet_trainer(callbacks=[attack], fast_dev_run=True).fit(AT(tiny_body, **PLAIN), loader(8))
    assert not attack.final_results["final"]
    quiet_trainer(callbacks=[attack]).fit(AT(tiny_body, **PLAIN), loader(8))
    assert attack.final_results["num_examples"] == {"test/autoattack_error": 3}
