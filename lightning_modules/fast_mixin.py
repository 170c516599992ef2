"""What makes training fast on a GPU without changing what is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from robust_flatness.functional.arithmetic import bfloat16_forwards, has_bfloat16
from robust_flatness.functional.graphed_attack import GraphedAttack
from robust_flatness.functional.iterate import Criterion
from robust_flatness.functional.modes import Model
from robust_flatness.lightning_modules.pgd_mixin import PGDMixin

Fast = bool | Literal["graph"]


class FastMixin(PGDMixin, LightningModule):
    """Trains in bfloat16 where the device has it, with the optimizer's steps in one kernel.

    Activations are bfloat16; weights, their gradients, perturbations of images and weights, logits
    and losses are float32. It stands back on other devices, and where the trainer has another
    precision than `32-true`. Without it PyTorch decides: convolutions train in TF32 by default.

    Attributes:
        fast: Whether to; `graph` also replays the attack as a CUDA graph, see `GraphedAttack`.
            Measures read it too: PGD searches in bfloat16, and what they report is float32, without
            TF32. AutoAttack and the joint ascent of worst-case flatness are float32 throughout.
    """

    fast: Fast
    _graphed: GraphedAttack | None = None

    def on_train_start(self) -> None:
        """Says so where a graph was asked for and there will be none."""
        super().on_train_start()
        if self.fast == "graph" and not self._replays:
            rank_zero_warn(
                "`fast` graph has no effect here: it needs a GPU with bfloat16, the trainer's "
                "precision 32-true, and attacks in eval mode."
            )

    def on_train_end(self) -> None:
        """Frees the graph's memory for what is measured afterwards."""
        super().on_train_end()
        self._graphed = None

    @property
    def is_fast(self) -> bool:
        """Whether this training is: it was asked for, the device can, and nobody else decided."""
        return bool(self.fast) and self.trainer.precision == "32-true" and has_bfloat16(self.device)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The arithmetic of a training step's forwards."""
        if self.is_fast:
            with bfloat16_forwards(self.device):
                yield
        else:
            yield

    def search(
        self, model: Model, images: Tensor, labels: Tensor, start: Tensor, criterion: Criterion
    ) -> Tensor:
        """Runs the attack, or replays it where it is on the module itself."""
        if model is not self or not self._replays:
            return super().search(model, images, labels, start, criterion)
        if self._graphed is None or self._graphed.pgd != self.pgd:
            self._graphed = GraphedAttack(self.pgd)
        return self._graphed(self, images, labels, start, criterion, self.arithmetic)

    @property
    def _replays(self) -> bool:
        return self.fast == "graph" and self.is_fast and self.pgd.mode == "eval"

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
