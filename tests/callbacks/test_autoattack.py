import pytest
import torch
from networks_for_tests import snapshot, tiny_body
from torch.utils.data import TensorDataset
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import AutoAttack, FinalEvaluation, RobustEarlyStopping
from robust_flatness.functional import evaluate_robustness
from robust_flatness.lightning_modules import AT

FAST = {"version": "custom", "attacks": ["apgd-ce"]}
WITH_FAB = {"version": "custom", "attacks": ["apgd-ce", "fab-t"]}


def trained(epochs: int = 15) -> AT:
    """A network that is right on its 32 images, and robust on some."""
    torch.manual_seed(0)
    module = AT(tiny_body, **{**PLAIN, "eps": 0.02})
    quiet_trainer(max_epochs=epochs).fit(module, loader(32))
    return module.eval()


def measure(callback: AutoAttack, module: AT) -> float:
    (verdicts,) = callback.measurements
    return verdicts.measure(quiet_trainer(), module)["test/autoattack_error"]


def test_error_is_between_clean_error_and_one_and_not_below_pgd():
    module, data = trained(), dataset(32)
    found = evaluate_robustness(module, *data[:], eps=0.06, steps=20, restarts=5)
    attacked = measure(AutoAttack(dataset=data, eps=0.06), module)
    assert found.error < found.robust_error <= attacked < 1
    assert measure(AutoAttack(dataset=data, eps=0.0), module) == pytest.approx(found.error)
    assert measure(AutoAttack(dataset=data, eps=1.0, **FAST), module) == 1.0


def test_counts_all_images_whatever_the_chunk():
    module, data = trained(), dataset(32)
    calls = []

    class Spy(AutoAttack):
        def _attack(self, network, images, labels, eps):
            calls.append(len(images))
            return torch.arange(len(images)) % 2 == 0

    error = measure(Spy(dataset=data, eps=0.1, chunk_size=10), module)
    assert calls == [10, 10, 10, 2]
    assert error == pytest.approx(16 / 32)


def test_repeats_bit_for_bit_and_leaves_no_trace():
    module, data = trained(), dataset(16)
    before, state = snapshot(module), torch.get_rng_state()
    grads = [(parameter, parameter.grad.clone()) for parameter in module.parameters()]
    first = measure(AutoAttack(dataset=data, eps=0.02, **WITH_FAB), module)
    assert first == measure(AutoAttack(dataset=data, eps=0.02, **WITH_FAB), module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in snapshot(module).items())
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in grads)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_get_a_message_and_the_attacks_that_apply(classes, monkeypatch):
    import pyautoattack

    asked = {}

    class Official(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, images, labels, /, *, batch_size):
            asked["attacks"] = list(self.attacks_to_run)
            return images, labels

    monkeypatch.setattr(pyautoattack, "AutoAttack", Official)
    images, labels = dataset(8)[:]
    data = TensorDataset(images, labels % classes)
    module = AT(tiny_body, **PLAIN, num_classes=classes)
    with pytest.warns(UserWarning, match=f"at least 4 classes .* there are {classes}"):
        measure(AutoAttack(dataset=data, eps=0.02), module)
    assert asked["attacks"] == ["apgd-ce", "fab", "square"]


def test_two_classes_are_attacked_for_real():
    images, labels = dataset(6)[:]
    module = AT(tiny_body, **PLAIN, num_classes=2)
    callback = AutoAttack(
        dataset=TensorDataset(images, labels % 2),
        eps=0.02,
        version="custom",
        attacks=["apgd-ce", "fab"],
    )
    assert 0 <= measure(callback, module) <= 1


def test_five_classes_have_four_targets(monkeypatch):
    import pyautoattack

    asked = {}

    class Official(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, images, labels, /, *, batch_size):
            asked["targets"] = self.apgd_targeted.n_target_classes, self.fab.n_target_classes
            asked["attacks"] = self.attacks_to_run
            return images, labels

    monkeypatch.setattr(pyautoattack, "AutoAttack", Official)
    images, labels = dataset(8)[:]
    module = AT(tiny_body, **PLAIN, num_classes=5)
    measure(AutoAttack(dataset=TensorDataset(images, labels % 5), eps=0.02), module)
    assert asked["targets"] == (4, 4)
    assert asked["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]


def test_last_and_early_stopped_weights_are_measured_at_the_end():
    class FirstEpoch(RobustEarlyStopping):
        def measure(self, trainer, module):
            return {"val/robust_error": 0.1 + 0.1 * trainer.current_epoch}

    data = dataset(16)
    stopping = FirstEpoch(dataset=data, num_examples=4)
    attack = AutoAttack(dataset=data, eps=0.02, num_examples=8, **FAST)
    final = FinalEvaluation(
        splits=["test"], num_examples=8, eps=0.02, steps=2, restarts=2, num_perturbations=2
    )

    module = AT(tiny_body, **{**PLAIN, "eps": 0.02})
    module.test_dataloader = lambda: torch.utils.data.DataLoader(data, 8)
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


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`version` to be one of standard"):
        AutoAttack(version="fast")
    with pytest.raises(ValueError, match="Expected `attacks` with `version` custom"):
        AutoAttack(attacks=["apgd-ce"])
