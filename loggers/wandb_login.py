"""What Weights & Biases needs before a run starts, checked without asking the user."""

import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def offline_mode() -> bool:
    """Whether `WANDB_MODE`, which W&B reads itself, asks for anything but an online run."""
    return os.environ.get("WANDB_MODE", "online") != "online"


def why_no_login() -> str:
    """Logs in with this machine's API key; returns what follows "Weights & Biases" if it fails."""
    import wandb

    kwargs: dict[str, Any] = {}
    if "prompt" in inspect.signature(wandb.login).parameters:
        kwargs = {"prompt": False}
    elif not wandb.api.api_key:  # older versions would ask in the terminal
        return "found no API key"
    try:
        return "" if wandb.login(verify=True, **kwargs) else "found no API key"
    except wandb.errors.Error as error:
        return f"could not check the API key ({error})"


def check_settings(**settings: Any) -> None:
    """Checks fields of `wandb.Settings` and environment variables before W&B opens a run.

    Raises:
        ValueError: If W&B refuses a setting, or if a folder cannot be written to.
    """
    import wandb

    for name, value in settings.items():
        with _one_sentence(name, value):
            wandb.Settings(**{name: value})
    for name, value in os.environ.items():
        # Versions before 0.20 read the environment elsewhere.
        if name.startswith("WANDB_") and hasattr(wandb.Settings, "update_from_env_vars"):
            with _one_sentence(name, value):
                wandb.Settings().update_from_env_vars({name: value})
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if not os.environ.get(name):
            continue
        folder = Path(os.environ[name]).expanduser()
        # W&B creates the folder if it can write to the nearest one that exists.
        existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ValueError(
                f"Expected `{name}` to be a folder that can be written to but got {folder} "
                f"({error.strerror})."
            ) from error


@contextmanager
def _one_sentence(name: str, value: object) -> Iterator[None]:
    import wandb

    try:
        yield
    except (wandb.errors.Error, ValueError) as error:
        # An error of pydantic has its sentence among many lines.
        reason = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
        raise ValueError(
            f"Expected `{name}` to be a setting that W&B accepts but got {value!r} ({reason})."
        ) from error
