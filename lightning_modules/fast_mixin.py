"""What makes training fast on a GPU without changing what is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import SGD, Adam, AdamW, Optimizer

from robust_flatness.functional.evaluation import bfloat16_autocast, has_bfloat16
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin

Fast = bool | Literal["graph"]


class FastMixin(PGDMixin, LightningModule):
    """Trains in bfloat16 where the device has it, with the optimizer's steps in one kernel.

    Activations are bfloat16; weights, their gradients, perturbations of images and weights, logits
    and losses are float32. It stands back on other devices, and where the trainer has another
    precision than `32-true`. Without it PyTorch decides: convolutions train in TF32 by default.

    Attributes:
        fast: Whether to; `graph`, of earlier versions, is the same as `True`.
            Measures read it too: PGD searches in bfloat16, and what they report is float32, without
            TF32. AutoAttack and the joint ascent of worst-case flatness are float32 throughout.
    """

    fast: Fast

    def on_train_start(self) -> None:
        """Warns of `graph`, which earlier versions accepted."""
        super().on_train_start()
        if self.fast == "graph":
            rank_zero_warn("`fast` graph has no effect: it is the same as `fast` true.")

    @property
    def is_fast(self) -> bool:
        """Whether this training is: it was asked for, the device can, and nobody else decided."""
        return bool(self.fast) and self.trainer.precision == "32-true" and has_bfloat16(self.device)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The arithmetic of a training step's forwards."""
        if self.is_fast:
            with bfloat16_autocast(self.device):
                yield
        else:
            yield

    def fused(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer, with fused steps if it has them and nothing was said of how to step.

        Args:
            optimizer: As it was built.
        """
        ways = [optimizer.defaults.get(way, False) for way in ("fused", "foreach")]
        groups, known = optimizer.param_groups, isinstance(optimizer, (SGD, Adam, AdamW))
        # A weight that is frozen at first would lack the momentum that others have.
        trainable = all(weight.requires_grad for group in groups for weight in group["params"])
        if self.is_fast and known and trainable and ways == [None, None]:
            for settings in (optimizer.defaults, *groups):
                settings["fused"] = True
        if known:
            optimizer.register_load_state_dict_pre_hook(_keep_own_way)
        return optimizer


def _keep_own_way(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state without what it says of fused steps, on whatever device they were."""
    own = {"fused": optimizer.defaults.get("fused")}
    return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}
