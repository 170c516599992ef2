"""Rules that flag misleading gradients and weak attacks, from the verdicts on single images.

Arrays are those of `examples.npz` for the last or the early-stopped weights, without `final/` or
`early_stopped/` in their names. Those of the test images count, else of the first other split.

Example:
    >>> correct = np.arange(10)
    >>> verdicts = {"test/correct_at_eps/0.1": correct < 6, "test/correct_at_eps/1": correct < 4}
    >>> for check in attack_checks(verdicts)[:2]:
    ...     print(check["passed"], check["text"])
    False RErr at ε = 1 is 60.0 % instead of 100 %
    True RErr rises with ε
    >>> error_curve(verdicts)
    {'eps': [0.1, 1.0], 'robust_error': [0.4, 0.6]}
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from robust_flatness.run_folder.metrics import LOSSES

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

_RADIUS = "correct_at_eps/"
# Attacks are random searches: differences of one image, or of less than this share, are chance.
_TOLERANCE = 0.01
# AutoAttack usually exceeds PGD, by more than this only if PGD is weak or gradients mislead.
_WEAK = 0.03


class Check(TypedDict):
    """Whether an expectation holds.

    `passed` is None if what it needs was not measured; `text` is a sentence with the numbers.
    """

    name: str
    passed: bool | None
    text: str


def attack_checks(arrays: Arrays) -> list[Check]:
    """Checks the attacks on one network.

    RErr is 100 % at the largest radius, which reaches every image, and rises with the radius and
    with steps; Square, an attack without gradients, changes no further predictions; AutoAttack's
    RErr is at most 3 points above PGD's on the same images.

    Returns:
        All checks, or none of them if nothing was measured that one needs.
    """
    curve, own = _curve(arrays), _at_own_radius(arrays)
    checks = [_largest(curve), _rises_with_eps(curve), _rises_with_steps(own), _square(own)]
    checks.append(_autoattack(arrays))
    return checks if any(check["passed"] is not None for check in checks) else []


def error_curve(arrays: Arrays) -> dict[str, list[float]]:
    """RErr by radius: `eps`, which rises, and `robust_error`; empty if it was not measured."""
    curve = _curve(arrays)
    errors = [1 - float(correct.mean()) for correct in curve.values()]
    return {"eps": list(curve), "robust_error": errors} if curve else {}


def class_errors(arrays: Arrays) -> dict[str, list[float]]:
    """RErr of the images of each class, by split; NaN for a class without images.

    Example:
        >>> verdicts = {"test/robust_correct": np.array([True, False, True])}
        >>> class_errors({**verdicts, "test/labels": np.array([0, 0, 1])})
        {'test': [0.5, 0.0]}
    """
    errors = {}
    for split in LOSSES:
        labels, correct = (arrays.get(_prefix(split) + x) for x in ("labels", "robust_correct"))
        if labels is not None and correct is not None and len(labels) == len(correct) > 0:
            counts, wrong = np.bincount(labels), np.bincount(labels, weights=~correct)
            shares = np.full(len(counts), np.nan)
            errors[split] = np.divide(wrong, counts, shares, where=counts > 0).tolist()
    return errors


def _largest(curve: Mapping[float, Array]) -> Check:
    name = "largest radius"
    if not curve:
        return _not_measured(name)
    radius, correct = list(curve.items())[-1]
    failed = _counts(int(correct.sum()), len(correct))
    text = f"RErr at ε = {radius:g} is {100 - 100 * correct.mean():.1f} %"
    return Check(name=name, passed=not failed, text=text + " instead of 100 %" * failed)


def _rises_with_eps(curve: Mapping[float, Array]) -> Check:
    name = "larger radius"
    if len(curve) < 2:
        return _not_measured(name)
    errors = {radius: int((~correct).sum()) for radius, correct in curve.items()}
    falls = {(a, b): errors[a] - errors[b] for a in errors for b in errors if a < b}
    low, high = max(falls, key=lambda pair: falls[pair])
    images = len(curve[low])
    failed = _counts(falls[low, high], images)
    points = 100 * falls[low, high] / images
    text = f"RErr falls by {points:.1f} points from ε = {low:g} to {high:g}"
    return Check(name=name, passed=not failed, text=text if failed else "RErr rises with ε")


def _rises_with_steps(own: Mapping[str, Array]) -> Check:
    name = "more steps"
    if "more_steps" not in own:
        return _not_measured(name)
    more, fewer = own["more_steps"], own[""]
    difference = int(more.sum()) - int(fewer.sum())
    points = -100 * difference / len(more)
    text = f"RErr changes by {points:+.1f} points with more steps"
    return Check(name=name, passed=not _counts(difference, len(more)), text=text)


def _square(own: Mapping[str, Array]) -> Check:
    name = "Square"
    if "square" not in own:
        return _not_measured(name)
    further = own[""] & own["more_steps"] & ~own["square"]
    text = f"Square, after PGD, changes the predictions of a further {100 * further.mean():.1f} %"
    return Check(name=name, passed=not _counts(int(further.sum()), len(further)), text=text)


def _autoattack(arrays: Arrays) -> Check:
    name = "AutoAttack"
    for split in LOSSES:
        strong, weak = arrays.get(f"{split}/autoattack_correct"), arrays.get(_pgd(split))
        if strong is not None and weak is not None:
            # Both have the first images of the split.
            images = min(len(strong), len(weak))
            difference = int(weak[:images].sum()) - int(strong[:images].sum())
            failed = _counts(difference, images) and difference > _WEAK * images
            points = f"{100 * difference / images:.1f} points on {images} images"
            text = f"RErr under AutoAttack minus RErr under PGD is {points}"
            text += f" instead of at most {100 * _WEAK:.0f}" * failed
            return Check(name=name, passed=not failed, text=text)
    return _not_measured(name)


def _not_measured(name: str) -> Check:
    return Check(name=name, passed=None, text="not measured")


def _counts(difference: int, images: int) -> bool:
    return difference > max(1.0, _TOLERANCE * images)


def _prefix(split: str) -> str:
    return LOSSES[split].removesuffix("robust_loss")


def _pgd(split: str) -> str:
    return f"{_prefix(split)}robust_correct"


def _of_radii(arrays: Arrays) -> dict[str, Array]:
    """Arrays of the first split that has some, by what follows `correct_at_eps/`."""
    for split in LOSSES:
        start = _prefix(split) + _RADIUS
        names = [name for name in arrays if name.startswith(start)]
        chosen = {name.removeprefix(start): arrays[name] for name in names}
        if chosen:
            return chosen
    return {}


def _curve(arrays: Arrays) -> dict[float, Array]:
    """Verdicts by radius, from the smallest one."""
    curve = {float(name): x for name, x in _of_radii(arrays).items() if "/" not in name}
    return dict(sorted(curve.items()))


def _at_own_radius(arrays: Arrays) -> dict[str, Array]:
    """Verdicts at the radius of the run: of PGD under the empty name, and of further attacks."""
    chosen = _of_radii(arrays)
    own: dict[str, Array] = {}
    for name in chosen:
        radius, _, attack = name.partition("/")
        if attack:
            own |= {"": chosen[radius], attack: chosen[name]}
    return own
