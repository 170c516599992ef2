"""Robust error by AutoAttack, the official package."""

import logging
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from robust_flatness.callbacks.attacked_network import AttackedNetwork, frozen
from robust_flatness.callbacks.examples import Normalization
from robust_flatness.callbacks.final_measurement import FinalMeasurement
from robust_flatness.callbacks.kept_verdicts import KeptVerdicts
from robust_flatness.callbacks.measurement import Measurement
from robust_flatness.functional.checks import Eps, check_choice, check_count
from robust_flatness.functional.evaluation import logits_function, predicted_classes
from robust_flatness.functional.noise import Norm
from robust_flatness.loggers.epoch_csv import EpochCSVLogger

# Attacks of the official package, and the fewest classes that each works with: the DLR loss divides
# by the gap between the first and third largest logits, the targeted one by that to the fourth.
FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "fab": 2, "square": 2, "apgd-t": 4, "fab-t": 2}
VERSIONS = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    "rand": ["apgd-ce", "apgd-dlr"],
}
ATTACKS_FOR_FEW_CLASSES = ["apgd-ce", "fab", "square"]
# Square cuts images into five parts with `norm` l2.
FEWEST_PIXELS_OF_SQUARE_L2 = 5
# In the run folder, until the run has ended.
FOLDER = "autoattack"


