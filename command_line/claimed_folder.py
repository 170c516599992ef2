"""A run folder that no other process writes to, and that leaves nothing if no run starts in it."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

# A folder above a run folder may be removed by a start that is refused at the same moment.
_ATTEMPTS = 20


def is_first_process() -> bool:
    """Returns whether this process is the one that writes, also before there is a trainer."""
    # Lightning starts a process of its own on each node, which knows no rank before training.
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


@dataclass(frozen=True)
class RunFolder:
    """A run folder.

    Attributes:
        path: The folder.
        made: The folders that this process created for it, the innermost last.
    """

    path: Path
    made: list[Path] = field(default_factory=list)

    @classmethod
    def claim(cls, path: Path) -> "RunFolder":
        """Creates a folder that no other process can claim as well.

        Args:
            path: An absolute path.

        Raises:
            FileExistsError: If the path exists.
            ValueError: If it cannot be created.
        """
        made: list[Path] = []
        for _ in range(_ATTEMPTS):
            try:
                for parent in reversed(path.parents):
                    with suppress(FileExistsError):
                        parent.mkdir()
                        made.append(parent)
                path.mkdir()
                return cls(path, [*made, path])
            except FileExistsError:
                cls(path, made).discard()
                raise
            except FileNotFoundError as error:
                failure: OSError = error
            except OSError as error:
                failure = error
                break
        cls(path, made).discard()
        raise ValueError(
            f"Expected `folder` to be a folder that can be written to but got {path} "
            f"({failure.strerror})."
        ) from failure

    @property
    def holds_a_run(self) -> bool:
        """Whether a run has started here, in this process or in one that it spawned."""
        names = ("config.yaml", "results*.json", "checkpoints/*.ckpt")
        return any(any(self.path.glob(name)) for name in names)

    @property
    def is_unused(self) -> bool:
        """Whether this process created the folder and no run has started in it."""
        return self.path in self.made and not self.holds_a_run

    def discard(self) -> None:
        """Removes what this process created, unless it holds a run by now."""
        if self.is_unused:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self.made):
            # Another run may be in it by now.
            with suppress(OSError):
                folder.rmdir()


def claim_first(paths: Iterable[Path]) -> RunFolder:
    """Claims the first of several folders that does not exist.

    Processes other than the first claim none, and learn the folder from the trainer.

    Args:
        paths: Absolute paths.

    Raises:
        FileExistsError: If all exist.
        ValueError: If a folder cannot be created.
    """
    taken = FileExistsError()
    for path in paths:
        if not is_first_process():
            return RunFolder(path)
        try:
            return RunFolder.claim(path)
        except FileExistsError as error:
            taken = error
    raise taken
