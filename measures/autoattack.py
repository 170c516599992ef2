"""Robust error by AutoAttack, the official package."""

import hashlib
import logging
import math
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.checks import Eps, check_count, check_radius
from robust_flatness.functional.evaluation import logits_function, predicted_classes
from robust_flatness.functional.memory import retried
from robust_flatness.functional.noise import Norm
from robust_flatness.functional.robust_loss import estimate_text
from robust_flatness.measures.base import DEFAULT_EPS, Examples, Measure
from robust_flatness.run_folder.files import write_arrays
from robust_flatness.run_folder.metrics import attacks_name, metric

# The fewest classes that each attack works with: the DLR loss divides by the gap between the first
# and third largest logits, the targeted one by that to the fourth.
FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "fab": 2, "square": 2, "apgd-t": 4, "fab-t": 2}
VERSIONS = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "plus": ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
    "rand": ["apgd-ce", "apgd-dlr"],
}
ATTACKS_FOR_FEW_CLASSES = ["apgd-ce", "fab", "square"]
# Square cuts images into five parts with `norm` l2.
FEWEST_PIXELS_OF_SQUARE_L2 = 5
# Far above what rounding changes, far below what another network returns.
TOLERANCE = 1e-3
UNREADABLE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Verdicts:
    """What AutoAttack says.

    Attributes:
        correct: Whether each image is classified correctly, clean and under all attacks, bool
            `(N,)`.
        attacks: `autoattack` for `standard`, else such as `apgd-ce+apgd-t`.
    """

    correct: Tensor
    attacks: str = "autoattack"

    def __repr__(self) -> str:
        """One line: the robust error with its standard error over images."""
        error = estimate_text(~self.correct, percent=True)
        label = metric(f"{self.attacks}_error").label
        return f"{label} {error} ({len(self.correct)} examples)"

    @property
    def robust_error(self) -> float:
        """Share of images that are misclassified, clean or attacked."""
        return 1 - self.correct.double().mean().item() if len(self.correct) else math.nan


