"""Entropy-SGD: the optimizer against the update written out, and its walks in training."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from networks_for_tests import tiny_body
from torch import nn
from torch.optim import SGD
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.callbacks import WeightAveraging, WeightClipping
from robust_flatness.lightning_modules import AT, TRADESAWP, ATEntropySGD, EntropySGD
from robust_flatness.networks import SmallResNet

LR, MOMENTUM, DECAY = 0.3, 0.9, 0.01


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(index):
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(3, (6,), generator=generator)


def train(model, optimizer, batches, *, closure=False):
    for index in batches:
        images, labels = batch(index)

        def evaluate(images=images, labels=labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("closure", [False, True])
def test_without_langevin_steps_it_is_torchs_sgd_bit_for_bit(closure):
    first, second = network(), network()
    settings = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    ours = EntropySGD(first.parameters(), langevin_steps=0, **settings)
    theirs = SGD(second.parameters(), **settings)
    found = train(first, ours, range(5), closure=closure)
    wanted = train(second, theirs, range(5), closure=closure)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def written_out(length, walks, *, gamma, momentum, averaging=0.75, rate=0.1):
    """Outer weights after some walks, without noise."""
    model = network()
    buffers = [torch.zeros_like(p) for p in model.parameters()]
    number = 0
    for outer in range(walks):
        centre = [p.detach().clone() for p in model.parameters()]
        mean = [c.clone() for c in centre]
        for _ in range(length):
            images, labels = batch(number)
            loss = nn.functional.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g, c, m in zip(model.parameters(), gradients, centre, mean):
                    p -= rate * (g + DECAY * p + gamma * (p - c))
                    m.copy_(averaging * m + (1 - averaging) * p)
            number += 1
        with torch.no_grad():
            for p, c, m, b in zip(model.parameters(), centre, mean, buffers):
                direction = c - m + DECAY * c
                # torch starts the buffer as the first gradient
                b.copy_(direction if outer == 0 else momentum * b + direction)
                p.copy_(c - LR * b)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_follow_the_update_written_out(length, momentum):
    model = network()
    optimizer = EntropySGD(
        model.parameters(),
        lr=LR,
        momentum=momentum,
        nesterov=False,
        weight_decay=DECAY,
        langevin_steps=length,
        noise=0.0,
        gamma=0.5,
    )
    found = train(model, optimizer, range(3 * length))
    wanted = written_out(length, 3, gamma=0.5, momentum=momentum)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def single(value=1.0, **kwargs):
    weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "gamma": 0.0}
    return weight, EntropySGD([weight], **{**plain, **kwargs})


def step(weight, optimizer, gradient=0.0):
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()


def test_noise_has_the_langevin_scale_and_is_new_in_each_step():
    count, rate, scale = 20_000, 0.1, 1e-2
    weight = nn.Parameter(torch.zeros(count, dtype=torch.float64))
    optimizer = EntropySGD(
        [weight], momentum=0.0, nesterov=False, langevin_steps=3, langevin_lr=rate, noise=scale
    )
    seen = []
    for _ in range(2):
        before = weight.detach().clone()
        step(weight, optimizer)
        seen.append(weight.detach() - before)
    expected = scale * (2 * rate) ** 0.5
    assert seen[0].std().item() == pytest.approx(expected, rel=0.02)
    assert correlation(*seen) < 0.03


def test_noise_is_new_in_each_walk():
    weight = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = EntropySGD([weight], momentum=0.0, nesterov=False, langevin_steps=1, noise=1.0)
    seen = []
    for _ in range(2):
        before = weight.detach().clone()
        step(weight, optimizer)
        seen.append(weight.detach() - before)
    assert correlation(*seen) < 0.03


def correlation(first, second):
    return torch.corrcoef(torch.stack([first, second]))[0, 1].abs()


def test_noise_comes_from_the_seed_alone():
    def walked(seed):
        weight, optimizer = single(noise=1.0, langevin_steps=2, seed=seed)
        torch.manual_seed(seed + 7)
        step(weight, optimizer)
        return weight.item()

    assert walked(0) == walked(0)
    assert walked(0) != walked(1)


def test_schedules_reach_the_outer_step():
    weight, optimizer = single(lr=1.0, noise=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    moves = []
    for _ in range(3):
        before = weight.item()
        step(weight, optimizer, gradient=1.0)
        moves.append(before - weight.item())
        scheduler.step()
    # 1 - β = 0.25 of a walk of 0.1
    assert moves == pytest.approx([0.025, 0.0025, 0.00025])


def test_pull_grows_with_outer_steps_and_ends_at_the_whole_way_back():
    weight, optimizer = single(gamma=0.2, scoping=0.5, noise=0.0, langevin_steps=1)
    pulls = []
    for _ in range(3):
        pulls.append(optimizer.pull)
        step(weight, optimizer)
    assert pulls == pytest.approx([0.2, 0.3, 0.45])
    optimizer.param_groups[0]["outer_steps"] = 60_000
    assert optimizer.pull == pytest.approx(10.0)  # 1 / η'


def test_finish_ends_a_walk_with_the_outer_step_and_gives_gradients_back():
    weight, optimizer = single(lr=1.0, noise=0.0, langevin_steps=5)
    step(weight, optimizer, gradient=1.0)
    step(weight, optimizer, gradient=1.0)
    # w' = 0.8, μ = 0.75 (0.75 + 0.25 · 0.9) + 0.25 · 0.8
    optimizer.finish()
    assert weight.item() == pytest.approx(1 - (1 - (0.75 * (0.75 + 0.225) + 0.2)))
    assert weight.grad.item() == 1.0
    after = weight.item()
    optimizer.finish()
    assert weight.item() == after
    assert optimizer.param_groups[0]["outer_steps"] == 1


def test_state_dict_goes_on_in_the_middle_of_a_walk():
    def build():
        model = network()
        optimizer = EntropySGD(model.parameters(), lr=LR, langevin_steps=3, noise=1e-2)
        return model, optimizer

    model, optimizer = build()
    whole = train(model, optimizer, range(7))
    model, optimizer = build()
    train(model, optimizer, range(4))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model, optimizer = build()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    resumed = train(model, optimizer, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_the_state_of_an_sgd_is_taken_with_walks_at_zero():
    weight, optimizer = single()
    sgd = SGD([weight], lr=0.7, momentum=0.0)
    optimizer.load_state_dict(sgd.state_dict())
    step(weight, optimizer, gradient=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert optimizer.param_groups[0]["outer_steps"] == 1


def test_parameters_without_gradient_are_left_alone():
    weight, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = EntropySGD([weight, frozen], lr=LR, momentum=0.0, nesterov=False)
    step(weight, optimizer, gradient=1.0)
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"langevin_steps": -1}, "`langevin_steps` to be >= 0 but got -1"),
        ({"averaging": 1.5}, r"`averaging` to be in \[0, 1\] but got 1.5"),
        ({"gamma": -1.0}, "`gamma` to be >= 0 but got -1.0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EntropySGD([nn.Parameter(torch.zeros(1))], **kwargs)


@pytest.mark.parametrize("length", [0, 1])
def test_hooks_of_the_optimizer_run_once_a_step(length):
    SGD([nn.Parameter(torch.zeros(1))])  # torch has wrapped SGD's own step by now
    weight, optimizer = single(langevin_steps=length)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    step(weight, optimizer, gradient=1.0)
    assert calls == ["before", "after"]


def module_with(length, cls=ATEntropySGD, network=tiny_body, lr=1.0, seed=0, noise=1e-4):
    def optimizer(parameters):
        return EntropySGD(parameters, lr=lr, langevin_steps=length, seed=seed, noise=noise)

    return cls(network, optimizer=optimizer, **PLAIN)


class Ends(Callback):
    """What callbacks see of the optimizer at the end of epochs and of training."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, module):
        self.states.append({**trainer.optimizers[0].param_groups[0]})

    on_train_end = on_train_epoch_end


