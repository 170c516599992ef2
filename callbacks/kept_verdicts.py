"""Verdicts of an attack that takes hours, a file for each finished chunk of images."""

import hashlib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robust_flatness.functional.evaluation import logits_function
from robust_flatness.run_folder.files import write_arrays

# Far above what rounding changes, far below what another network says.
TOLERANCE = 1e-3
UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)


@dataclass(frozen=True)
class KeptVerdicts:
    """Lets an attack that was killed go on behind its last finished chunk.

    A chunk's file is named by the hash of all that its verdicts come from: weights and buffers,
    images, labels and settings. So verdicts of other weights are never taken, and processes that
    share out chunks, any number of them, never write the same file. The file holds the network's
    logits of the images as well, since equal weights in another architecture, say with another
    activation, are another network.

    Args:
        folder: Where the files are; `None` keeps nothing and finds nothing.

    Example:
        >>> import tempfile
        >>> network, images = nn.Flatten(), torch.rand(2, 1, 1, 3)
        >>> labels = torch.tensor([0, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = KeptVerdicts(Path(folder))
        ...     for verdict in (True, False):
        ...         attack = lambda: torch.tensor([verdict, verdict])
        ...         kept.verdicts(attack, network, images, labels, {"eps": 0.1})
        tensor([True, True])
        tensor([True, True])
    """

    folder: Path | None = None

    def verdicts(
        self,
        attack: Callable[[], Tensor],
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        settings: dict[str, object],
    ) -> Tensor:
        """Whether each image of a chunk is robust, bool `(N,)`: from its file, else by the attack.

        Args:
            attack: Gives the verdicts where there are none.
            network: What is attacked, in eval mode.
            images: `(N, C, H, W)`.
            labels: `(N,)`.
            settings: What else verdicts depend on; each value is told from another by its `repr`.
        """
        if self.folder is None:
            return attack()
        with torch.no_grad():
            logits = logits_function(network, images)(images)
        path = self.folder / f"chunk-{_fingerprint(network, images, labels, settings)}.npz"
        found = _read(path, logits)
        if found is None:
            found = attack()
            # What cannot be kept, say on a full disk, is not worth the attack that found it.
            with suppress(OSError):
                write_arrays(path, {"robust": found.cpu().numpy(), "logits": _array(logits)})
        return found

    def clear(self) -> None:
        """Removes the files, and the folder if it holds nothing else."""
        if self.folder is None:
            return
        with suppress(OSError):
            for file in self.folder.glob("chunk-*.npz*"):
                file.unlink(missing_ok=True)
            self.folder.rmdir()


def _read(path: Path, logits: Tensor) -> Tensor | None:
    try:
        with np.load(path) as file:
            robust, before = file["robust"], file["logits"]
    except UNREADABLE:
        return None
    now = _array(logits)
    scale = np.abs(now[np.isfinite(now)]).max(initial=0)
    if before.shape != now.shape:
        return None
    # Logits that are not finite are the same in the same place.
    if not np.allclose(before, now, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
        return None
    return torch.from_numpy(robust)


def _array(logits: Tensor) -> np.ndarray:
    return logits.double().cpu().numpy()


def _fingerprint(
    network: nn.Module, images: Tensor, labels: Tensor, settings: dict[str, object]
) -> str:
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, tensor in {**named, "images": images, "labels": labels}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Bytes, as NumPy lacks some of the types.
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()[:32]
