"""The variants as LightningModules: what they attack, minimise, log, and spend."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from networks_for_tests import PassCounter, images_and_labels, tiny_body
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness import lightning_modules
from robust_flatness.callbacks import WeightAveraging, WeightClipping
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
    EntropySGD,
)
from robust_flatness.networks import SmallResNet

STEPS = 7


def built(cls, **kwargs):
    return cls(network=tiny_body, **{**PLAIN, "steps": STEPS, **kwargs})


@pytest.mark.parametrize(
    ("cls", "kwargs", "forwards", "backwards"),
    [
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
    ],
)
def test_a_step_spends_the_minimum_of_passes(cls, kwargs, forwards, backwards):
    module = built(cls, **kwargs)
    passes = PassCounter(module.network)
    quiet_trainer().fit(module, loader(8))
    assert (passes.forwards, passes.backwards) == (8 * forwards, 8 * backwards)


@pytest.mark.parametrize(("cls", "objective"), [(TRADES, trades_objective), (MART, mart_objective)])
def test_objective_is_that_of_two_forwards(cls, objective):
    module = built(cls, lam=3.0).double().eval()
    images, labels = images_and_labels()
    images = images.double()
    adversarial = images.flip(0)
    loss, logits, _ = module.objective(images, adversarial, labels)
    wanted = objective(module(images), module(adversarial), labels, lam=3.0)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    assert torch.equal(logits, module(adversarial))


@pytest.mark.parametrize("cls", [TRADES, MART])
def test_batch_norm_sees_the_clean_and_the_adversarial_batch(cls):
    module = built(cls)
    before = module.network[1].num_batches_tracked.item()
    quiet_trainer().fit(module, loader(8))
    assert module.network[1].num_batches_tracked.item() == before + 2


def spied(cls, **kwargs):
    """A module that remembers what its attacks and its objective were given."""

    class Spy(cls):
        def craft(self, images, labels, *args, **options):
            self.__dict__.setdefault("attacked", []).append((images, labels, args, options))
            return super().craft(images, labels, *args, **options)

        def objective(self, images, adversarial, labels):
            self.__dict__.setdefault("given", []).append((images, adversarial, labels))
            found = super().objective(images, adversarial, labels)
            self.__dict__.setdefault("logits", []).append(found[1].detach())
            return found

    return built(Spy, **kwargs)


def fixed_data():
    images, labels = images_and_labels(32)
    return DataLoader(TensorDataset(images, labels), 8), images, labels


def test_trades_attacks_the_clean_prediction_of_eval_mode():
    module = spied(TRADES, lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.0))
    data, images, _ = fixed_data()
    wanted = module.clean_logits(images[:8])
    quiet_trainer(limit_train_batches=1).fit(module, data)
    ((attacked, target, _, _),) = module.attacked
    assert torch.equal(attacked, images[:8])
    torch.testing.assert_close(target, wanted)


def test_trades_refuses_to_start_where_its_attack_has_no_gradient():
    with pytest.raises(ValueError, match="`start` to be one of paper, uniform, gaussian"):
        built(TRADES, start="zero")
    assert built(TRADES, start="gaussian").pgd.start == "gaussian"


def test_label_noise_and_smoothing_do_not_reach_the_attack_nor_the_metrics():
    module = spied(AT, label_noise=0.9, label_smoothing=0.3)
    data, _, labels = fixed_data()
    trainer = quiet_trainer()
    trainer.fit(module, data)
    attacked = torch.cat([target for _, target, *_ in module.attacked])
    given = torch.cat([target for *_, target in module.given])
    assert torch.equal(attacked, labels)
    changed = (given != labels).float().mean().item()
    assert 0.5 < changed < 1
    assert trainer.callback_metrics["label_noise/changed"].item() == pytest.approx(changed)
    logged = trainer.callback_metrics
    # Smoothed and noisy is the training loss alone.
    logits = torch.cat(module.logits)
    torch.testing.assert_close(logged["train/robust_loss"], cross_entropy(logits, labels))
    wrong = (logits.argmax(1) != labels).float().mean()
    torch.testing.assert_close(logged["train/robust_error"], wrong)
    assert logged["train/loss"].item() != pytest.approx(cross_entropy(logits, labels).item(), 1e-3)


def test_label_noise_is_drawn_anew_in_each_batch():
    module = spied(AT, label_noise=0.5)
    images, labels = images_and_labels(8)
    data = DataLoader(TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), 8)
    quiet_trainer().fit(module, data)
    drawn = [target for *_, target in module.given]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_awp_ascends_on_the_labels_that_the_step_trains_on():
    module = spied(ATAWP, label_noise=0.9)
    data, *_ = fixed_data()
    quiet_trainer(limit_train_batches=1).fit(module, data)
    first, second = (target for *_, target in module.given)
    assert torch.equal(first, second)


def test_metrics_do_not_count_the_ascent():
    counts = []

    class Spy(TRADESAWP):
        def on_before_zero_grad(self, optimizer):
            counts.append(self.means.sums["train/divergence"][1])

    quiet_trainer(limit_train_batches=2).fit(built(Spy, warmup=0.0), fixed_data()[0])
    assert counts[-1] == 16


def test_incorrect_images_stay_clean_or_are_attacked_as_what_they_look_like():
    data, images, labels = fixed_data()
    predicted = built(AT).clean_logits(images[:8]).argmax(1)
    wrong = predicted != labels[:8]
    assert wrong.sum() > 0
    module = spied(AT, incorrect="ignore")
    quiet_trainer(limit_train_batches=1).fit(module, data)
    clean, adversarial, _ = module.given[0]
    moved = (clean != adversarial).flatten(1).any(1)
    assert torch.equal(moved, ~wrong)
    module = spied(AT, incorrect="predicted")
    quiet_trainer(limit_train_batches=1).fit(module, data)
    assert torch.equal(module.attacked[0][1], predicted)
    assert torch.equal(module.given[0][2], labels[:8])


@pytest.mark.parametrize("incorrect", ["attack", "ignore", "predicted"])
def test_a_network_that_is_not_finite_is_wrong_on_every_image(incorrect):
    data, _, labels = fixed_data()
    module = spied(AT, incorrect=incorrect)
    with torch.no_grad():
        module.network[0].weight.fill_(math.nan)
    trainer = quiet_trainer(limit_train_batches=1)
    trainer.fit(module, data)
    clean, adversarial, _ = module.given[0]
    assert ((adversarial >= 0) & (adversarial <= 1)).all()
    # Without a prediction there is nothing but the label to attack, and no correct image.
    assert torch.equal(module.attacked[0][1], labels[:8])
    assert torch.equal(clean, adversarial) == (incorrect == "ignore")
    assert trainer.callback_metrics["train/robust_error"] == 1
    assert trainer.callback_metrics["train/robust_loss"].isnan()


def test_a_radius_above_one_is_meant_in_l2():
    assert built(AT, eps=2.0, norm="l2", eps_scale=1.5).pgd.eps == 3


def test_larger_eps_keeps_the_length_of_the_steps():
    module = built(AT, eps=8 / 255, eps_scale=1.125)
    assert module.pgd.eps == pytest.approx(9 / 255)
    assert module.pgd.length == pytest.approx(0.007)


def test_random_weight_perturbation_has_its_length_and_another_direction_each_step():
    seen = []

    class Spy(ATAWP):
        def _record_norms(self, perturbation, weights):
            seen.append(perturbation)
            super()._record_norms(perturbation, weights)

    trainer = quiet_trainer(limit_train_batches=2)
    trainer.fit(built(Spy, xi=0.02, direction="random"), fixed_data()[0])
    for bound in ("min", "max"):
        logged = trainer.callback_metrics[f"awp/relative_norm_{bound}"].item()
        assert logged == pytest.approx(0.02, rel=1e-5)
    first, second = (p["network.0.weight"].flatten() for p in seen)
    assert torch.cosine_similarity(first, second, dim=0).abs() < 0.5


def test_trades_awp_warms_up_for_its_share():
    module = built(TRADESAWP)
    assert (module.xi, module.warmup) == (0.005, 0.05)
    module.trainer = quiet_trainer(max_epochs=40)
    assert module._warming_up


class Mixed(torch.utils.data.Dataset):
    """Every fourth image has a pseudo-label."""

    def __init__(self):
        self.images, self.labels = images_and_labels(16)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.images[index], self.labels[index], index % 4 == 0


@pytest.mark.parametrize(("loss", "forwards"), [("at", STEPS + 2), ("trades", STEPS + 4)])
def test_unlabeled_takes_both_losses_and_logs_the_share(loss, forwards):
    module, trainer = built(ATUnlabeled, loss=loss), quiet_trainer()
    passes = PassCounter(module.network)
    trainer.fit(module, DataLoader(Mixed(), 8))
    assert passes.forwards == 16 * forwards
    assert trainer.callback_metrics["unlabeled/share"].item() == 0.25


def test_unlabeled_as_at_is_at():
    module = built(ATUnlabeled).eval()
    images, labels = images_and_labels()
    loss, *_ = module.objective(images, images, labels)
    assert torch.equal(loss, cross_entropy(module(images), labels))


def test_unlabeled_needs_mixed_batches_and_other_variants_take_them_too():
    with pytest.raises(ValueError, match=r"Expected batches `\(images, labels, unlabeled\)`"):
        quiet_trainer().fit(built(ATUnlabeled), loader(8))
    with pytest.raises(ValueError, match="`loss` to be one of at, trades but got mart"):
        built(ATUnlabeled, loss="mart")
    quiet_trainer().fit(built(MARTAWP), DataLoader(Mixed(), 8))


def test_entropy_sgd_takes_the_runs_seed_and_ends_its_walk_with_the_epoch():
    ends = []

    class Spy(ATEntropySGD):
        def on_train_epoch_end(self):
            ends.append(dict(self.trainer.optimizers[0].param_groups[0]))
            super().on_train_epoch_end()

    module = built(Spy, optimizer=lambda p: EntropySGD(p, langevin_steps=3, seed=99))
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, loader(32))
    # Four batches: a walk of three, and one of one that the epoch cuts short.
    assert [end["outer_steps"] for end in ends] == [2, 4]
    assert [end["walked"] for end in ends] == [0, 0]
    assert trainer.optimizers[0].seed == module.run_seed


def test_entropy_sgd_needs_its_optimizer():
    module = built(ATEntropySGD, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="to build an EntropySGD for ATEntropySGD but got SGD"):
        quiet_trainer().fit(module, loader(8))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_entropy_sgd_goes_with_clipping_and_accumulation(precision):
    def walk(p):
        return EntropySGD(p, lr=1.0, langevin_steps=2)

    module = built(ATEntropySGD, optimizer=walk)
    before = module.network[0].weight.detach().clone()
    trainer = quiet_trainer(
        max_epochs=2, precision=precision, gradient_clip_val=0.1, accumulate_grad_batches=2
    )
    trainer.fit(module, loader(64))
    assert not torch.equal(before, module.network[0].weight)
    # Eight batches make four steps of the walk, and these two outer steps, in each epoch.
    assert trainer.optimizers[0].param_groups[0]["outer_steps"] == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"incorrect": "skip"}, "`incorrect` to be one of attack, ignore, predicted but got skip"),
        ({"eps_scale": -1.0}, "`eps_scale` to be >= 0 but got -1.0"),
        ({"eps": 8}, r"`eps` to be in \[0, 1\] for norm linf.* but got 8; .* is 8/255"),
        ({"eps": 0.9, "eps_scale": 1.125}, r"`eps \* eps_scale` to be in \[0, 1\] .* got 1.0125"),
        ({"step_size": 2}, r"`step_size` to be in \[0, 1\] .* is 2/255"),
        ({"tau": -1}, "`tau` to be >= 0 but got -1"),
        ({"label_noise": 2.0}, r"`label_noise` to be in \[0, 1\] but got 2.0"),
    ],
)
def test_bad_arguments_of_the_base_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        built(AT, **kwargs)


def test_a_clipped_walk_ends_within_its_bounds():
    largest, walked = [], []

    class Watch(Callback):
        def on_train_start(self, trainer, module):
            trainer.optimizers[0].register_step_post_hook(
                lambda optimizer, *_: walked.append(optimizer.param_groups[0]["walked"])
            )

        def on_train_epoch_end(self, trainer, module):
            largest.append(max(p.abs().max().item() for p in module.parameters()))

    def walk(p):
        return EntropySGD(p, lr=5.0, langevin_steps=3)

    module = ATEntropySGD(network=partial(SmallResNet, width=4), optimizer=walk, **PLAIN)
    clipping = WeightClipping(0.01)
    quiet_trainer(max_epochs=2, callbacks=[Watch(), clipping]).fit(module, loader(32))
    # The epoch cuts the second walk short inside the optimizer's step, so that it is clipped too.
    assert walked[-2:] == [0, 0]
    assert max(largest) <= 0.01 + 1e-9


def test_weights_are_averaged_on_mart():
    module, averaging = built(MART), WeightAveraging(0.5, reference_steps=None)
    trainer = quiet_trainer(callbacks=[averaging])
    trainer.fit(module, loader(32))
    assert trainer.callback_metrics["weight_averaging/relative_distance"] > 0


ALL = {
    name: getattr(lightning_modules, name)
    for name in lightning_modules.__all__
    if isinstance(getattr(lightning_modules, name), type)
    and issubclass(getattr(lightning_modules, name), AT)
}
NARROW = partial(SmallResNet, width=4)


def batches_for(cls):
    return DataLoader(Mixed(), 8) if cls is ATUnlabeled else loader(16)


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_a_checkpoint_loads_back_as_its_class_with_its_settings(cls, tmp_path):
    arguments = {"label_smoothing": 0.2, "tau": 1}
    if issubclass(cls, TRADES | MART):
        arguments["lam"] = 2.5
    module, trainer = cls(network=NARROW, **{**PLAIN, **arguments}), quiet_trainer()
    trainer.fit(module, batches_for(cls))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lightning_modules.load_checkpoint(tmp_path / "a.ckpt", network=NARROW)
    assert type(loaded) is cls
    assert loaded.pgd == module.pgd
    assert loaded.training_labels == module.training_labels
    assert getattr(loaded, "lam", None) == getattr(module, "lam", None)
    images, _ = images_and_labels()
    assert torch.equal(loaded(images), module.eval()(images))


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_under_bf16_attacks_and_losses_keep_float32(cls):
    seen = []

    class Spy(cls):
        def objective(self, images, adversarial, labels):
            loss, logits, terms = super().objective(images, adversarial, labels)
            seen.append((images.dtype, adversarial.dtype, loss.dtype, logits.dtype))
            return loss, logits, terms

    module = Spy(network=NARROW, **PLAIN)
    quiet_trainer(precision="bf16-mixed").fit(module, batches_for(cls))
    assert set(seen) == {(torch.float32,) * 4}
    assert all(p.isfinite().all() for p in module.parameters())


def walk_of(length, **kwargs):
    return lambda p: EntropySGD(p, lr=1.0, langevin_steps=length, **kwargs)


class Ends(Callback):
    """What callbacks see at the end of an epoch and of training: is a walk under way?"""

    def __init__(self):
        self.walking = []

    def on_train_epoch_end(self, trainer, module):
        self.walking.append(trainer.optimizers[0].walking)

    on_train_end = on_train_epoch_end


class StopsAt(Callback):
    """Ends training in the middle of an epoch, as a timer does."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 5