class StopsAt(Callback):
    """Ends training in the middle of an epoch, as a timer does."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx == 5


@pytest.mark.parametrize(
    ("cls", "kwargs", "outer_steps"),
    [
        # An epoch has nine batches: two walks of four, and one that it cuts short.
        (ATEntropySGD, {}, [3, 6, 6]),
        (AT, {"max_steps": 6}, [2, 2]),
        (AT, {"callbacks": [StopsAt()]}, [2, 2]),
        (TRADESAWP, {"max_epochs": 1}, [3, 3]),
    ],
)
def test_no_walk_outlives_the_epoch_nor_training(cls, kwargs, outer_steps):
    module, ends = module_with(4, cls, seed=99), Ends()
    callbacks = [*kwargs.pop("callbacks", []), ends]
    trainer = quiet_trainer(**{"max_epochs": 2, "callbacks": callbacks, **kwargs})
    trainer.fit(module, loader(72))
    assert [state["outer_steps"] for state in ends.states] == outer_steps
    assert not any(state["walked"] for state in ends.states)
    assert trainer.optimizers[0].seed == module.run_seed


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_and_accumulation_count_steps_of_the_walk(precision):
    module = module_with(2)
    before = module.network[0].weight.detach().clone()
    trainer = quiet_trainer(
        max_epochs=2, precision=precision, gradient_clip_val=0.1, accumulate_grad_batches=2
    )
    trainer.fit(module, loader(64))
    assert not torch.equal(before, module.network[0].weight)
    # Eight batches make four steps of the walk, and these two outer steps, in each epoch.
    assert trainer.optimizers[0].param_groups[0]["outer_steps"] == 4


def test_a_walk_that_the_epoch_cuts_short_is_clipped_too():
    largest = []

    class Largest(Callback):
        def on_train_epoch_end(self, trainer, module):
            largest.append(max(p.abs().max().item() for p in module.parameters()))

    trainer = quiet_trainer(max_epochs=2, callbacks=[Largest(), WeightClipping(0.01)])
    # WeightClipping refuses ordinary BatchNorm.
    trainer.fit(module_with(3, network=partial(SmallResNet, width=4), lr=5.0), loader(32))
    assert max(largest) <= 0.01 + 1e-9


def test_averages_leave_the_walk_out():
    outer = []

    class Outer(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not trainer.optimizers[0].walking:
                outer.append(module.network[0].weight.detach().double())

    module, averaging = module_with(4, noise=0.1), WeightAveraging(0.5, reference_steps=None)
    quiet_trainer(callbacks=[averaging, Outer()]).fit(module, loader(64))
    first, second = outer
    torch.testing.assert_close(
        module.network[0].weight.double(), (first + second) / 2, rtol=1e-5, atol=1e-6
    )


def test_the_variant_needs_its_optimizer_and_logs_the_pull():
    module = ATEntropySGD(tiny_body, optimizer=lambda p: SGD(p, lr=0.1), **PLAIN)
    with pytest.raises(ValueError, match="to build an EntropySGD for ATEntropySGD but got SGD"):
        quiet_trainer().fit(module, loader(8))
    trainer = quiet_trainer()
    trainer.fit(module_with(1), loader(8))
    assert trainer.callback_metrics["entropy_sgd/pull"].item() == pytest.approx(1e-4)
