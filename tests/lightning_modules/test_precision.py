"""The trainer's precision: what is bfloat16 and what stays float32, and what waits for a device."""

from functools import partial

import pytest
import torch
from networks_for_tests import tiny_body
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import PLAIN, VARIANTS, mixed_loader, quiet_trainer

from robust_flatness.datamodules import ResidentImages, RobustDataModule
from robust_flatness.functional import PGD
from robust_flatness.lightning_modules import AT, ATAWP, MART, TRADESAWP, ATUnlabeled, External
from robust_flatness.networks import SmallResNet


def trained(cls=AT, precision="bf16-mixed", batches=2, **kwargs):
    torch.manual_seed(0)
    module = cls(partial(SmallResNet, width=4), **PLAIN, **kwargs)
    trainer = quiet_trainer(precision=precision, limit_train_batches=batches)
    torch.manual_seed(0)
    trainer.fit(module, mixed_loader())
    return module, trainer


@pytest.mark.parametrize("cls", VARIANTS)
def test_under_bf16_mixed_forwards_are_bfloat16_and_all_else_is_float32(cls):
    missing, losses, forwards = [], [], []

    class Watched(cls):
        def on_fit_start(self):
            super().on_fit_start()
            self.network.classifier.register_forward_hook(
                lambda *args: forwards.append(args[-1].dtype)
            )

        def objective(self, images, adversarial, labels):
            loss, logits, terms = super().objective(images, adversarial, labels)
            losses.extend(tensor.dtype for tensor in (images, adversarial, loss, logits))
            return loss, logits, terms

        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            missing.extend(
                n for n, p in self.named_parameters() if p.grad is None or p.grad.norm() == 0
            )

    module, trainer = trained(Watched, batches=1)
    assert not missing
    assert set(forwards) == {torch.bfloat16}
    assert set(losses) == {torch.float32}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    plain, other = trained(cls, "32-true", batches=1)
    assert not torch.equal(module.network.classifier.weight, plain.network.classifier.weight)
    loss = trainer.callback_metrics["train/loss"].item()
    assert loss == pytest.approx(other.callback_metrics["train/loss"].item(), rel=0.05)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize("cls", [AT, TRADESAWP, MART])
def test_attacks_are_in_float32_at_least(cls, precision, monkeypatch):
    attack, moved = PGD.attack, []

    def spied(pgd, model, images, *args):
        found = attack(pgd, model, images, *args)
        moved.append((found.images - images).abs().max().item())
        assert found.images.dtype in (torch.float32, torch.float64)
        return found

    monkeypatch.setattr(PGD, "attack", spied)
    trained(cls, precision)
    assert 0.05 < max(moved) <= PLAIN["eps"] + 1e-6


@pytest.mark.parametrize("fused", [None, True])
def test_fused_steps_are_those_that_the_user_asks_for(fused):
    _, trainer = trained(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, fused=fused))
    assert trainer.optimizers[0].param_groups[0]["fused"] is fused


@pytest.mark.parametrize("fast", [True, False, "graph"])
@pytest.mark.parametrize("cls", [AT, ATAWP, External])
def test_fast_of_earlier_versions_warns_and_has_no_effect(cls, fast):
    with pytest.warns(FutureWarning, match="`fast` has no effect: .* `precision` bf16-mixed"):
        module = cls(tiny_body(10, 3), fast=fast)
    assert "fast" not in module.hparams


class Resident(RobustDataModule):
    """Random images on the device."""

    num_classes, in_channels, mean, std = 10, 3, [0.5] * 3, [0.25] * 3

    def sources(self):
        images = torch.randint(256, (96, 3, 8, 8), dtype=torch.uint8)
        found = ResidentImages(images, torch.arange(96) % 10)
        return found, found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("cls", [variant for variant in VARIANTS if variant is not ATUnlabeled])
def test_on_a_gpu_no_step_waits_for_it(cls, precision):
    class Watched(cls):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            # From here to the end of the next step: fetching, augmenting, crafting, stepping. The
            # first batch is checked.
            torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx <= 9 else "default")

    module = Watched(partial(SmallResNet, width=4), **PLAIN)
    data = Resident(batch_size=8, num_val=8, num_test=8)
    trainer = quiet_trainer(accelerator="gpu", devices=1, precision=precision)
    try:
        trainer.fit(module, datamodule=data)
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


@pytest.mark.parametrize("cls", VARIANTS)
def test_a_step_hands_no_value_to_python(cls):
    waits = Waits()

    class Watched(cls):
        def training_step(self, batch, batch_idx):
            # The first batch is checked, which waits.
            if batch_idx == 0:
                return super().training_step(batch, batch_idx)
            with waits:
                return super().training_step(batch, batch_idx)

    trained(Watched, "32-true")
    assert waits.found == []
    with waits:
        assert torch.ones(2)[0].item() == 1
    assert waits.found
