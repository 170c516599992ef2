"""The paper's own numbers, which a report puts beside a user's runs.

They are read from `published_data/*.csv`, where each row says where it stands in the paper
(`source`) and what its flatness is (`statistic`): tables give the mean over directions, figure 5
the maximum, as it seems. All are of CIFAR-10; losses are in nats, errors shares of 1.

Names are those of a run. Beyond them, `test/clean_loss` and `train_eval/clean_loss` are the
cross-entropy on clean images, and `test/autoattack_loss` and `train/autoattack_loss` that on
AutoAttack's images, which underestimates RLoss. `flatness/clean_worst/test` is on another scale
than in the paper's figures and its table of scaled networks (21.05 against 0.86 for AT).

Example:
    >>> next(model.mean("test/robust_loss") for model in published_models() if model.method == "at")
    3.91
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robust_flatness.reporting.runs import Figures, Weights

_FOLDER = Path(__file__).with_name("published_data")
_STOPPED = "early_stopped/"
# Columns of words; all others are figures.
_WORDS = {"method", "label", "figure", "source", "statistic", "note"}


@dataclass(frozen=True)
class PublishedModel:
    """A row of a published table; a `Point` like a model of our own.

    Attributes:
        method: Such as `trades`: the name of a preset or sweep where there is one.
        label: As the paper writes it, such as `TRADES λ=9`.
        source: The paper, and where in it.
        statistic: What its flatness is: over what, at which ξ.
        note: What else to know, such as that a figure is an outlier; mostly empty.
        final: Figures of the last weights, only those that the paper states.
        early_stopped: The same of the early-stopped weights.
    """

    method: str
    label: str
    source: str
    statistic: str
    note: str = ""
    final: Figures = field(default_factory=dict)
    early_stopped: Figures = field(default_factory=dict)

    def figures(self, weights: Weights = "final") -> Figures:
        """Figures of the last or of the early-stopped weights."""
        return self.final if weights == "final" else self.early_stopped

    def mean(self, name: str, weights: Weights = "final") -> float | None:
        """A figure, None where the paper does not state it."""
        return self.figures(weights).get(name)


def published_models(
    table: Literal["models", "table1", "robustbench"] = "models",
) -> list[PublishedModel]:
    """Reads the rows of a published table.

    Args:
        table: `models` are the 74 models of the supplement's tables of errors and losses, sorted by
            AutoAttack error; `table1` the 19 rows of Table 1; `robustbench` 8 networks of others,
            which have figures of early-stopped weights alone.

    Returns:
        Its rows, in the paper's order.

    Raises:
        ValueError: If `table` is none of these.

    Example:
        >>> row = published_models("table1")[-1]
        >>> row.label, row.mean("test/autoattack_error", "early_stopped")
        ('AT', 0.546)
    """
    if table not in ("models", "table1", "robustbench"):
        known = "`models`, `table1` or `robustbench`"
        raise ValueError(f"Expected `table` to be {known} but got {table!r}.")
    return [_model(row) for row in _rows(table)]


def published_trajectories(
    figure: Literal["points", "lines"] = "points",
) -> dict[str, list[dict[str, float]]]:
    """Reads how the paper's models moved in training, off its drawings and so within ±0.03.

    Args:
        figure: `points` are flatness and RLoss of AT, AT-AWP, self-supervision and, without RLoss,
            +Unlabeled (figure 5; the maximum over directions, as it seems); `lines` all that is
            drawn for AT, with the mean over directions, worst-case flatness at ξ = 0.003 and
            eigenvalues within ±30, which sum four batches.

    Returns:
        For each method 16 rows: `progress`, from 0 to 1 at the end of training, and figures by the
        names that a run's trajectory has.

    Raises:
        ValueError: If `figure` is neither.

    Example:
        >>> published_trajectories()["at_awp"][-1]
        {'progress': 1.0, 'test/robust_loss': 1.3, 'flatness/average/test': 0.36}
    """
    if figure not in ("points", "lines"):
        raise ValueError(f"Expected `figure` to be `points` or `lines` but got {figure!r}.")
    trajectories: dict[str, list[dict[str, float]]] = {}
    for row in _rows("trajectories"):
        if row["figure"] == figure:
            trajectories.setdefault(row["method"], []).append(_figures(row))
    return trajectories


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _model(row: Mapping[str, str]) -> PublishedModel:
    figures = _figures(row)
    return PublishedModel(
        method=row["method"],
        label=row["label"],
        source=row["source"],
        statistic=row["statistic"],
        note=row["note"],
        final={name: x for name, x in figures.items() if not name.startswith(_STOPPED)},
        early_stopped={
            name.removeprefix(_STOPPED): x
            for name, x in figures.items()
            if name.startswith(_STOPPED)
        },
    )


def _figures(row: Mapping[str, str]) -> dict[str, float]:
    """Figures of a row; an empty cell is one that the paper does not state."""
    return {name: float(cell) for name, cell in row.items() if name not in _WORDS and cell}
