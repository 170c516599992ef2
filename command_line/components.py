"""What a command line is built of: callbacks by their options, classes by short name."""

import inspect
from functools import cache
from types import ModuleType

import lightning.pytorch.callbacks
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import robust_flatness.callbacks as callbacks
import robust_flatness.datamodules as datamodules
import robust_flatness.lightning_modules as lightning_modules
import robust_flatness.networks as networks

# Callbacks that a run has if one of their options is set, ahead of the others in their order.
OPTIONAL_CALLBACKS: dict[str, type[Callback]] = {
    "weight_clipping": callbacks.WeightClipping,
    "weight_averaging": callbacks.WeightAveraging,
    "worst_flatness": callbacks.WorstCaseFlatness,
    "curvature": callbacks.Curvature,
    "landscape": callbacks.Landscape,
    "catastrophic_overfitting": callbacks.CatastrophicOverfitting,
}
# Callbacks that every run has, each with its arguments under this name on the command line.
DEFAULT_CALLBACKS: dict[str, type[Callback]] = {
    "evaluation": callbacks.RobustEvaluation,
    "train_evaluation": callbacks.RobustEvaluation,
    "flatness": callbacks.Flatness,
    "train_flatness": callbacks.Flatness,
    "early_stopping": callbacks.RobustEarlyStopping,
    "trajectory": callbacks.Trajectory,
    "final": callbacks.FinalEvaluation,
    "autoattack": callbacks.AutoAttack,
    "best_checkpoint": callbacks.MeasuredCheckpoint,
    "last_checkpoint": callbacks.MeasuredCheckpoint,
}
# Light measures of the epochs, which `test` replaces by the full protocol.
ONLY_IN_FIT = ("evaluation", "train_evaluation", "flatness", "train_flatness")
# What `--without` takes.
LEAVABLE = (*DEFAULT_CALLBACKS, "wandb")
# What the data knows of the model.
LINKED = ("num_classes", "in_channels", "mean", "std")


@cache
def known_classes() -> dict[str, dict[str, str]]:
    """Class paths by short name, for the options that choose a class."""
    return {
        "model": _members(lightning_modules, LightningModule),
        "data": _members(datamodules, LightningDataModule),
        "model.network": _members(networks, networks.ResidualNetwork),
        "model.optimizer": _members(torch.optim, Optimizer)
        | _members(lightning_modules, Optimizer),
        "model.lr_scheduler": _members(torch.optim.lr_scheduler, LRScheduler)
        | _members(lightning_modules, LRScheduler),
        # Ours win if both have one, such as WeightAveraging.
        "trainer.callbacks": _members(lightning.pytorch.callbacks, Callback)
        | _members(callbacks, Callback),
    }


def _members(package: ModuleType, base: type) -> dict[str, str]:
    members = {name: getattr(package, name) for name in package.__all__}
    return {
        name: f"{package.__name__}.{name}"
        for name, member in members.items()
        if inspect.isclass(member) and issubclass(member, base) and not inspect.isabstract(member)
    }
