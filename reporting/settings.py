"""Settings of a run by their names on the command line, and which of them change its training.

Example:
    >>> is_training("model.lam"), is_training("autoattack.num_examples")
    (True, False)
"""

from collections.abc import Mapping
from typing import Any

from robust_flatness.reporting.runs import Run, is_number

# Settings that do not change what is trained or measured, by their names on the command line.
_PLACE = {"seed_everything", "folder", "project", "group", "name", "ckpt_path", "weights_only"}
_PLACE |= {"config", "trainer.default_root_dir", "best_checkpoint.dirpath", "last_checkpoint"}
_HARDWARE = {"trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"}
_HARDWARE |= {"data.num_workers", "data.in_memory"}
_LOOK = {"without", "trainer.logger", "trainer.callbacks", "trainer.profiler"}
_LOOK |= {"trainer.enable_progress_bar", "trainer.enable_model_summary"}
_LOOK |= {"trainer.log_every_n_steps", "trajectory.figures"}
# Older runs lack it, and are no other models for that.
_LATER = {"model.fast": True}
_IGNORED = _PLACE | _HARDWARE | _LOOK
# Sections that only watch, and images that are only measured on.
_MEASURES = {"evaluation", "train_evaluation", "flatness", "train_flatness", "worst_flatness"}
_MEASURES |= {"early_stopping", "best_checkpoint", "trajectory", "final", "autoattack"}
_MEASURES |= {"curvature", "landscape", "data.num_test", "data.num_train_eval"}
# It ends training, and does not only watch it.
_TRAINING = {"early_stopping.patience"}
# What is trained tells models apart better than how they were watched.
_SECTIONS = ("model", "data", "weight_averaging", "weight_clipping", "trainer")


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line, without those of place, hardware and look.

    Args:
        settings: Nested, as in `config.yaml`.
        prefix: Name of the mapping that holds them.

    Example:
        >>> flat_settings({"model": {"class_path": "pkg.AT", "init_args": {"eps": 0.2}}})
        {'model': 'AT', 'model.eps': 0.2}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if f"{prefix}{key}" in _IGNORED:
            continue
        if key == "class_path":
            flat[prefix.rstrip(".")] = str(value).rsplit(".", 1)[-1]
        elif isinstance(value, Mapping):
            flat |= flat_settings(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def set_values(run: Run) -> dict[str, Any]:
    """Settings that have a value: an option that an older version lacks is one that is not set."""
    flat = {"data": run.data} | flat_settings(run.settings)
    return {n: value for n, value in flat.items() if value not in (None, _LATER.get(n))}


def is_training(name: str) -> bool:
    """Whether a setting changes what is trained, and not only what is measured."""
    measures = name in _MEASURES or name.split(".", 1)[0] in _MEASURES
    return name in _TRAINING or not measures


def importance(name: str) -> tuple[bool, int, str]:
    """A key that sorts names of settings: those that tell most about a model come first."""
    section = name.split(".", 1)[0]
    place = _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS)
    return not is_training(name), place, name


def short_name(name: str) -> str:
    """Measures have settings of the same names, so that only what is trained is shown short."""
    known = name.split(".", 1)[0] in _SECTIONS and is_training(name)
    return name.rsplit(".", 1)[-1] if known else name


def exact_text(value: Any) -> str:
    """A value as text that is the same for 6 and 6.0."""
    return f"{value:.12g}" if is_number(value) else str(value)


def short_text(value: Any) -> str:
    """A value as labels show it."""
    return f"{value:g}" if is_number(value) else str(value)
