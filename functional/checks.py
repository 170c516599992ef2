"""What an argument must be, said in one sentence when it is not."""

import math
from collections.abc import Sized
from numbers import Integral, Real

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def check_number(name: str, value: float, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raises if a number is outside `[low, high]` or not finite.

    Args:
        name: The argument's name, for the message.
        value: What came.
        low: Smallest accepted value.
        high: Largest accepted value.

    Raises:
        ValueError: If `value` is no finite number in `[low, high]`.

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
    """Raises if the radius or the step of an attack is no number for pixels in [0, 1].

    In `linf` every image is within 1 of every other, so a larger number is meant for pixels in
    0 ... 255.

    Args:
        name: The argument's name, for the message.
        value: What came.
        norm: `linf`, or `l2`, whose radii may exceed 1.

    Raises:
        ValueError: If `value` is no finite number >= 0, or above 1 with `linf`.

    Example:
        >>> check_radius("eps", 8, "linf")
        Traceback (most recent call last):
        ...
        ValueError: Expected `eps` to be in [0, 1] for norm linf, as pixels are in [0, 1], but got \
8; 8 of 255 levels is 8/255.
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
    """Raises if a number is no integer, or below `low`.

    Raises:
        ValueError: If `value` is no integer of at least `low`.

    Example:
        >>> check_count("steps", 2.5)
        Traceback (most recent call last):
        ...
        ValueError: Expected `steps` to be an integer but got 2.5.
    """
    check_number(name, value, low=low)
    if not isinstance(value, Integral):
        raise ValueError(f"Expected `{name}` to be an integer but got {value}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises if a value is none of the named choices.

    Raises:
        ValueError: If `value` is not in `choices`.

    Example:
        >>> check_choice("norm", "l1", ("linf", "l2"))
        Traceback (most recent call last):
        ...
        ValueError: Expected `norm` to be one of linf, l2 but got l1.
    """
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)} but got {value}.")


def check_examples(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    """Raises if images and labels are not what every attack here expects.

    Args:
        images: `(N, C, H, W)`, floating point, in [0, 1].
        labels: `(N,)`, integers in `0 ... num_classes - 1`.
        num_classes: Number of classes; `None` leaves the upper end unchecked.

    Raises:
        ValueError: If shapes differ, or pixels or labels are out of range.
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
            "normalisation belongs into the network, or into `normalization=(mean, std)`."
        )
    first, last = int(labels.min()), int(labels.max())
    if first < 0 or (num_classes is not None and last >= num_classes):
        end = "" if num_classes is None else f" and below the {num_classes} classes"
        raise ValueError(f"Expected `labels` to be >= 0{end} but got {first} to {last}.")


def check_logits(output: object, count: int) -> None:
    """Raises if what a network returned is not what losses and errors are computed from.

    Args:
        output: What it returned.
        count: Number N of images.

    Raises:
        ValueError: If it is no floating-point tensor of shape (N, K) with at least two classes.

    Example:
        >>> check_logits((torch.zeros(4, 10), torch.zeros(4, 64)), 4)
        Traceback (most recent call last):
        ...
        ValueError: Expected `model` to return logits of shape (N, K), one row for each of the 4 \
images, but got a tuple of 2; return the logits alone from `forward`.
    """
    if not isinstance(output, Tensor):
        length = f" of {len(output)}" if isinstance(output, Sized) else ""
        came = f"a {type(output).__name__}{length}; return the logits alone from `forward`"
    elif output.ndim != 2 or len(output) != count:
        came = f"a tensor of shape {tuple(output.shape)}"
    elif output.shape[1] < 2:
        came = f"{tuple(output.shape)}; a binary classifier needs a logit for each of its 2 classes"
    elif not output.is_floating_point():
        came = f"a tensor of {output.dtype}"
    else:
        return
    raise ValueError(
        f"Expected `model` to return logits of shape (N, K), one row for each of the {count} "
        f"images, but got {came}."
    )


def check_outputs(logits: Tensor, num_classes: int) -> None:
    """Raises if a network has another number of outputs than there are classes.

    Args:
        logits: `(N, K)`.
        num_classes: Number of classes.

    Raises:
        ValueError: If K is another number.

    Example:
        >>> check_outputs(torch.zeros(2, 1000), 10)
        Traceback (most recent call last):
        ...
        ValueError: Expected `network` to return 10 logits, one for each class, but got 1000.
    """
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"Expected `network` to return {num_classes} logits, one for each class, but got "
            f"{logits.shape[1]}."
        )


def are_probabilities(output: Tensor) -> bool:
    """Whether each row is in [0, 1] and sums to 1, as after a softmax.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> are_probabilities(logits), are_probabilities(logits.softmax(1))
        (False, True)
    """
    tolerance = 1e-2 if output.dtype in HALF else 1e-4
    within = (output >= 0) & (output <= 1)
    sums = output.sum(1, dtype=torch.float64)
    return bool(within.all() and ((sums - 1).abs() <= tolerance).all())


def upcast(logits: Tensor) -> Tensor:
    """Half-precision logits, or images, as float32, so that losses lose nothing to autocast.

    Example:
        >>> upcast(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return logits.float() if logits.dtype in HALF else logits


def predicted_classes(logits: Tensor) -> Tensor:
    """The predicted class of each example, or -1 if any of its logits is not finite.

    `argmax` of NaN is class 0, so a diverged network would be right on that class.

    Args:
        logits: `(N, K)`.

    Returns:
        Classes `(N,)`, -1 for an example that counts as misclassified whatever its label is.

    Example:
        >>> predicted_classes(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
        tensor([ 1, -1])
    """
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def losses_of_finite(losses: Tensor, logits: Tensor) -> Tensor:
    """Losses, NaN for an example if any of its logits is not finite.

    A loss may be finite all the same: cross-entropy does not see a logit of minus infinity.

    Args:
        losses: `(N,)`.
        logits: `(N, K)`.

    Example:
        >>> losses_of_finite(torch.zeros(2), torch.tensor([[0.0, 1.0], [-math.inf, 1.0]]))
        tensor([0., nan])
    """
    return torch.where(logits.isfinite().all(1), losses, math.nan)
