"""Versions and hardware of a run, which its metrics may depend on, and how it was started."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("robust-flatness", "torch", "torchvision", "lightning", "torchmetrics", "pyautoattack"),
    *("numpy", "scikit-learn", "wandb"),
)


def started_as() -> list[str]:
    """Returns the words that started this process, such as `python cli.py`, without arguments."""
    spec, script = getattr(sys.modules["__main__"], "__spec__", None), sys.argv[0] or "cli.py"
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__")]
    return ["python", script] if script.endswith(".py") else [Path(script).name]


def shown(path: Path) -> Path:
    """Returns a path as commands and messages show it: relative if it is inside the folder here."""
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return path.relative_to(Path.cwd()) if inside else path


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Returns the version of Python and of packages, None for one that is not installed.

    Example:
        >>> sorted(versions(["torch"]))
        ['python', 'torch']
    """
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def hardware(num_processes: int = 1) -> dict[str, Any]:
    """Returns the platform, the CPU's name and cores, the visible GPUs' names, and processes."""
    import torch  # not at the top: reading runs needs no torch

    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "num_processes": num_processes,
    }


def _cpu_name() -> str:
    # `platform.processor()` is empty on most Linux systems.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
