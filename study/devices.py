"""The GPUs of this machine that runs may have."""

import os
from collections.abc import Sequence

import torch


def visible_devices(devices: Sequence[int] | None, jobs: int) -> list[str]:
    """Names of GPUs for `CUDA_VISIBLE_DEVICES`, which may hide some already.

    Args:
        devices: Numbers among those that this process sees; `None` takes all of them where several
            runs are at work at once, and leaves a single run what there is.
        jobs: Runs at once.

    Returns:
        Their names; none where runs take what there is.

    Raises:
        ValueError: If there is no such GPU, where a run would silently take the CPU.
    """
    count = torch.cuda.device_count()
    if devices is None:
        devices = range(count) if jobs > 1 else []
    if not all(0 <= device < count for device in devices):
        raise ValueError(
            f"Expected `--devices` to number some of this machine's {count} GPUs, from 0, but got "
            f"{list(devices)}."
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = hidden.split(",") if hidden else [str(number) for number in range(count)]
    return [names[device].strip() for device in devices]
