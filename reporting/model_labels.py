"""Names of models of one method: short, and none twice.

Example:
    >>> model_labels("AT", [{"trainer.max_epochs": 3}, {"trainer.max_epochs": 80}])
    ['AT max_epochs=3', 'AT max_epochs=80']
"""

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from robust_flatness.reporting.settings import is_training, short_name, short_text

_MOST_SHOWN = 3  # settings, where these are enough
_LONGEST = 40  # characters behind the method's name


def model_labels(method: str, differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels that tell models apart by what was trained, and else by what was measured.

    Where settings would make a label long, letters stand for them: `AT (a)`.

    Args:
        method: Name of the method, as labels begin.
        differences: For each model its settings that are not those of all, the most telling first.
    """
    shown = _enough(differences)
    if max(len(" ".join(settings)) for settings in shown) > _LONGEST:
        return [f"{method} ({_letters(index)})" for index in range(len(shown))]
    return [" ".join([method, *settings]) for settings in shown]


def settings_texts(settings: Mapping[str, Any]) -> list[str]:
    """`lam=9`, and the same name and value once, as `eps` of model and data are one number."""
    texts = (f"{short_name(name)}={short_text(value)}" for name, value in settings.items())
    return list(dict.fromkeys(texts))


def _enough(differences: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Few settings, and more where few would not tell models apart."""
    trained = [settings_texts(_only(differs, training=True)) for differs in differences]
    measured = [settings_texts(_only(differs, training=False)) for differs in differences]
    for number in range(_MOST_SHOWN, max(_MOST_SHOWN, *map(len, trained)) + 1):
        if _distinct(texts[:number] for texts in trained):
            return [_cut(texts, number) for texts in trained]
    for number in range(1, max(map(len, measured)) + 1):
        if _distinct([*a, *b[:number]] for a, b in zip(trained, measured)):
            return [[*a, *_cut(b, number)] for a, b in zip(trained, measured)]
    return [[*a, *b] for a, b in zip(trained, measured)]


def _only(differs: Mapping[str, Any], training: bool) -> dict[str, Any]:
    return {name: value for name, value in differs.items() if is_training(name) == training}


def _cut(texts: Sequence[str], number: int) -> list[str]:
    return [*texts[:number], *["…"] * (len(texts) > number)]


def _distinct(items: Iterable[Sequence[str]]) -> bool:
    found = [tuple(item) for item in items]
    return len(set(found)) == len(found)


def _letters(index: int) -> str:
    """From a to z, then aa, ab and so on."""
    before, last = divmod(index, len(ascii_lowercase))
    return (_letters(before - 1) if before else "") + ascii_lowercase[last]