@pytest.mark.parametrize("kwargs", [{"max_steps": 6}, {"callbacks": [StopsAt()]}, {}])
def test_no_walk_outlives_the_epoch_nor_training(kwargs):
    module, ends = built(AT, optimizer=walk_of(4)), Ends()
    callbacks = [*kwargs.pop("callbacks", []), ends]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, **kwargs)
    trainer.fit(module, loader(72))
    assert ends.walking
    assert not any(ends.walking)
    assert trainer.optimizers[0].seed == module.run_seed


def test_averages_leave_the_walk_out():
    seen = []

    class Outer(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not trainer.optimizers[0].walking:
                seen.append(module.network[0].weight.detach().double())

    module = built(ATEntropySGD, optimizer=walk_of(4, noise=0.1))
    averaging = WeightAveraging(0.5, reference_steps=None)
    quiet_trainer(callbacks=[averaging, Outer()]).fit(module, loader(64))
    first, second = seen
    torch.testing.assert_close(
        module.network[0].weight.double(), (first + second) / 2, rtol=1e-5, atol=1e-6
    )


def test_entropy_sgd_combines_with_awp_and_trades():
    module = built(TRADESAWP, warmup=0.0, optimizer=walk_of(3))
    trainer = quiet_trainer()
    trainer.fit(module, loader(32))
    assert not trainer.optimizers[0].walking
    assert trainer.callback_metrics["awp/relative_norm_max"].item() == pytest.approx(0.005, 1e-4)


def test_the_logged_rate_is_the_one_that_the_epoch_trained_with():
    logged = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch:
                logged.append(trainer.callback_metrics["train/learning_rate"].item())

    schedule = {"lr_scheduler": lambda o: lightning_modules.MultiStep(o, milestones=[0.5])}
    trainer = quiet_trainer(max_epochs=4, callbacks=[Rates()])
    trainer.fit(built(AT, **schedule), loader(8))
    logged.append(trainer.callback_metrics["train/learning_rate"].item())
    assert logged == pytest.approx([0.05, 0.05, 0.005, 0.005])


def test_warm_up_needs_an_end_of_training():
    schedule = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)}
    with pytest.raises(ValueError, match="as `warmup` is a share of training, but got -1"):
        quiet_trainer(max_epochs=-1, max_steps=2).fit(built(TRADESAWP, **schedule), loader(8))


def test_trades_attacks_predictions_in_any_case():
    with pytest.raises(ValueError, match="`incorrect` to be one of attack, ignore but got pred"):
        built(TRADES, incorrect="predicted")
    with pytest.raises(ValueError, match="`start` to be one of paper, uniform, gaussian"):
        built(ATUnlabeled, loss="trades", start="zero")
    assert built(ATUnlabeled, start="zero", incorrect="predicted").loss == "at"
