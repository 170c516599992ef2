"""Checkpoints that are written atomically."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from robust_flatness.functional.checks import check_archive
from robust_flatness.run_folder.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and compares checksums when it reads them.

    Lightning writes to the temporary folder and moves the file. If that folder is on another file
    system, the move is a copy onto the checkpoint, and a kill during the copy leaves neither the
    old nor the new one. Here the new file is written beside the old one and renamed. A kill can
    leave `<name>.tmp`, which the next save of the same file replaces.

    Remote paths, such as `s3://…`, are written and read by Lightning.

    Args:
        folder: Folder of the checkpoints, if no other process saves in it: then each save removes
            what a kill left there. `None` removes nothing.

    Example:
        In any Lightning project::

            Trainer(plugins=[AtomicCheckpointIO()])
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a checkpoint; a reader sees the old or the new one, never a part of one."""
        local = _local(path)
        if storage_options is not None or local is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if local.parent == self._folder:
            for left in local.parent.glob("*.ckpt.tmp"):
                left.unlink()
        with atomic_write(local) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint; raises a `ValueError` if a checksum of a local file differs."""
        local = _local(path)
        if local is not None and local.is_file():
            check_archive("ckpt_path", local)
        return super().load_checkpoint(path, *args, **kwargs)


def _local(path: str | Path) -> Path | None:
    """The path of a local file, `None` for one of the URLs that fsspec knows."""
    text = str(path).removeprefix("file://")
    return None if "://" in text or "::" in text else Path(text).absolute()
