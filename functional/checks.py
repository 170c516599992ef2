"""Checks of arguments, which raise a ValueError "Expected `name` to be X but got Y."."""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

if TYPE_CHECKING:
    Eps = float
else:

    class Eps(float):
        """A number that the command line and YAML also take as a fraction such as `8/255`."""


def read_number(value: Any) -> float:
    """Reads a number, or a fraction written as text.

    Raises:
        ValueError: If it is neither, or not finite.

    Example:
        >>> read_number("51/255")
        0.2
    """
    text = str(value)
    with suppress(ValueError, ZeroDivisionError):
        # Digits of other scripts are numbers to Python, but probably a typing error.
        if isinstance(value, (int, float, str)) and text.isascii() and "_" not in text:
            above, _, below = text.partition("/")
            number = float(above) / float(below) if "/" in text else float(text)
            if math.isfinite(number):
                return number
    raise ValueError(f"Expected a number or a fraction such as 8/255 but got {value}.")


# Only the command line needs it: modules and callbacks work on a machine that lacks it.
if find_spec("jsonargparse"):
    from jsonargparse.typing import register_type

    register_type(
        Eps,
        serializer=float,
        deserializer=read_number,
        # Values stay plain floats: an Eps object in a checkpoint could not be loaded safely.
        type_check=lambda value, _: type(value) is float,
    )


def check_number(name: str, value: float, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raises if the argument `name` is not a finite number in `[low, high]`.

    Example:
        >>> check_number("eps", -0.1)
        Traceback (most recent call last):
        ...
        ValueError: Expected `eps` to be >= 0 but got -0.1.
    """
    if isinstance(value, Real) and math.isfinite(value) and low <= value <= high:
        return
    wanted = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
    raise ValueError(f"Expected `{name}` to be {wanted} but got {value}.")


def check_radius(name: str, value: float, norm: str) -> None:
    """Raises if the radius or the step of an attack is not a number for pixels in [0, 1].

    In `linf` every image is within 1 of every other, so a larger number is meant for pixels in
    0 ... 255. With `l2` it may exceed 1.
    """
    check_number(name, value)
    if norm != "linf" or value <= 1:
        return
    meant = f"; {value:g} of 255 levels is {value:g}/255" if value <= 255 else ""
    raise ValueError(
        f"Expected `{name}` to be in [0, 1] for norm linf, as pixels are in [0, 1], but got "
        f"{value:g}{meant}."
    )


def check_count(name: str, value: int, *, low: int = 0) -> None:
    """Raises if a number is not an integer of at least `low`."""
    check_number(name, value, low=low)
    if not isinstance(value, Integral):
        raise ValueError(f"Expected `{name}` to be an integer but got {value}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises if a value is not one of the choices."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)} but got {value}.")


def check_examples(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    """Raises if images and labels are not what every attack here expects.

    Args:
        images: `(N, C, H, W)`, floating point, in [0, 1].
        labels: `(N,)`, integers in `0 ... num_classes - 1`.
        num_classes: Number of classes; `None` does not check the upper end.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            "Expected `images` to be floating point of shape (N, C, H, W) but got "
            f"{images.dtype} of shape {tuple(images.shape)}."
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"Expected `labels` to have shape ({len(images)},) as there are {len(images)} images "
            f"but got {tuple(labels.shape)}."
        )
    if len(images) == 0:
        return
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Expected `images` to have pixels in [0, 1] but got [{low:.3g}, {high:.3g}]; "
            "normalization belongs in the network, or in `normalization=(mean, std)`."
        )
    first, last = int(labels.min()), int(labels.max())
    if first < 0 or (num_classes is not None and last >= num_classes):
        end = "" if num_classes is None else f" and below the {num_classes} classes"
        raise ValueError(f"Expected `labels` to be >= 0{end} but got {first} to {last}.")


def check_outputs(logits: Tensor, num_classes: int) -> None:
    """Raises if the logits `(N, K)` of a network are not one for each class."""
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"Expected `network` to return {num_classes} logits, one for each class, but got "
            f"{logits.shape[1]}."
        )


def takes(function: Any, *arguments: Any) -> bool:
    """Returns whether something can be called with such arguments.

    Example:
        >>> takes(len, []), takes(len), takes("len", [])
        (True, False, False)
    """
    try:
        signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


# By name, as functions need no Lightning.
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_strategy(trainer: Any, name: str) -> None:
    """Raises if a Lightning trainer's strategy gives each process a part of the weights only.

    Args:
        trainer: The trainer.
        name: Class that needs all of them, for the message.
    """
    strategy = type(getattr(trainer, "strategy", None))
    if any(kind.__name__ in SHARDED for kind in strategy.__mro__):
        raise ValueError(
            f"Expected a `strategy` that has all weights on each process, such as ddp, for {name} "
            f"but got {strategy.__name__}."
        )


def check_archive(name: str, path: str | Path) -> None:
    """Raises if a checkpoint's bytes are not those that were written.

    PyTorch's checkpoints are ZIP archives with a checksum for each tensor, which `torch.load` does
    not compare: flipped bytes load as other weights. Files without checksums, such as those of
    PyTorch's legacy format, pass.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                damaged = archive.testzip() if any(member.CRC for member in members) else None
                # PyTorch reads nothing that is marked as a folder, and no checksum covers it.
                damaged = next((m.filename for m in members if m.external_attr & 16), damaged)
        except Exception as error:  # a damaged archive raises almost anything
            raise ValueError(
                f"Expected `{name}` to be an undamaged checkpoint but {path} is no whole archive: "
                f"{error}."
            ) from error
    if damaged is not None:
        raise ValueError(
            f"Expected `{name}` to be an undamaged checkpoint but in {path} the checksum of "
            f"{damaged} differs."
        )


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raises on every process if any of them raises inside, so that none waits for it later.

    All processes must enter it, and nothing inside may wait for another process. Other processes
    raise a ValueError with the message of the first one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages: list[str | None] = []
    if distributed.is_available() and distributed.is_initialized():
        messages = [None] * distributed.get_world_size()
        distributed.all_gather_object(messages, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"{message} This was on process {rank}.")
