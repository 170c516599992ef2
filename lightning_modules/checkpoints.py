"""Checkpoints back as the class that wrote them."""

import importlib
from pathlib import Path
from typing import Any

import torch

from robust_flatness.functional.checks import check_archive
from robust_flatness.lightning_modules.at import AT, CLASS_KEY


def read_checkpoint(path: str | Path, argument: str) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: A file.
        argument: What names the file, for the message.

    Raises:
        ValueError: If the file is no checkpoint, or a checksum in it differs.
    """
    check_archive(argument, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"Expected `{argument}` to be a checkpoint but {path} is something else or broken: "
            f"{type(error).__name__}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected `{argument}` to be a checkpoint but {path} holds a {type(content).__name__}."
        )
    return content


def class_written(path: str | Path, argument: str) -> Any:
    """The name of the class that wrote a checkpoint.

    Args:
        path: A file.
        argument: What names the file, for the message.

    Returns:
        The name, or `None` in a checkpoint of something else.

    Raises:
        ValueError: If the file is no checkpoint, or a checksum in it differs.
    """
    return read_checkpoint(path, argument).get(CLASS_KEY)


def load_checkpoint(path: str | Path, **kwargs: Any) -> AT:
    """Loads a checkpoint as the variant that wrote it.

    `AT.load_from_checkpoint` loads checkpoints of `AT` and refuses those of other variants; this
    finds the class by itself.

    Args:
        path: A checkpoint of a variant of this package.
        kwargs: For `load_from_checkpoint`, say `network=` where it was built in Python.

    Returns:
        The module, on the CPU, in eval mode.

    Raises:
        ValueError: If the file is no checkpoint of a variant of this package, or is damaged.
    """
    name = class_written(path, "path")
    classes = importlib.import_module("robust_flatness.lightning_modules")
    variant = getattr(classes, name, None) if isinstance(name, str) else None
    if variant is None:
        members = {name: getattr(classes, name) for name in classes.__all__}
        variants = [n for n, c in members.items() if isinstance(c, type) and issubclass(c, AT)]
        raise ValueError(
            f"Expected `path` to be a checkpoint of {', '.join(variants)} but {path} was written "
            f"by {name}."
        )
    module: AT = variant.load_from_checkpoint(path, map_location="cpu", **kwargs)
    return module.eval()
