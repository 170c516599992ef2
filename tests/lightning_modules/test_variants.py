"""The variants: what they attack, minimise, log, and cost, and how their checkpoints load."""

from functools import partial

import pytest
import torch
from networks_for_tests import PassCounter, images_and_labels, tiny_body
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, VARIANTS, loader, mixed_loader, quiet_trainer

from robust_flatness.callbacks import WeightAveraging
from robust_flatness.functional import mart_objective, trades_objective
from robust_flatness.lightning_modules import (
    AT,
    ATAWP,
    MART,
    MARTAWP,
    TRADES,
    TRADESAWP,
    ATEntropySGD,
    ATUnlabeled,
    load_checkpoint,
)
from robust_flatness.networks import SmallResNet

STEPS = 7
NARROW = partial(SmallResNet, width=4)


def built(cls, **kwargs):
    return cls(tiny_body, **{**PLAIN, "steps": STEPS, **kwargs})


@pytest.mark.parametrize(
    ("cls", "kwargs", "forwards", "backwards"),
    [
        # The steps of the attack, the last iterate, and the update.
        (AT, {}, STEPS + 2, STEPS + 1),
        (AT, {"tau": 2}, STEPS + 2, STEPS + 1),
        (AT, {"incorrect": "ignore"}, STEPS + 3, STEPS + 1),
        (AT, {"incorrect": "predicted"}, STEPS + 3, STEPS + 1),
        (AT, {"label_noise": 0.3, "label_smoothing": 0.3}, STEPS + 2, STEPS + 1),
        (ATAWP, {}, STEPS + 3, STEPS + 2),
        (ATAWP, {"direction": "random"}, STEPS + 2, STEPS + 1),
        # One more forward for the clean prediction that is attacked, one for the clean batch.
        (TRADES, {}, STEPS + 4, STEPS + 2),
        (TRADESAWP, {"warmup": 0.0}, STEPS + 6, STEPS + 4),
        (MART, {}, STEPS + 3, STEPS + 2),
        (MARTAWP, {}, STEPS + 5, STEPS + 4),
        (ATEntropySGD, {}, STEPS + 2, STEPS + 1),
        (ATUnlabeled, {}, STEPS + 2, STEPS + 1),
        (ATUnlabeled, {"loss": "trades"}, STEPS + 4, STEPS + 2),
    ],
)
def test_a_step_spends_the_minimum_of_passes(cls, kwargs, forwards, backwards):
    module = built(cls, **kwargs)
    passes = PassCounter(module.network)
    quiet_trainer().fit(module, mixed_loader())
    assert (passes.forwards, passes.backwards) == (16 * forwards, 16 * backwards)


def at_objective(clean, adversarial, labels, lam):
    return cross_entropy(adversarial, labels)


@pytest.mark.parametrize(
    ("cls", "kwargs", "objective", "term"),
    [
        (AT, {}, at_objective, None),
        (ATUnlabeled, {}, at_objective, None),
        (ATUnlabeled, {"loss": "trades", "lam": 3.0}, trades_objective, "train/divergence"),
        (TRADES, {"lam": 3.0}, trades_objective, "train/divergence"),
        (MART, {"lam": 3.0}, mart_objective, "train/weighted_divergence"),
    ],
)
def test_objective_is_that_of_the_equation(cls, kwargs, objective, term):
    module = built(cls, **kwargs).double().eval()
    images, labels = images_and_labels()
    images = images.double()
    adversarial = images.flip(0)
    loss, logits, terms = module.objective(images, adversarial, labels)
    wanted = objective(module(images), module(adversarial), labels, lam=3.0)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    assert torch.equal(logits, module(adversarial))
    assert {name: len(values) for name, values in terms.items()} == ({term: 8} if term else {})


@pytest.mark.parametrize("cls", [TRADES, MART])
def test_batch_norm_sees_the_clean_and_the_adversarial_batch(cls):
    module = built(cls)
    before = module.network[1].num_batches_tracked.item()
    quiet_trainer().fit(module, loader(8))
    assert module.network[1].num_batches_tracked.item() == before + 2


def test_trades_attacks_the_clean_prediction_of_eval_mode():
    attacks = []

    class Spy(TRADES):
        def craft(self, images, target, *args):
            attacks.append((images, target))
            return super().craft(images, target, *args)

    module = built(Spy, lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.0))
    images, labels = images_and_labels()
    wanted = module.clean_logits(images)
    quiet_trainer().fit(module, DataLoader(TensorDataset(images, labels), 8))
    ((attacked, target),) = attacks
    assert torch.equal(attacked, images)
    torch.testing.assert_close(target, wanted)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (TRADES, {"start": "zero"}, "`start` to be one of paper, uniform, gaussian"),
        (ATUnlabeled, {"loss": "trades", "start": "zero"}, "`start` to be one of paper, uniform"),
        (TRADES, {"incorrect": "predicted"}, "`incorrect` to be one of attack, ignore but got pre"),
        (TRADES, {"lam": -1.0}, "`lam` to be >= 0 but got -1.0"),
        (MART, {"lam": -1.0}, "`lam` to be >= 0 but got -1.0"),
        (ATUnlabeled, {"loss": "mart"}, "`loss` to be one of at, trades but got mart"),
    ],
)
def test_bad_arguments_of_variants_are_named(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        built(cls, **kwargs)


def test_unlabeled_as_at_takes_what_trades_refuses():
    assert built(ATUnlabeled, start="zero", incorrect="predicted").loss == "at"
    assert built(TRADES, start="gaussian").pgd.start == "gaussian"


def test_unlabeled_needs_mixed_batches_and_other_variants_take_them_too():
    trainer = quiet_trainer()
    trainer.fit(built(ATUnlabeled), mixed_loader())
    assert trainer.callback_metrics["unlabeled/share"].item() == 0.25
    with pytest.raises(ValueError, match=r"Expected batches `\(images, labels, unlabeled\)`"):
        quiet_trainer().fit(built(ATUnlabeled), loader(8))
    quiet_trainer().fit(built(MARTAWP), mixed_loader())


def test_weights_are_averaged_on_mart():
    trainer = quiet_trainer(callbacks=[WeightAveraging(0.5, reference_steps=None)])
    trainer.fit(built(MART), loader(32))
    assert trainer.callback_metrics["weight_averaging/relative_distance"] > 0


@pytest.mark.parametrize("cls", VARIANTS)
def test_a_checkpoint_loads_back_as_its_class_with_its_settings(cls, tmp_path):
    arguments = {"label_smoothing": 0.2, "tau": 1}
    if issubclass(cls, TRADES | MART):
        arguments["lam"] = 2.5
    module, trainer = cls(network=NARROW, **{**PLAIN, **arguments}), quiet_trainer()
    trainer.fit(module, mixed_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_checkpoint(tmp_path / "a.ckpt", network=NARROW)
    assert type(loaded) is cls
    assert loaded.pgd == module.pgd
    assert loaded.training_labels == module.training_labels
    assert getattr(loaded, "lam", None) == getattr(module, "lam", None)
    images, _ = images_and_labels()
    assert torch.equal(loaded(images), module.eval()(images))
