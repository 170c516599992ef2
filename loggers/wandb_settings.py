"""Settings of Weights & Biases, its environment variables included, checked before a run."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_settings(**settings: Any) -> None:
    """Refuses now what W&B would refuse when the run is opened, or when it writes its first table.

    Args:
        settings: Of `wandb.Settings`; those of the environment are checked as well.

    Raises:
        ValueError: If W&B does not take a setting, or a folder cannot be written to.
    """
    import wandb

    for name, value in settings.items():
        with _refused(name, value):
            wandb.Settings(**{name: value})
    for name, value in os.environ.items():
        # Versions before 0.20 read the environment elsewhere.
        if name.startswith("WANDB_") and hasattr(wandb.Settings, "update_from_env_vars"):
            with _refused(name, value):
                wandb.Settings().update_from_env_vars({name: value})
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if folder := os.environ.get(name):
            _check_folder(name, Path(folder).expanduser())


@contextmanager
def _refused(name: str, value: object) -> Iterator[None]:
    import wandb

    try:
        yield
    except (wandb.errors.Error, ValueError) as error:
        # An error of pydantic has its sentence among many lines.
        said = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
        raise ValueError(
            f"Expected `{name}` to be one that W&B takes but got {value!r} ({said})."
        ) from error


def _check_folder(name: str, folder: Path) -> None:
    # What is not there yet is made by W&B: it must be possible in the nearest folder that is there.
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"Expected `{name}` to be a folder that can be written to but got {folder} "
            f"({error.strerror})."
        ) from error


def run_id(path: Path) -> str:
    """The id of a W&B run: that of a sweep's agent, else that of its file, else a new one.

    Args:
        path: The file.
    """
    if os.environ.get("WANDB_SWEEP_ID") and (given := os.environ.get("WANDB_RUN_ID")):
        # An agent of a sweep knows its run by this id, and W&B takes no other under one.
        return given
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    # From the system's randomness: the generators that training is seeded with stay where they are.
    return secrets.token_hex(4)
