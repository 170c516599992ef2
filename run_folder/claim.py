"""A run folder that no other process writes to, and of which nothing is left if no run starts."""

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only


def is_first_process() -> bool:
    """Whether this process is the one that writes, also before there is a trainer."""
    # Lightning starts a process of its own on each node, which knows no rank before training.
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


@dataclass(frozen=True)
class RunFolder:
    """A run folder, and the folders that this process created for it, the innermost first."""

    path: Path
    made: Sequence[Path] = ()

    @classmethod
    def claim_first(cls, paths: Iterable[Path]) -> "RunFolder":
        """Creates the first of some folders that does not exist; no other process has it then.

        Processes other than the first create none, and learn the folder from the trainer.

        Raises:
            ValueError: If all exist, or a folder cannot be created.
        """
        for path in paths:
            if not is_first_process():
                return cls(path)
            with suppress(FileExistsError):
                return cls.claim(path)
        raise ValueError(f"Expected `--folder` to be a new folder but {path} exists.")

    @classmethod
    def claim(cls, path: Path, attempts: int = 20) -> "RunFolder":
        """Creates a folder by its absolute path.

        Raises:
            FileExistsError: If it exists.
            ValueError: If it cannot be created.
        """
        missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except OSError as error:
            cls(path, missing[1:]).discard()
            # A start that is refused at the same moment may remove a folder above.
            if isinstance(error, FileNotFoundError) and attempts:
                return cls.claim(path, attempts - 1)
            if isinstance(error, FileExistsError) and os.path.lexists(path):
                raise
            raise ValueError(
                f"Expected `folder` to be a folder that can be written to but got {path} "
                f"({error.strerror})."
            ) from error
        return cls(path, missing)

    @property
    def is_unused(self) -> bool:
        """Whether this process created the folder and no run, of any process, started in it."""
        names = ("config.yaml", "results*.json", "checkpoints/*.ckpt")
        return self.path in self.made and not any(any(self.path.glob(n)) for n in names)

    def discard(self) -> None:
        """Removes what this process created, unless a run has started in it."""
        if self.is_unused:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self.made:
            # Another run may be in it by now.
            with suppress(OSError):
                folder.rmdir()
