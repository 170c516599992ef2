"""What is refused of arguments that every type fits, and of checkpoints, before training."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from robust_flatness.command_line.components import DEFAULT_CALLBACKS, LEAVABLE, LINKED
from robust_flatness.command_line.files import run_folder_of, settings_of_run
from robust_flatness.command_line.parser import Option
from robust_flatness.command_line.presets import EXTERNAL
from robust_flatness.lightning_modules import AT
from robust_flatness.lightning_modules.checkpoints import CLASS_KEY, read_checkpoint

# Lowest values of the trainer's arguments that Lightning takes without a word, or refuses late.
_LOWEST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "gradient_clip_val": 0,
    "num_sanity_val_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
}
# Without these Lightning trains on from the first epoch, or with a fresh optimizer.
_TO_GO_ON = ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
# What modules of this package log themselves.
_OF_MODULES = ("train/", "awp/", "entropy_sgd/", "label_noise/", "unlabeled/")


def _refuse(option: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"Expected `--{option}` to be {expected} but got {got}.")


def _refuse_checkpoint(path: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"Expected `--ckpt_path` to {expected} but {path} {got}.")


def left_out(config: Namespace) -> set[str]:
    """What a run does without."""
    return {config.without} if isinstance(config.without, str) else set(config.without)


def check_settings(config: Namespace, subcommand: str) -> None:
    """Refuses settings of `fit` or `test` that would fail late, or train nothing."""
    for key in ("model", "data", "trainer", *DEFAULT_CALLBACKS):
        if not isinstance(config.get(key), Namespace):
            _refuse(key, "a mapping", config.get(key))
    if subcommand == "fit" and config.model.class_path.endswith(f".{EXTERNAL}"):
        raise ValueError("Expected `test` for External, which only measures, but got fit.")
    for key, value in config.items():
        name = key.replace(".init_args", "")
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(name, "a number" if math.isnan(value) else "finite", value)
        if isinstance(value, int) and abs(value) >= 2**63:
            _refuse(name, "below 2**63", value)
    _check_trainer(config.trainer)
    _check_names(config)
    seed = config.seed_everything
    # NumPy takes 32 bits; to Lightning, True and False mean something else.
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        _refuse("seed_everything", f"in [0, {2**32 - 1}]", seed)
    if unknown := left_out(config) - set(LEAVABLE):
        names = ", ".join(sorted(unknown))
        raise ValueError(
            f"Expected `--without` to name some of {', '.join(LEAVABLE)} but got {names}."
        )


def _check_trainer(trainer: Namespace) -> None:
    for name, lowest in _LOWEST.items():
        value = trainer[name]
        if isinstance(value, (int, float)) and value < lowest:
            _refuse(f"trainer.{name}", f">= {lowest}", value)
    for name in ("max_epochs", "max_steps"):
        if trainer[name] is not None and trainer[name] < 1 and trainer[name] != -1:
            _refuse(f"trainer.{name}", ">= 1, or -1 for no end,", trainer[name])
    for name in ("limit_train_batches", "val_check_interval"):
        if isinstance(trainer[name], (int, float)) and trainer[name] <= 0:
            _refuse(f"trainer.{name}", "> 0", trainer[name])
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        _refuse("trainer.max_epochs", "a number", "null")
    if trainer.barebones:
        _refuse("trainer.barebones", "false, as runs log,", "true")


def _check_names(config: Namespace) -> None:
    files = ("best_checkpoint.filename", "last_checkpoint.filename")
    for key in ("name", "folder", "project", "group", *files):
        value = config[key]
        if value is None:
            continue
        if key not in files and (not value.strip() or not value.isprintable()):
            _refuse(key, "a printable name", repr(value))
        is_name = value.isprintable() and Path(value).name == value
        if key in ("name", *files) and not is_name:
            _refuse(key, "a folder's name" if key == "name" else "a file's name", repr(value))
    best, last = (config[key] for key in files)
    if best is not None and best == last:
        options = " and ".join(f"`--{key}`" for key in files)
        raise ValueError(f"Expected {options} to differ but got {best!r} for both.")
    if re.search(r"[/\\#?%:]", config.project) or len(config.project) > 128:
        _refuse("project", "up to 128 characters without any of /\\#?%:", repr(config.project))


def check_linked(
    config: Namespace, written: Sequence[Option], typed: Sequence[Option], data: LightningDataModule
) -> None:
    """Refuses arguments of the model, in files or typed, that the data would silently replace.

    A `mean` or `std` in a file is that of the data that a network was trained on, which its
    checkpoint brings along: only those that are typed are refused.
    """
    names = {option.name for option in typed}
    names |= {o.name for o in written if o.name in ("model.num_classes", "model.in_channels")}
    for name in LINKED:
        asked = (config.model.get("init_args") or {}).get(name)
        known = getattr(data, name, None)
        if None not in (asked, known) and f"model.{name}" in names:
            both = [list(v) if isinstance(v, Iterable) else v for v in (asked, known)]
            if both[0] != both[1]:
                _refuse(f"model.{name}", f"{known}, as in {type(data).__name__},", asked)


def check_start(config: Namespace, subcommand: str) -> dict[str, tuple[int, ...]] | None:
    """Refuses a checkpoint that `fit` or `test` cannot start from.

    Returns:
        The shapes of its weights by name; None if there is no checkpoint.

    Raises:
        ValueError: If there is no such file, it is broken, or another class wrote it; if name,
            folder or seed are not those of its run.
    """
    path = config.get("ckpt_path")
    if not path and subcommand == "test" and not config.model.class_path.endswith(EXTERNAL):
        raise ValueError("Expected `--ckpt_path` to name a checkpoint to test but got none.")
    if path is None:
        return None
    # Lightning would go on with an untrained network if it finds no `last` or `best`.
    if not Path(path).is_file():
        _refuse("ckpt_path", "a checkpoint file", path or "nothing")
    content = read_checkpoint(path, "--ckpt_path")
    wrote, asked = content.get(CLASS_KEY), config.model.class_path.rsplit(".", 1)[-1]
    if wrote not in (None, asked):
        _refuse_checkpoint(path, f"be a checkpoint of {asked}", f"is one of {wrote}")
    if folder := run_folder_of(path):
        run = settings_of_run(folder)
        for key in ("name", "folder", "seed_everything"):
            value, had = config.get(key), run.get(key)
            same = key == "folder" and value and Path(value).expanduser().resolve() == folder
            if value != had and not same:
                _refuse(key, f"that of the run that goes on, {had},", value)
    resume = subcommand == "fit"
    for key in ("state_dict", "pytorch-lightning_version", *(_TO_GO_ON if resume else ())):
        if key not in content:
            _refuse_checkpoint(path, "be a checkpoint of Lightning", f"holds no `{key}`")
    if resume:
        for key in ("epoch", "global_step"):
            if not isinstance(content[key], int) or content[key] < 0:
                got = f"holds {content[key]!r}"
                _refuse_checkpoint(path, f"hold a number as `{key}`", got)
        done, epochs = content["epoch"] + 1, config.trainer.max_epochs
        if epochs not in (None, -1) and done > epochs:
            _refuse("trainer.max_epochs", f">= {done}, the epochs behind {path},", epochs)
    weights = content["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        _refuse_checkpoint(path, "hold tensors as weights", "holds something else")
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_weights(model: LightningModule, saved: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Refuses a checkpoint whose weights, by names and shapes, are not those of the model.

    A class that changes checkpoints as they load is trusted.
    """
    loads = type(model).on_load_checkpoint
    changes = loads not in (LightningModule.on_load_checkpoint, AT.on_load_checkpoint)
    if changes or not model.strict_loading:
        return
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = f"hold the weights of this {type(model).__name__}"
    for name in sorted(own.keys() ^ saved.keys()):
        _refuse_checkpoint(path, expected, f"{'lacks' if name in own else 'holds also'} {name}")
    for name, shape in own.items():
        if shape != saved[name]:
            got = f"holds {name} of shape {saved[name]}, and the model has {shape}"
            _refuse_checkpoint(path, expected, got)


def check_monitors(trainer: Trainer, module: LightningModule) -> None:
    """Refuses callbacks that watch a metric which nothing logs.

    What a module or a callback of the user's own logs is not known.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = {name for callback in callbacks for name in getattr(callback, "metric_names", ())}
    packages = ("robust_flatness.", "lightning.pytorch.")
    if not all(type(part).__module__.startswith(packages) for part in (module, *callbacks)):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in known and not monitor.startswith(_OF_MODULES):
            raise ValueError(
                f"Expected `monitor` of {type(callback).__name__} to be one of the metrics "
                f"train/loss, {', '.join(sorted(known))} but got {monitor}."
            )
