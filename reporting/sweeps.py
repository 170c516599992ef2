"""Sweeps: models of one method that differ in one number alone.

Example:
    >>> from robust_flatness.reporting.published import published_models
    >>> sweeps = find_sweeps(published_models())
    >>> next(list(sweep.values()) for sweep in sweeps if "TRADES λ=6" in sweep)
    ['λ=1', 'λ=3', 'λ=6', 'λ=9']
"""

import re
from collections.abc import Collection, Sequence

from robust_flatness.reporting.frame import Models, exact_text, is_training, setting_text
from robust_flatness.run_folder.metrics import method_label
from robust_flatness.run_folder.runs import is_number

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def find_sweeps(models: Models, labels: Collection[str] | None = None) -> list[dict[str, str]]:
    """Finds models of one method, among `labels` or all, that differ in one number of training.

    Models that were measured differently, such as on another number of images, are not a sweep:
    their metrics would differ for another reason. Published models have no settings; those of one
    method are a sweep.

    Returns:
        For each sweep of two models or more its settings by label, such as `lam=9`, in the order of
        their values. A model of several sweeps, as in a grid, belongs to the largest.
    """
    sweeps: list[dict[str, str]] = []
    for method in models.methods:
        named = models.frame.index[models.frame["method"] == method]
        own = [label for label in named if labels is None or label in labels]
        if models.runs:
            sweeps += _disjoint(models, own)
        elif len(own) > 1:
            names = {label: _beyond_method(label, method) for label in own}
            own.sort(key=lambda label: [float(x) for x in _NUMBER.findall(names[label])])
            sweeps.append({label: names[label] for label in own})
    return sweeps


def _disjoint(models: Models, labels: Sequence[str]) -> list[dict[str, str]]:
    """The largest sweep, then the largest of the remaining models, and so on."""
    left = list(labels)
    sweeps: list[dict[str, str]] = []
    varied = [n for n in (models.differs[left[0]] if left else ()) if is_training(n)]
    while True:
        candidates = [(name, sweep) for name in varied for sweep in _along(models, left, name)]
        if not candidates:
            return sweeps
        name, sweep = max(candidates, key=lambda candidate: len(candidate[1]))
        sweep.sort(key=lambda label: float(models.differs[label][name]))
        sweeps.append({label: setting_text(name, models.differs[label][name]) for label in sweep})
        left = [label for label in left if label not in sweep]


def _along(models: Models, labels: Sequence[str], name: str) -> list[list[str]]:
    """Groups of two models or more that differ in that setting alone."""
    groups: list[list[str]] = []
    for label in labels:
        if not is_number(models.differs[label].get(name)):
            continue
        same = (group for group in groups if _differ_in(models, group[0], label, name))
        if (group := next(same, None)) is not None:
            group.append(label)
        else:
            groups.append([label])
    return [group for group in groups if len(group) > 1]


def _differ_in(models: Models, a: str, b: str, name: str) -> bool:
    """Whether one number differs, which may stand in several places, as `eps` does."""
    first, second = models.differs[a], models.differs[b]
    pairs = {
        (other.rsplit(".", 1)[-1], exact_text(first.get(other)), exact_text(value))
        for other, value in second.items()
        if exact_text(first.get(other)) != exact_text(value)
    }
    wanted = exact_text(first.get(name)), exact_text(second.get(name))
    return pairs == {(name.rsplit(".", 1)[-1], *wanted)}


def _beyond_method(label: str, method: str) -> str:
    """The part of a label after its method."""
    return label.removeprefix(method_label(method)).strip(" ()") or label