@dataclass(kw_only=True)
class AutoAttackError(Measure):
    """AutoAttack's robust error (Croce & Hein, 2020), `test/autoattack_error`.

    Each chunk of images is one call of the official `run_standard_evaluation`. Below four classes
    the targeted DLR loss is not defined: `standard` runs the attacks that apply, with a warning;
    other versions and attacks are refused. APGD-T and FAB-T have at most one target less than there
    are classes.

    Attacks run in fewer and larger batches than the package's, of at most `chunk_size` images, with
    equal verdicts but for rounding, see `measures.batched_attacks`. A network that draws random
    numbers, or whose logits depend on the other images of a batch, gets the package's own.

    Images that are misclassified when clean are not attacked, nor is one that an earlier attack
    broke. An example whose logits are not finite, clean or attacked, counts as misclassified.
    Attacks are in float32; the network gets images in the type of its weights.

    With a `folder`, the verdicts of each finished chunk are written to a file, and an attack that
    was killed continues after its last finished chunk. A file is named by the hash of all that its
    verdicts depend on: weights and buffers, images, labels and settings. So verdicts of other
    weights are never used, and several processes never write the same file. It holds the logits of
    the clean images as well, because equal weights in another architecture are another network.
    (The package's own `state_path` does not identify network and images, is not written
    atomically, and repeats an interrupted attack on other batches.)

    Args:
        version: `standard` (the paper), `plus`, `rand`, or `custom`, which runs `attacks`.
        attacks: Some of `apgd-ce`, `apgd-dlr`, `fab`, `square`, `apgd-t` and `fab-t`, which makes
            the version `custom`.
        chunk_size: Number of images in each call of AutoAttack, and in a batch at most.
        eps: Radius of the attack, such as 8/255; None takes `eps` of the datamodule, or 8/255.
        norm: `linf` or `l2`.

    Attributes:
        folder: Folder of the verdicts of finished chunks, or None.
        square_queries: Number of queries of Square; None is the package's, 5000.
        larger_batches: Whether attacks run in larger batches than the package's.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> AutoAttackError(attacks=["apgd-ce", "square"]).version
        'custom'
    """

    version: Literal["standard", "plus", "rand", "custom"] = "standard"
    attacks: list[str] | None = None
    chunk_size: int = 100
    eps: Eps | None = None
    norm: Norm = "linf"
    batch_size: int = field(default=100, init=False)
    counts_images = True
    folder: Path | None = field(default=None, init=False, compare=False)
    square_queries: int | None = field(default=None, init=False)
    larger_batches: bool = field(default=True, init=False, compare=False)

    def __post_init__(self) -> None:
        check_count("chunk_size", self.chunk_size, low=1)
        self.batch_size = self.chunk_size
        super().__post_init__()
        check_radius("eps", self.radius, self.norm)
        if self.version == "standard" and self.attacks is not None:
            self.version = "custom"
        _check_attacks(self.version, self.attacks)

    @property
    def radius(self) -> float:
        """Radius of the attack."""
        return DEFAULT_EPS if self.eps is None else self.eps

    @override
    def check(self, network: nn.Module, images: Tensor, num_classes: int) -> None:
        self._attacks_for(num_classes, images)

    @override
    def measure(self, network: nn.Module, examples: Examples) -> Verdicts:
        # FAB calls `backward`, which would add to existing gradients of the parameters.
        network.requires_grad_(False)
        correct = torch.zeros(len(examples), dtype=torch.bool, device=examples.images.device)
        for begin in range(0, len(examples), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            images, labels = examples.images[part], examples.labels[part]
            correct[part] = self._read_or_attack(network, images, labels, examples.indices[begin])
            examples.progress(len(labels))
        return Verdicts(correct, self._name(network, examples.images))

    def attack(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The official verdict on one chunk: whether each image is robust, bool `(N,)`."""
        # A tensor that was made in inference mode takes no part in a graph, its clone does.
        images = images.clone()
        with torch.no_grad():
            logits = logits_function(network, images)(images)
        robust = predicted_classes(logits) == labels
        version, attacks = self._attacks_for(logits.shape[1], images)
        # With a radius of 0 there is nothing to search, and some attacks divide by it.
        if self.radius == 0 or not robust.any():
            return robust
        batched = self.larger_batches and _is_of_single_images(network, images, logits)
        settings = {"eps": self.radius, "version": version, "attacks": attacks}
        chunk = (images[robust].float(), labels[robust].long(), logits.shape[1], batched)

        def run() -> Tensor:
            try:
                return self._run_official(_Finite(network, images), *chunk, settings)
            except FloatingPointError:
                finite = _Finite(network, images, extra_class=True)
                return self._run_official(finite, *chunk, settings)

        # Its random numbers belong to places in the chunk, so that the chunk must stay whole.
        robust[robust.clone()] = retried(run, self.batch_size if batched else len(chunk[0]))
        return robust

    @override
    def metric_names(self, split: str) -> tuple[str, ...]:
        return (f"{split}/autoattack_error",)

    @override
    def values(self, result: Verdicts) -> tuple[float, ...]:
        return (result.robust_error,)

    @override
    def arrays(self, result: Verdicts, split: str) -> dict[str, Tensor]:
        return {f"{split}/autoattack_correct": result.correct}

    @property
    @override
    def progress(self) -> tuple[str, int]:
        return "AutoAttack, images", 1

    def _run_official(
        self,
        network: "_Finite",
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        batched: bool,
        settings: dict[str, Any],
    ) -> Tensor:
        # Imported late: it takes a second, and only this measure needs it.
        from pyautoattack import AutoAttack

        from robust_flatness.measures.batched_attacks import use_larger_batches

        logging.getLogger("auto-attack").setLevel(logging.WARNING)
        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        official = AutoAttack(network, norm=norm, seed=self.seed, device=images.device, **settings)
        if self.square_queries is not None:
            official.square.n_queries = self.square_queries
        targets = min(9, num_classes - 1)
        official.apgd_targeted.n_target_classes = official.fab.n_target_classes = targets
        if batched:
            use_larger_batches(official, self.batch_size)
        _, predicted = official.run_standard_evaluation(images, labels, batch_size=len(images))
        return predicted == labels

    def _attacks_for(self, num_classes: int, images: Tensor) -> tuple[str, list[str] | None]:
        """Version and attacks that run; `attacks` is None if the version names them."""
        attacks = VERSIONS.get(self.version, self.attacks or [])
        version, custom = self.version, self.attacks
        if version == "standard" and 2 <= num_classes < FEWEST_CLASSES["apgd-t"]:
            warnings.warn(
                f"AutoAttack standard needs at least {FEWEST_CLASSES['apgd-t']} classes for its "
                f"targeted DLR loss and there are {num_classes}: running "
                f"{', '.join(ATTACKS_FOR_FEW_CLASSES)} instead.",
                stacklevel=2,
            )
            version, attacks, custom = "custom", ATTACKS_FOR_FEW_CLASSES, ATTACKS_FOR_FEW_CLASSES
        for attack in attacks:
            if num_classes < FEWEST_CLASSES[attack]:
                raise ValueError(
                    f"Expected at least {FEWEST_CLASSES[attack]} classes for AutoAttack's {attack} "
                    f"(`version` {version}) but got {num_classes}; `attacks` takes those that work."
                )
        small = min(images.shape[2:]) < FEWEST_PIXELS_OF_SQUARE_L2
        if self.norm == "l2" and "square" in attacks and small:
            raise ValueError(
                f"Expected images of at least {FEWEST_PIXELS_OF_SQUARE_L2} pixels a side for "
                f"AutoAttack's square with `norm` l2 but got {tuple(images.shape[2:])}; `attacks` "
                "takes those that work."
            )
        return version, custom

    def _name(self, network: nn.Module, images: Tensor) -> str:
        if not len(images):
            return attacks_name(self.version, self.attacks)
        with torch.no_grad():
            classes = logits_function(network, images)(images[:1]).shape[1]
        return attacks_name(*self._attacks_for(classes, images))

    def _read_or_attack(
        self, network: nn.Module, images: Tensor, labels: Tensor, first_index: int
    ) -> Tensor:
        if self.folder is None:
            return self.attack(network, images, labels)
        with torch.no_grad():
            logits = logits_function(network, images)(images).cpu().double().numpy()
        path = self.folder / f"chunk-{self._fingerprint(network, images, labels, first_index)}.npz"
        robust = _read(path, logits)
        if robust is None:
            robust = self.attack(network, images, labels)
            # If verdicts cannot be written, say on a full disk, the attack is not repeated for it.
            with suppress(OSError):
                write_arrays(path, {"robust": robust.cpu().numpy(), "logits": logits})
        return robust

    def _fingerprint(
        self, network: nn.Module, images: Tensor, labels: Tensor, first_index: int
    ) -> str:
        # Random numbers differ between devices, and may differ between versions.
        versions = [installed_version(name) for name in ("pyautoattack", "torch")]
        settings: tuple[Any, ...] = (self.version, self.attacks, self.radius, self.norm, self.seed)
        settings += (first_index, *filter(None, [self.square_queries]))
        digest = hashlib.sha256(repr((settings, images.device.type, versions)).encode())
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, tensor in {**tensors, "images": images, "labels": labels}.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # Bytes, because NumPy has no bfloat16.
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()[:32]

    def remove_verdicts(self) -> None:
        """Removes the files of finished chunks, and the folder if nothing else is in it."""
        if self.folder is not None:
            with suppress(OSError):
                for file in self.folder.glob("chunk-*.npz*"):
                    file.unlink(missing_ok=True)
                self.folder.rmdir()


class _Finite:
    """Maps images to finite float32 logits with finite gradients, as the package needs them.

    With `extra_class` there is one class more, which is predicted for an example whose logits are
    not finite; for others its logit is so low that attacks have no use for it. Without it, logits
    that are not finite raise `FloatingPointError`.
    """

    def __init__(self, network: nn.Module, images: Tensor, *, extra_class: bool = False) -> None:
        self._logits, self._extra_class = logits_function(network, images), extra_class

    def __call__(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            images = images.view_as(images)
            # NaN in a gradient would turn pixels into NaN, which every network misclassifies.
            images.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
        logits = self._logits(images)
        finite = logits.isfinite().all(1, keepdim=True)
        if logits.dtype == torch.float64:
            # Only differences count, and they fit into float32.
            logits = logits - logits.detach().amax(1, keepdim=True)
        logits = logits.float()
        if self._extra_class:
            logits = torch.where(finite, logits, 0.0)
            lowest = logits.detach().amin(1, keepdim=True) - 1e6
            return torch.cat([logits, torch.where(finite, lowest, 1.0)], 1)
        if not finite.all():
            raise FloatingPointError("logits are not finite")
        return logits


def _is_of_single_images(network: nn.Module, images: Tensor, logits: Tensor) -> bool:
    """Whether logits stay the same among other images and in another order, but for rounding."""
    others = 1 - images
    with torch.no_grad():
        again = logits_function(network, images)(torch.cat([others, images.flip(0)]))
    again = again[len(others) :].flip(0)
    scale = logits[logits.isfinite()].abs().amax().item() if logits.isfinite().any() else 0.0
    return torch.allclose(logits, again, rtol=0, atol=1e-4 * scale, equal_nan=True)


def _check_attacks(version: str, attacks: Any) -> None:
    if (version == "custom") != (attacks is not None):
        raise ValueError(
            f"Expected `attacks` with `version` custom, and with no other, but got {attacks} with "
            f"{version}."
        )
    if attacks is None:
        return
    known = isinstance(attacks, (list, tuple)) and all(name in FEWEST_CLASSES for name in attacks)
    if not attacks or not known:
        names = ", ".join(FEWEST_CLASSES)
        raise ValueError(f"Expected `attacks` to be a list of some of {names} but got {attacks}.")


def _read(path: Path, logits: np.ndarray) -> Tensor | None:
    """Verdicts of a file, if the logits that it holds are those of this network."""
    try:
        with np.load(path) as file:
            robust, before = file["robust"], file["logits"]
    except UNREADABLE:
        return None
    scale = np.abs(logits[np.isfinite(logits)]).max(initial=0)
    close = before.shape == logits.shape and np.allclose(
        before, logits, rtol=0, atol=TOLERANCE * scale, equal_nan=True
    )
    return torch.from_numpy(robust) if close else None
