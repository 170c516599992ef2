"""What is refused of a configuration that every type fits, before anything is built."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from robust_flatness.command_line.components import DEFAULT_CALLBACKS, LEAVABLE
from robust_flatness.command_line.compose import EXTERNAL, read_run_config, run_folder_of
from robust_flatness.command_line.options import Option

# What the data knows of the model.
LINKED = ("num_classes", "in_channels", "mean", "std")
_LARGEST_SEED = 2**32 - 1
_LARGEST_INTEGER = 2**63 - 1


def is_external(config: Namespace) -> bool:
    """Whether a configuration is of a network that was trained elsewhere."""
    return str(config.model.class_path).rsplit(".", 1)[-1] == EXTERNAL


def check_settings(config: Namespace, subcommand: str) -> None:
    """Refuses what would fail late, or train nothing.

    Args:
        config: Of the subcommand, after the parser.
        subcommand: `fit` or `test`.

    Raises:
        ValueError: If a setting is out of range.
    """
    if subcommand == "fit" and is_external(config):
        raise ValueError("Expected `test` for External, which only measures, but got fit.")
    for key in ("trainer", *DEFAULT_CALLBACKS):
        if not isinstance(config.get(key), Namespace):
            raise ValueError(f"Expected `{key}` to be a mapping but got {config.get(key)}.")
    for key, value in config.items():
        name = key.replace(".init_args", "")
        if isinstance(value, float) and not math.isfinite(value):
            wanted = "a number" if math.isnan(value) else "finite"
            raise ValueError(f"Expected `--{name}` to be {wanted} but got {value}.")
        if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
            raise ValueError(f"Expected `--{name}` to be below 2**63 but got {value}.")
    _check_trainer(config.trainer)
    _check_names(config)
    check_seed("--seed_everything", config.seed_everything)
    unknown = left_out(config) - set(LEAVABLE)
    if unknown:
        raise ValueError(
            f"Expected `--without` to name some of {', '.join(LEAVABLE)} but got "
            f"{', '.join(sorted(unknown))}."
        )


def check_seed(name: str, seed: Any) -> None:
    """Raises if NumPy would not take a seed.

    Args:
        name: The option, for the message.
        seed: A number, or True or False, which Lightning gives a meaning.

    Raises:
        ValueError: If it is negative or needs more than 32 bits.
    """
    if not isinstance(seed, bool) and seed is not None and not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"Expected `{name}` to be in [0, {_LARGEST_SEED}] but got {seed}.")


def left_out(config: Namespace) -> set[str]:
    """What a run does without."""
    without = config.without
    return {without} if isinstance(without, str) else set(without)


def check_resumed(config: Namespace) -> None:
    """Refuses what a run that goes on in its folder cannot change.

    Args:
        config: Of `fit` or `test`, after the parser.

    Raises:
        ValueError: If name, folder or seed are not those of the checkpoint's run.
    """
    folder = run_folder_of(config.ckpt_path)
    if folder is None:
        return
    run = read_run_config(folder)
    for key in ("name", "folder", "seed_everything"):
        asked, had = config.get(key), run.get(key)
        same = asked == had
        if key == "folder" and asked is not None:
            same = same or Path(asked).expanduser().resolve() == folder
        if not same:
            raise ValueError(
                f"Expected `--{key}` to be that of the run that goes on, {had}, but got {asked}."
            )


def check_linked(
    config: Namespace,
    settings: Mapping[str, Any],
    typed: Sequence[Option],
    data: LightningDataModule,
) -> None:
    """Refuses arguments of the model that the data would silently replace.

    Args:
        config: Of `fit` or `test`, before anything is built.
        settings: Of files and checkpoint.
        typed: The options as they were typed.
        data: The data.

    Raises:
        ValueError: If the data knows another value. Mean and deviation in files are those of the
            data that a network was trained on, which its checkpoint brings along.
    """
    in_files = settings["model"].get("init_args") or {}
    names = {option.name.replace(".init_args", "") for option in typed}
    for name in LINKED:
        chosen = name in in_files and name in ("num_classes", "in_channels")
        asked = (config.model.get("init_args") or {}).get(name)
        known = getattr(data, name, None)
        if None in (asked, known) or not (chosen or f"model.{name}" in names):
            continue
        both = [tuple(v) if isinstance(v, Iterable) else v for v in (asked, known)]
        if both[0] != both[1]:
            raise ValueError(
                f"Expected `--model.{name}` to be {known}, as in {type(data).__name__}, but got "
                f"{asked}."
            )


def _check_trainer(trainer: Namespace) -> None:
    lowest: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "max_epochs": (">= 1, or -1 for no end,", lambda value: value >= 1 or value == -1),
        "max_steps": (">= 1, or -1 for no end,", lambda value: value >= 1 or value == -1),
        "limit_train_batches": ("> 0", lambda value: value > 0),
        "accumulate_grad_batches": (">= 1", lambda value: value >= 1),
        "check_val_every_n_epoch": (">= 1", lambda value: value >= 1),
        "val_check_interval": (
            "> 0",
            lambda value: not isinstance(value, (int, float)) or value > 0,
        ),
        "log_every_n_steps": (">= 0", lambda value: value >= 0),
        "gradient_clip_val": (">= 0", lambda value: value >= 0),
        "num_sanity_val_steps": (">= -1", lambda value: value >= -1),
        "min_epochs": (">= 0", lambda value: value >= 0),
        "min_steps": (">= 0", lambda value: value >= 0),
    }
    for name, (wanted, is_right) in lowest.items():
        value = trainer.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"Expected `--trainer.{name}` to be {wanted} but got {value}.")
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        raise ValueError("Expected `--trainer.max_epochs` to be a number but got null.")
    if trainer.barebones:
        raise ValueError("Expected `--trainer.barebones` to be false, as runs log, but got true.")


def _check_names(config: Namespace) -> None:
    for key in ("name", "folder", "project", "group"):
        value = config.get(key)
        if value is not None and (not value.strip() or not value.isprintable()):
            raise ValueError(f"Expected `--{key}` to be a printable name but got {value!r}.")
    best, last = config.best_checkpoint.filename, config.last_checkpoint.filename
    names = {
        "name": ("a folder's name", config.name),
        "best_checkpoint.filename": ("a file's name", best),
        "last_checkpoint.filename": ("a file's name", last),
    }
    for key, (wanted, value) in names.items():
        if value is not None and not (value.isprintable() and Path(value).name == value):
            raise ValueError(f"Expected `--{key}` to be {wanted} but got {value!r}.")
    if best is not None and best == last:
        raise ValueError(
            "Expected `--best_checkpoint.filename` and `--last_checkpoint.filename` to differ but "
            f"got {best!r} for both."
        )
    if re.search(r"[/\\#?%:]", config.project) or len(config.project) > 128:
        raise ValueError(
            "Expected `--project` to be up to 128 characters without any of /\\#?%: but got "
            f"{config.project!r}."
        )
