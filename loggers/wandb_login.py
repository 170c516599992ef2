"""Whether Weights & Biases can be reached, found out without asking anybody."""

import inspect
import os
from typing import Any


def offline_mode() -> bool:
    """Whether `WANDB_MODE` asks for anything but an online run; W&B reads it itself."""
    return os.environ.get("WANDB_MODE", "online") != "online"


def why_no_login() -> str:
    """Logs in with the API key that is there. Asks the user nothing.

    Returns:
        What stood in the way, in words that follow "Weights & Biases", or nothing.
    """
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        quietly: dict[str, Any] = {"prompt": False}
    elif wandb.api.api_key:  # older versions ask in the terminal where there is none
        quietly = {}
    else:
        return "found no API key"
    try:
        return "" if wandb.login(verify=True, **quietly) else "found no API key"
    except wandb.errors.Error as error:
        return f"could not check the API key ({error})"
