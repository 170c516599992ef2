"""Robust error by AutoAttack, the official package."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.final_measurement import FinalMeasurement
from robust_flatness.callbacks.kept_verdicts import KeptVerdicts
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.configs.types import Eps
from robust_flatness.functional.checks import check_choice, check_count
from robust_flatness.functional.noise import Norm
from robust_flatness.loggers.epoch_csv import EpochCSVLogger

VERSIONS = ("standard", "plus", "rand", "custom")
# The targeted DLR loss divides by the gap between the first and fourth largest logits.
FEWEST_CLASSES_OF_TARGETED_DLR = 4
ATTACKS_FOR_FEW_CLASSES = ["apgd-ce", "fab", "square"]
# In the run folder, until the run has ended.
FOLDER = "autoattack"


class AutoAttack(FinalMeasurement):
    """Logs AutoAttack's robust error (Croce & Hein, 2020) of last and early-stopped weights.

    Runs at the end of `fit` and in `test`. Logs `test/autoattack_error` and
    `test/autoattack_error_early_stopped`. The images are cut into fixed chunks by global index and
    each chunk is one call of the official `run_standard_evaluation`, so verdicts do not depend on
    the number of processes. Below four classes the targeted DLR loss is undefined: the attacks
    that apply are run, and a warning says so.

    Images that are misclassified when clean are not attacked, nor is one that an earlier attack
    broke. In a run folder, which an `EpochCSVLogger` names, verdicts of finished chunks are kept
    until the run has ended: a run that was killed in between takes them from there.

    Args:
        split: `test`, `val` or `train`.
        num_examples: The first so many images are attacked; 1000 in the paper.
        version: AutoAttack's version, `standard` in the paper; `custom` needs `attacks`.
        attacks: Names of AutoAttack's attacks, with `version: custom` only.
        chunk_size: Images of one call.
        dataset: Where the images come from; `None` finds the split.
        eps: Radius of the attack; `None` takes the datamodule's `eps`, else 8/255.
        norm: `linf` or `l2`.
        seed: Of AutoAttack.
        normalization: `(mean, std)` where module and dataset deal in normalised images.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> AutoAttack(num_examples=64).state_key
        'AutoAttack[test]'
    """

    def __init__(
        self,
        *,
        split: str = "test",
        num_examples: int = 1000,
        version: str = "standard",
        attacks: list[str] | None = None,
        chunk_size: int = 100,
        dataset: Dataset[Any] | None = None,
        eps: Eps | None = None,
        norm: Norm = "linf",
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        check_choice("version", version, VERSIONS)
        check_count("chunk_size", chunk_size, low=1)
        if (version == "custom") != (attacks is not None):
            raise ValueError(
                f"Expected `attacks` with `version` custom and only there but got {attacks} "
                f"with {version}."
            )
        self.split, self.version, self.attacks = split, version, attacks
        self._verdicts = _Verdicts(
            self._attack,
            {"version": version, "attacks": attacks},
            split=split,
            dataset=dataset,
            num_examples=num_examples,
            eps=eps,
            norm=norm,
            batch_size=chunk_size,
            seed=seed,
            normalization=normalization,
        )

    @property
    def state_key(self) -> str:
        """Tells two callbacks of this class apart in checkpoints, by their split."""
        return f"AutoAttack[{self.split}]"

    @property
    def measurements(self) -> Sequence[Measurement]:
        """The one measurement of verdicts."""
        return [self._verdicts]

    def logged_name(self, name: str, weights: str) -> str:
        """`test/autoattack_error` and `test/autoattack_error_early_stopped`."""
        return name if weights == "final" else f"{name}_early_stopped"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes what was kept, after all callbacks have ended: results have been written."""
        if trainer.is_global_zero:
            self._verdicts.kept.clear()

    def _attack(self, network: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        """The official verdict on one chunk: whether each image is robust, bool `(N,)`."""
        # Imported late: it takes a second, and only this callback needs it.
        from pyautoattack import AutoAttack as OfficialAutoAttack

        logging.getLogger("auto-attack").setLevel(logging.WARNING)
        images = images.clone()
        with torch.no_grad():
            logits = network(images)
        if eps == 0:
            # Nothing to search: some of the attacks divide by the radius.
            return logits.argmax(1) == labels
        classes = logits.shape[1]
        version, attacks = self._attacks_for(classes)
        official = OfficialAutoAttack(
            network,
            eps=eps,
            norm={"linf": "Linf", "l2": "L2"}[self._verdicts.norm],
            version=version,
            attacks=attacks,
            seed=self._verdicts.seed,
            device=images.device,
        )
        targets = min(9, classes - 1)
        official.apgd_targeted.n_target_classes = official.fab.n_target_classes = targets
        with _frozen(network):
            _, predicted = official.run_standard_evaluation(images, labels, batch_size=len(images))
        return predicted == labels

    def _attacks_for(self, classes: int) -> tuple[str, list[str] | None]:
        if classes >= FEWEST_CLASSES_OF_TARGETED_DLR or self.version != "standard":
            return self.version, self.attacks
        rank_zero_warn(
            f"AutoAttack standard needs at least {FEWEST_CLASSES_OF_TARGETED_DLR} classes for its "
            f"targeted DLR loss and there are {classes}: running "
            f"{', '.join(ATTACKS_FOR_FEW_CLASSES)} instead."
        )
        return "custom", ATTACKS_FOR_FEW_CLASSES


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Keeps FAB, which calls `backward`, from filling the gradients of the parameters."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class _Verdicts(Measurement):
    """Shares AutoAttack's images over ranks and counts its verdicts.

    Args:
        attack: Gives the verdicts of a chunk.
        attacks: What its verdicts depend on, beyond the arguments of this class.
        kwargs: Arguments of `Measurement`.
    """

    def __init__(
        self,
        attack: Callable[[nn.Module, Tensor, Tensor, float], Tensor],
        attacks: dict[str, object],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._attack, self._attacks, self.kept = attack, attacks, KeptVerdicts()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run folder, which rank 0 knows."""
        super().setup(trainer, pl_module, stage)
        tables = [logger for logger in trainer.loggers if isinstance(logger, EpochCSVLogger)]
        folder = trainer.strategy.broadcast(tables[0].log_dir if tables else None)
        self.kept = KeptVerdicts(None if folder is None else Path(folder) / FOLDER)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Share of images that are misclassified, clean or attacked."""
        eps = self.radius(trainer)
        with self.network(trainer, pl_module) as network:

            def verdicts(
                images: Tensor, labels: Tensor, indices: list[int], on_attack: Callable[[], None]
            ) -> Tensor:
                robust = torch.zeros(1, len(labels))
                for begin in range(0, len(labels), self.batch_size):
                    part = slice(begin, begin + self.batch_size)
                    chunk = (network, images[part], labels[part])
                    robust[0, part] = self._of_chunk(*chunk, eps, indices[begin]).float()
                    on_attack()
                return robust

            robust = self.sharded(
                trainer,
                pl_module,
                verdicts,
                what=f"AutoAttack {self.split}, chunks of {self.batch_size}",
                attacks_per_batch=1,
            )
        self.arrays = {f"{self.split}/autoattack_correct": robust[0].bool()}
        error = 1 - robust.mean().item() if robust.numel() else math.nan
        return {f"{self.split}/autoattack_error": error}

    def _of_chunk(
        self, network: nn.Module, images: Tensor, labels: Tensor, eps: float, begin: int
    ) -> Tensor:
        settings = {
            **self._attacks,
            "eps": eps,
            "norm": self.norm,
            "seed": self.seed,
            "normalization": self.normalization,
            "first image": begin,
            # Random numbers are others on another device, and may be in another version.
            "device": images.device.type,
            "versions": [installed_version(name) for name in ("pyautoattack", "torch")],
        }
        return self.kept.verdicts(
            lambda: self._attack(network, images, labels, eps), network, images, labels, settings
        )