class AutoAttack(FinalMeasurement):
    """Logs AutoAttack's robust error (Croce & Hein, 2020) of last and early-stopped weights.

    Runs at the end of `fit` and in `test`. Logs `test/autoattack_error` and
    `test/autoattack_error_early_stopped`. The images are cut into fixed chunks by global index and
    each chunk is one call of the official `run_standard_evaluation`, so verdicts do not depend on
    the number of processes. Below four classes the targeted DLR loss is undefined: `standard` runs
    the attacks that apply, and a warning says so; other versions and attacks are refused before
    training. APGD-T and FAB-T take at most one target less than there are classes.

    Images that are misclassified when clean are not attacked, nor is one that an earlier attack
    broke. An example whose logits are not finite, clean or attacked, counts as misclassified.
    Attacks are in float32; the network gets images in the type of its weights.

    In a run folder, which an `EpochCSVLogger` names, verdicts of finished chunks are kept until the
    run has ended: a run that was killed in between takes them from there.

    Args:
        split: `test`, `val` or `train`.
        num_examples: The first so many images are attacked; 1000 in the paper.
        version: `standard` (the paper), `plus`, `rand`, or `custom`, which runs `attacks`.
        attacks: Some of `apgd-ce`, `apgd-dlr`, `fab`, `square`, `apgd-t` and `fab-t`, which makes
            the version `custom`.
        chunk_size: Images of one call.
        dataset: Where the images come from; `None` finds the split.
        eps: Radius of the attack; `None` takes the datamodule's `eps`, else 8/255.
        norm: `linf` or `l2`.
        seed: Of AutoAttack.
        normalization: `(mean, std)` where module and dataset deal in normalised images.

    Raises:
        ValueError: If an argument is out of range; before training, if an attack does not work
            with the number of classes or the size of the images.

    Example:
        >>> AutoAttack(num_examples=64).state_key
        'AutoAttack[test]'
        >>> AutoAttack(attacks=["apgd-ce", "square"]).version
        'custom'
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
        if version == "standard" and attacks is not None:
            version = "custom"
        check_choice("version", version, (*VERSIONS, "custom"))
        check_count("chunk_size", chunk_size, low=1)
        _check_attacks(version, attacks)
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses attacks that do not work here, before anything is trained."""
        super().on_train_start(trainer, pl_module)
        images = self._verdicts.examples(trainer, pl_module).images[:1].to(pl_module.device)
        with self._verdicts.network(trainer, pl_module) as network, torch.no_grad():
            classes = logits_function(network, images)(images).shape[1]
        self._attacks_for(classes, images)

    def _attack(self, network: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        """The official verdict on one chunk: whether each image is robust, bool `(N,)`."""
        # A tensor that was made in inference mode takes no part in a graph, its clone does.
        images = images.clone()
        with torch.no_grad():
            logits = logits_function(network, images)(images)
        robust = predicted_classes(logits) == labels
        version, attacks = self._attacks_for(logits.shape[1], images)
        # With a radius of 0 there is nothing to search, and some attacks divide by it.
        if eps == 0 or not robust.any():
            return robust
        settings = {"eps": eps, "version": version, "attacks": attacks}
        chunk = (images[robust].float(), labels[robust], logits.shape[1])
        with frozen(network):
            try:
                found = self._official(AttackedNetwork(network, images), *chunk, settings)
            except FloatingPointError:
                attacked = AttackedNetwork(network, images, extra_class=True)
                found = self._official(attacked, *chunk, settings)
        robust[robust.clone()] = found
        return robust

    def _official(
        self,
        network: AttackedNetwork,
        images: Tensor,
        labels: Tensor,
        classes: int,
        settings: dict[str, Any],
    ) -> Tensor:
        # Imported late: it takes a second, and only this callback needs it.
        from pyautoattack import AutoAttack as OfficialAutoAttack

        logging.getLogger("auto-attack").setLevel(logging.WARNING)
        official = OfficialAutoAttack(
            network,
            norm={"linf": "Linf", "l2": "L2"}[self._verdicts.norm],
            seed=self._verdicts.seed,
            device=images.device,
            **settings,
        )
        targets = min(9, classes - 1)
        official.apgd_targeted.n_target_classes = official.fab.n_target_classes = targets
        _, predicted = official.run_standard_evaluation(images, labels, batch_size=len(images))
        return predicted == labels

    def _attacks_for(self, classes: int, images: Tensor) -> tuple[str, list[str] | None]:
        """Version and attacks for so many classes; `attacks` is `None` if the version says them."""
        attacks = VERSIONS.get(self.version, self.attacks or [])
        version, custom = self.version, self.attacks
        if version == "standard" and 2 <= classes < FEWEST_CLASSES["apgd-t"]:
            rank_zero_warn(
                f"AutoAttack standard needs at least {FEWEST_CLASSES['apgd-t']} classes for its "
                f"targeted DLR loss and there are {classes}: running "
                f"{', '.join(ATTACKS_FOR_FEW_CLASSES)} instead."
            )
            version, attacks, custom = "custom", ATTACKS_FOR_FEW_CLASSES, ATTACKS_FOR_FEW_CLASSES
        for attack in attacks:
            if classes < FEWEST_CLASSES[attack]:
                raise ValueError(
                    f"Expected at least {FEWEST_CLASSES[attack]} classes for AutoAttack's {attack} "
                    f"(`version` {version}) but got {classes}; `attacks` takes those that work."
                )
        small = min(images.shape[2:]) < FEWEST_PIXELS_OF_SQUARE_L2
        if self._verdicts.norm == "l2" and "square" in attacks and small:
            raise ValueError(
                f"Expected images of at least {FEWEST_PIXELS_OF_SQUARE_L2} pixels a side for "
                f"AutoAttack's square with `norm` l2 but got {tuple(images.shape[2:])}; `attacks` "
                "takes those that work."
            )
        return version, custom


def _check_attacks(version: str, attacks: Any) -> None:
    if (version == "custom") != (attacks is not None):
        raise ValueError(
            f"Expected `attacks` with `version` custom, and with no other, but got {attacks} with "
            f"{version}."
        )
    if attacks is None:
        return
    known = isinstance(attacks, (list, tuple)) and all(name in FEWEST_CLASSES for name in attacks)
    if not attacks or not known:
        names = ", ".join(FEWEST_CLASSES)
        raise ValueError(f"Expected `attacks` to be a list of some of {names} but got {attacks}.")


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
