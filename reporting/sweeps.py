"""Which models are a sweep: those of one method that differ in one number alone.

Example:
    >>> from robust_flatness.reporting.published import published_models
    >>> sweeps = find_sweeps(published_models())
    >>> [step.setting for step in next(s for s in sweeps if s[0].point.method == "trades")]
    ['λ=1', 'λ=3', 'λ=6', 'λ=9']
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from robust_flatness.reporting.models import Model, Point, method_label
from robust_flatness.reporting.runs import is_number
from robust_flatness.reporting.settings import (
    exact_text,
    is_training,
    short_name,
    short_text,
)

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Step(NamedTuple):
    """A model of a sweep.

    Attributes:
        point: The model.
        setting: What it is in the sweep, such as `lam=9`.
    """

    point: Point
    setting: str


def find_sweeps(points: Iterable[Point]) -> list[list[Step]]:
    """Finds models of one method that differ in exactly one numeric setting of their training.

    Models that were measured in other ways, on other numbers of images say, are no sweep: their
    figures would differ for another reason. A paper's models, which have no settings to compare,
    are a sweep where they are of one method.

    Args:
        points: Models of ours and of papers.

    Returns:
        Sweeps of two models or more, in the order of their values. A model of several, as in a
        grid, counts to the largest.
    """
    methods: dict[str, list[Point]] = {}
    for point in points:
        methods.setdefault(point.method, []).append(point)
    return [sweep for of_method in methods.values() for sweep in _of_method(of_method)]


def _of_method(points: Sequence[Point]) -> list[list[Step]]:
    ours = [point for point in points if isinstance(point, Model)]
    theirs = sorted((p for p in points if not isinstance(p, Model)), key=_numbers)
    found = _disjoint(ours)
    if len(theirs) > 1:
        found.append([Step(point, _beyond_method(point)) for point in theirs])
    return found


def _disjoint(models: Sequence[Model]) -> list[list[Step]]:
    """The largest sweep, then the largest of the models that are left, and so on."""
    left, found = list(models), []
    while candidates := [(name, group) for name in _varied(left) for group in _along(left, name)]:
        name, group = max(candidates, key=lambda candidate: len(candidate[1]))
        group = sorted(group, key=lambda model: float(model.differs[name]))
        short = short_name(name)
        found.append([Step(m, f"{short}={short_text(m.differs[name])}") for m in group])
        left = [model for model in left if model not in group]
    return found


def _varied(models: Sequence[Model]) -> list[str]:
    return [name for name in (models[0].differs if models else ()) if is_training(name)]


def _along(models: Sequence[Model], name: str) -> list[list[Model]]:
    """Groups of two models or more that differ in that setting alone."""
    groups: list[list[Model]] = []
    for model in models:
        if is_number(model.differs.get(name)):
            same = (group for group in groups if _differ_in(group[0], model, name))
            group = next(same, None)
            if group is None:
                groups.append([model])
            else:
                group.append(model)
    return [group for group in groups if len(group) > 1]


def _differ_in(a: Model, b: Model, name: str) -> bool:
    """Whether all that differs is one number, which may stand in several places, as `eps` does."""
    pairs = {
        (other.rsplit(".", 1)[-1], exact_text(a.differs.get(other)), exact_text(value))
        for other, value in b.differs.items()
        if exact_text(a.differs.get(other)) != exact_text(value)
    }
    wanted = exact_text(a.differs.get(name)), exact_text(b.differs.get(name))
    return pairs == {(name.rsplit(".", 1)[-1], *wanted)}


def _numbers(point: Point) -> list[float]:
    """The numbers in a label; those without come first."""
    return [float(number) for number in _NUMBER.findall(_beyond_method(point))]


def _beyond_method(point: Point) -> str:
    """What a label says beyond its method."""
    return point.label.removeprefix(method_label(point.method)).strip(" ()") or point.label
