"""The evaluation of a run's end, as one call on any network."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from robust_flatness.callbacks.final_evaluation import FinalEvaluation
from robust_flatness.callbacks.final_measurement import FinalMeasurement


class _Network(LightningModule):
    """A network as a module that a trainer tests."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks measure."""


def evaluate(
    network: nn.Module,
    data: LightningDataModule,
    measurements: Sequence[FinalMeasurement] | None = None,
    **trainer: Any,
) -> dict[str, float]:
    """Measures a network as `fit` does at its end and `test` does.

    Args:
        network: Maps images `(N, C, H, W)` in [0, 1] to logits.
        data: Where the images of the splits come from.
        measurements: What is measured, such as `FinalEvaluation(restarts=5)` and `AutoAttack()`;
            `None` for the paper's protocol without AutoAttack.
        trainer: For Lightning's `Trainer`: `devices=2`, `accelerator="cpu"`, …

    Returns:
        Figures by name, `test/robust_loss`, `flatness/average/test`, ….

    Example:
        >>> from robust_flatness.datamodules import Digits
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> light = FinalEvaluation(num_examples=4, steps=1, restarts=1, num_perturbations=1)
        >>> settings = {"enable_progress_bar": False, "accelerator": "cpu"}
        >>> figures = evaluate(network, Digits(), [light], **settings)
        >>> figures["test/robust_error"] >= figures["test/error"]
        True
    """
    chosen = [FinalEvaluation()] if measurements is None else list(measurements)
    module = network if isinstance(network, LightningModule) else _Network(network)
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    tester = Trainer(callbacks=list(chosen), **{**settings, **trainer})
    tester.test(module, datamodule=data, verbose=False)
    return {
        name: value
        for measurement in chosen
        for name, value in measurement.final_results["final"].items()
    }
