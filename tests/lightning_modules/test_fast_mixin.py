import pytest
import torch
from networks_for_tests import tiny_body
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import PLAIN, ToyData, loader, quiet_trainer

from robust_flatness.callbacks import RobustEvaluation
from robust_flatness.datamodules import ResidentImages, RobustDataModule
from robust_flatness.lightning_modules import (
    AT,
    ATAWP,
    MART,
    TRADES,
    TRADESAWP,
    ATEntropySGD,
    EntropySGD,
)

CLASSES = [AT, ATAWP, TRADES, TRADESAWP, MART]


class Types:
    """Types of the logits of each forward."""

    def __init__(self, module):
        self.seen = []
        module.network.register_forward_hook(lambda *given: self.seen.append(given[-1].dtype))


def trained(cls=AT, *, batches=2, **kwargs):
    torch.manual_seed(0)
    module = cls(network=tiny_body, **PLAIN, **kwargs)
    types, trainer = Types(module), quiet_trainer()
    torch.manual_seed(0)
    trainer.fit(module, loader(8 * batches))
    return module, types.seen, trainer


def apart(one, other):
    """How far two modules have gone apart, relative to how far they have come."""
    modules = (one.network, other.network, tiny_body(10, 3))
    first, second, start = (torch.cat([p.flatten() for p in m.parameters()]) for m in modules)
    return ((first - second).norm() / (second - start).norm()).item()


def test_on_the_cpu_it_changes_nothing():
    fast, seen, trainer = trained()
    plain, _, _ = trained(fast=False)
    assert set(seen) == {torch.float32}
    assert not trainer.optimizers[0].param_groups[0]["fused"]
    for one, other in zip(fast.parameters(), plain.parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cls", CLASSES)
def test_all_forwards_of_a_step_are_in_bfloat16_and_weights_in_float32(cls, cpu_as_gpu):
    fast, seen, trainer = trained(cls, batches=1)
    plain, others, _ = trained(cls, batches=1, fast=False)
    assert set(seen) == {torch.bfloat16}
    assert set(others) == {torch.float32}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in fast.parameters())
    assert trainer.optimizers[0].param_groups[0]["fused"]
    assert 0 < apart(fast, plain) < 0.1


@pytest.mark.parametrize("cls", CLASSES)
def test_every_weight_has_a_gradient(cls, cpu_as_gpu):
    missing = []

    class Watched(cls):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            missing.extend(
                n for n, p in self.named_parameters() if p.grad is None or p.grad.norm() == 0
            )

    trained(Watched)
    # The bias of a convolution in front of BatchNorm has none to speak of.
    assert set(missing) <= {"network.0.bias"}


def test_the_perturbation_of_weights_is_felt(cpu_as_gpu):
    losses = [trained(ATAWP, xi=xi)[2].callback_metrics["train/loss"].item() for xi in (0.0, 0.5)]
    assert losses[1] > losses[0] + 0.1


def test_a_precision_of_the_trainer_goes_first(cpu_as_gpu):
    module = AT(tiny_body, **PLAIN)
    types = Types(module)
    trainer = quiet_trainer(precision="64-true")
    trainer.fit(module, loader(8, double=True))
    assert set(types.seen) == {torch.float64}
    assert not trainer.optimizers[0].param_groups[0]["fused"]


@pytest.mark.parametrize("ways", [{"foreach": True}, {"fused": False}])
def test_ways_to_step_that_were_chosen_are_kept(ways, cpu_as_gpu):
    _, _, trainer = trained(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, **ways))
    group = trainer.optimizers[0].param_groups[0]
    assert not group["fused"]
    assert group["foreach"] == ways.get("foreach")


def test_optimizers_without_fused_steps_are_left_alone(cpu_as_gpu):
    _, seen, trainer = trained(optimizer=lambda p: torch.optim.Rprop(p, lr=0.01))
    assert "fused" not in trainer.optimizers[0].param_groups[0]
    assert set(seen) == {torch.bfloat16}


