"""The evaluation of a run's end, as one call on any network."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

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
    data: LightningDataModule | DataLoader[Any] | Dataset[Any] | Sequence[Tensor],
    measurements: Sequence[FinalMeasurement] | None = None,
    **trainer: Any,
) -> dict[str, float]:
    """Measures a network as `fit` does at its end and `test` does.

    Args:
        network: Maps images `(N, C, H, W)` in [0, 1] to logits.
        data: A datamodule, where the images of the splits come from; or the images of `test`: a
            loader or dataset of pairs `(image, label)`, or tensors `(images, labels)`.
        measurements: What is measured, such as `FinalEvaluation(restarts=5)` and `AutoAttack()`;
            `None` for the paper's protocol without AutoAttack, on `test` alone if `data` has no
            other split.
        trainer: For Lightning's `Trainer`: `devices=2`, `accelerator="cpu"`, …

    Returns:
        Figures by name, `test/robust_loss`, `flatness/average/test`, ….

    Raises:
        ValueError: If `data` or `network` is something else, or they do not fit each other.

    Example:
        >>> from robust_flatness.datamodules import Digits
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> light = FinalEvaluation(num_examples=4, steps=1, restarts=1, num_perturbations=1)
        >>> settings = {"enable_progress_bar": False, "accelerator": "cpu"}
        >>> figures = evaluate(network, Digits(), [light], **settings)
        >>> figures["test/robust_error"] >= figures["test/error"]
        True
    """
    source = _source(data)
    if not isinstance(network, nn.Module):
        raise ValueError(f"Expected `network` to be a torch.nn.Module but got {_kind(network)}.")
    if measurements is None:
        whole = "datamodule" in source
        measurements = [FinalEvaluation() if whole else FinalEvaluation(splits=["test"])]
    chosen = list(measurements)
    module = network if isinstance(network, LightningModule) else _Network(network)
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    tester = Trainer(callbacks=list(chosen), **{**settings, **trainer})
    tester.test(module, verbose=False, **source)
    return {
        name: value
        for measurement in chosen
        for name, value in measurement.final_results["final"].items()
    }


def _source(data: Any) -> dict[str, Any]:
    """What `Trainer.test` takes for it."""
    if isinstance(data, LightningDataModule):
        return {"datamodule": data}
    if isinstance(data, DataLoader):
        return {"dataloaders": data}
    pair = isinstance(data, (list, tuple)) and [isinstance(part, Tensor) for part in data]
    if pair == [True, True] and len(data[0]) == len(data[1]):
        data = TensorDataset(*data)
    if isinstance(data, Dataset):
        return {"dataloaders": DataLoader(data, batch_size=128)}
    raise ValueError(
        "Expected `data` to be a datamodule, a DataLoader, a Dataset of pairs (image, label), or "
        f"as many images as labels, but got {_kind(data)}."
    )


def _kind(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    parts = value if isinstance(value, (list, tuple)) else []
    shapes = [f"{type(part).__name__}{list(getattr(part, 'shape', ''))}" for part in parts[:3]]
    return f"{type(value).__name__} of {', '.join(shapes)}" if shapes else type(value).__name__
