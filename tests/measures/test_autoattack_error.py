"""AutoAttack as a measure."""

import pytest
import torch
from networks_for_tests import snapshot, tiny_body
from torch.utils.data import TensorDataset
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.functional import evaluate_robustness
from robust_flatness.lightning_modules import AT
from robust_flatness.measures import AutoAttackError
from robust_flatness.measures.autoattack import VERSIONS

FAST = {"version": "custom", "attacks": ["apgd-ce"]}
WITH_FAB = {"version": "custom", "attacks": ["apgd-ce", "fab-t"]}


def trained(epochs: int = 15) -> AT:
    """A network that is right on its 32 images, and robust on some."""
    torch.manual_seed(0)
    module = AT(tiny_body, **{**PLAIN, "eps": 0.02})
    quiet_trainer(max_epochs=epochs).fit(module, loader(32))
    return module.eval()


def measure(attack: AutoAttackError, module: AT, data: TensorDataset) -> float:
    return attack(module, *data[:]).robust_error


def test_error_is_between_clean_error_and_one_and_not_below_pgd():
    module, data = trained(), TensorDataset(*dataset(32)[:12])
    found = evaluate_robustness(module, *data[:], eps=0.06, steps=20, restarts=5)
    attacked = measure(AutoAttackError(eps=0.06), module, data)
    assert found.error < found.robust_error <= attacked < 1
    assert measure(AutoAttackError(eps=0.0), module, data) == pytest.approx(found.error)
    assert measure(AutoAttackError(eps=1.0, **FAST), module, data) == 1.0


def test_counts_all_images_whatever_the_chunk():
    module, data = trained(), dataset(32)
    calls = []

    class Spy(AutoAttackError):
        def attack(self, network, images, labels):
            calls.append(len(images))
            return torch.arange(len(images)) % 2 == 0

    error = measure(Spy(eps=0.1, chunk_size=10), module, data)
    assert calls == [10, 10, 10, 2]
    assert error == pytest.approx(16 / 32)


def test_repeats_bit_for_bit_and_leaves_no_trace():
    module, data = trained(1), dataset(4)
    before, state = snapshot(module), torch.get_rng_state()
    grads = [(parameter, parameter.grad.clone()) for parameter in module.parameters()]
    first = measure(AutoAttackError(eps=0.02, **WITH_FAB), module, data)
    assert first == measure(AutoAttackError(eps=0.02, **WITH_FAB), module, data)
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
        measure(AutoAttackError(eps=0.02), module, data)
    assert asked["attacks"] == ["apgd-ce", "fab", "square"]


def some_classes(classes, count=8):
    images, labels = dataset(count)[:]
    return TensorDataset(images, labels % classes)


@pytest.mark.parametrize(
    ("classes", "attack"),
    [(2, "apgd-ce"), (2, "fab"), (2, "square"), (2, "fab-t"), (3, "apgd-dlr"), (4, "apgd-t")],
)
def test_attacks_run_with_as_few_classes_as_they_need(classes, attack):
    data = some_classes(classes, 2)
    torch.manual_seed(0)
    module = AT(tiny_body, **PLAIN, num_classes=classes)
    trained_on = torch.utils.data.DataLoader(data, 2)
    quiet_trainer(max_epochs=20).fit(module, trained_on)
    for eps, error in ((1e-6, 0.0), (0.5, 1.0)):
        if attack != "square" or error == 1:  # 5000 queries
            assert measure(AutoAttackError(eps=eps, attacks=[attack]), module, data) == error


@pytest.mark.parametrize("settings", [{}, {"attacks": ["apgd-t", "fab-t"]}, {"version": "plus"}])
def test_five_classes_have_four_targets(settings, monkeypatch):
    import pyautoattack

    asked = {}

    class Official(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, images, labels, /, *, batch_size):
            asked["targets"] = self.apgd_targeted.n_target_classes, self.fab.n_target_classes
            asked["attacks"] = self.attacks_to_run
            return images, labels

    monkeypatch.setattr(pyautoattack, "AutoAttack", Official)
    module = AT(tiny_body, **PLAIN, num_classes=5)
    attack = AutoAttackError(eps=0.02, **settings)
    measure(attack, module, some_classes(5))
    assert asked["targets"] == (4, 4)
    assert asked["attacks"] == (attack.attacks or VERSIONS[attack.version])


def test_the_attacks_of_a_version_are_those_of_the_package():
    import pyautoattack

    for version, attacks in VERSIONS.items():
        official = pyautoattack.AutoAttack(torch.nn.Identity(), version=version)
        assert official.attacks_to_run == attacks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "fast"}, "`version` to be one of standard"),
        ({"version": "custom"}, "`attacks` with `version` custom, .* but got None with custom"),
        ({"version": "plus", "attacks": ["fab"]}, r"but got \['fab'\] with plus"),
        ({"attacks": ["foo"]}, r"list of some of apgd-ce, .* but got \['foo'\]"),
        ({"attacks": ["apgd-ce", "pgd"]}, "list of some of"),
        ({"attacks": [3]}, "list of some of"),
        ({"attacks": []}, r"list of some of .* but got \[\]"),
        ({"attacks": "fab"}, "list of some of .* but got fab"),
        ({"chunk_size": 0}, "`chunk_size` to be >= 1"),
        ({"norm": "l1"}, "`norm` to be one of"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoAttackError(**settings)


def test_attacks_alone_are_a_custom_version():
    assert AutoAttackError(attacks=["square"]).version == "custom"
    assert AutoAttackError().version == "standard"