def test_entropy_sgd_walks_fused(cpu_as_gpu):
    module, _, trainer = trained(ATEntropySGD, optimizer=lambda p: EntropySGD(p, lr=1.0))
    assert trainer.optimizers[0].param_groups[0]["fused"]
    assert not module.walk.walking
    plain, _, _ = trained(ATEntropySGD, optimizer=lambda p: EntropySGD(p, lr=1.0), fast=False)
    assert 0 < apart(module, plain) < 0.2


def test_adagrad_and_frozen_weights_step_as_before(cpu_as_gpu):
    class Frozen(AT):
        def configure_optimizers(self):
            self.network[0].requires_grad_(False)
            return super().configure_optimizers()

    _, _, adagrad = trained(optimizer=lambda p: torch.optim.Adagrad(p, lr=0.01))
    _, _, frozen = trained(Frozen)
    for trainer in (adagrad, frozen):
        assert not trainer.optimizers[0].param_groups[0]["fused"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_steps_as_it_was_told_to(before, optimizer, cpu_as_gpu, tmp_path):
    def build(params):
        return optimizer(params, lr=0.01)

    _, _, trainer = trained(fast=before, optimizer=build)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = AT(tiny_body, **PLAIN, fast=not before, optimizer=build)
    resumed = quiet_trainer(max_epochs=2)
    resumed.fit(module, loader(16), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert bool(resumed.optimizers[0].param_groups[0]["fused"]) is not before
    assert resumed.current_epoch == 2


@pytest.mark.parametrize("fast", [True, False])
def test_measures_search_as_the_module_does_and_tell_in_float32(fast, cpu_as_gpu):
    module = AT(tiny_body, **PLAIN, fast=fast)
    types = Types(module)
    measure = RobustEvaluation(split="test", steps=2, restarts=1, num_examples=8)
    quiet_trainer(callbacks=[measure]).test(module, ToyData(), verbose=False)
    # One image to find the classes, the clean images, and the attack with its look at the best.
    search = [torch.bfloat16] * 3 + [torch.float32] if fast else [torch.float32] * 3
    assert types.seen[-len(search) :] == search
    assert types.seen[: -len(search)].count(torch.bfloat16) == 0


def test_a_graph_has_no_effect():
    with pytest.warns(UserWarning, match="`fast` graph has no effect"):
        graph, _, _ = trained(fast="graph")
    assert apart(graph, trained()[0]) == 0


class Resident(RobustDataModule):
    """Random images on the device."""

    num_classes, in_channels, mean, std = 10, 3, [0.5] * 3, [0.25] * 3

    def sources(self):
        images = torch.randint(256, (96, 3, 8, 8), dtype=torch.uint8)
        found = ResidentImages(images, torch.arange(96) % 10)
        return found, found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_on_a_gpu_no_step_waits_for_it(cls, fast):
    class Watched(cls):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            # From here to the end of the next step: fetching, augmenting, crafting, stepping. The
            # first batches are checked.
            torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx <= 9 else "default")

    module = Watched(network=tiny_body, **PLAIN, fast=fast)
    data = Resident(batch_size=8, num_val=8, num_test=8)
    try:
        quiet_trainer(accelerator="gpu", devices=1).fit(module, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(TorchDispatchMode):
    """Operations for which a GPU's host would wait, as they hand values to Python."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or any(name.startswith(wait) for wait in self.names):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_hands_no_value_to_python(cls):
    waits = Waits()

    class Watched(cls):
        def training_step(self, batch, batch_idx):
            # The first batch is checked, which waits.
            if batch_idx == 0:
                return super().training_step(batch, batch_idx)
            with waits:
                return super().training_step(batch, batch_idx)

    trained(Watched)
    assert waits.found == []
    with waits:
        assert torch.ones(2)[0].item() == 1
    assert waits.found
