"""Variables of the environment that Lightning reads as numbers, some of them on import."""

import os
import sys

_NUMBERS = (
    "RANK",
    "LOCAL_RANK",
    "GLOBAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "JSM_NAMESPACE_RANK",
    "PL_GLOBAL_SEED",
)
_WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


def check_environment() -> None:
    """Ends with status 2 if a variable is not what Lightning or Weights & Biases can read.

    Example:
        >>> os.environ["LOCAL_RANK"] = "abc"
        >>> check_environment()
        Traceback (most recent call last):
        ...
        SystemExit: 2
        >>> del os.environ["LOCAL_RANK"]
        >>> check_environment()
    """
    for name in _NUMBERS:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            _refuse(f"Expected the environment's {name} to be an integer >= 0 but got {value!r}.")
    debug = os.environ.get("JSONARGPARSE_DEBUG", "").lower()
    if debug not in ("", "true", "false"):
        _refuse(
            f"Expected the environment's JSONARGPARSE_DEBUG to be true or false but got {debug!r}."
        )
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in _WANDB_MODES:
        _refuse(
            f"Expected the environment's WANDB_MODE to be one of {', '.join(_WANDB_MODES)} but got "
            f"{mode!r}."
        )


def _refuse(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    raise SystemExit(2)
