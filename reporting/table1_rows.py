"""Rows of Table 1: a model's figures, and beside them those of the paper's row that is its own."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robust_flatness.reporting.models import Model, Point
from robust_flatness.reporting.runs import Weights

AUTOATTACK, PGD = "AutoAttack", "PGD"
# What was trained for Table 1, by which a row of a sweep is told from the others of its method.
_STRENGTHS: Mapping[str, tuple[str, float]] = {
    "at_awp": ("model.xi", 0.01),
    "cyclic": ("model.lr_scheduler.cycles", 2),
    "entropy_sgd": ("model.optimizer.langevin_steps", 1),
    "label_noise": ("model.label_noise", 0.3),
    "label_smoothing": ("model.label_smoothing", 0.3),
    "mart": ("model.lam", 6.0),
    "self_supervision": ("model.lam", 4.0),
    "trades": ("model.lam", 6.0),
    "weight_averaging": ("weight_averaging.decay", 0.9975),
    "weight_clipping": ("weight_clipping.w_max", 0.005),
    "weight_decay": ("model.optimizer.weight_decay", 0.05),
}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: Its name for machines.
        heading: Its name for people, in two lines.
        names: Figures that it shows, the first that was measured, with the attack of each.
        weights: Whose figures.
        published_names: The same of a paper's row.
        is_error: Whether it is a share of 1, shown in percent; flatness is in nats.
    """

    key: str
    heading: str
    names: Mapping[str, str | None]
    published_names: Mapping[str, str | None]
    weights: Weights = "final"
    is_error: bool = True

    @property
    def has_attack(self) -> bool:
        """Whether its figures are by an attack on the images."""
        return any(attack is not None for attack in self.names.values())


_TEST = {"test/autoattack_error": AUTOATTACK, "test/robust_error": PGD}
# Of moving weights, as training sees them, `train/robust_error` would be no figure of any network.
_TRAIN = {"train_eval/robust_error": PGD}
_PUBLISHED_TRAIN = {"train/autoattack_error": AUTOATTACK, "train_eval/robust_error": PGD}
_AVERAGE, _WORST = {"flatness/average/test": None}, {"flatness/worst/test": None}
_CLEAN = {"test/error": None}

COLUMNS = (
    Column("test_robust_error", "test\nRErr", _TEST, _TEST),
    Column("train_robust_error", "train\nRErr", _TRAIN, _PUBLISHED_TRAIN),
    Column("average_flatness", "average-case\nflatness", _AVERAGE, _AVERAGE, is_error=False),
    Column("worst_flatness", "worst-case\nflatness", _WORST, _WORST, is_error=False),
    Column("early_stopped_robust_error", "early-stopped\nRErr", _TEST, _TEST, "early_stopped"),
    Column("clean_error", "clean\nerror", _CLEAN, _CLEAN),
)


@dataclass(frozen=True)
class Cell:
    """A figure of one model.

    Attributes:
        mean: Over seeds: an error as a share of 1, flatness in nats.
        deviation: The standard deviation over seeds, None for fewer than two.
        n: Seeds that it was measured for, which may be fewer than were trained.
        attack: By which it was measured: `AutoAttack`, `PGD`, or None for figures without.
        images: That it was measured on, None where seeds differ or it is not known.
    """

    mean: float
    deviation: float | None = None
    n: int = 1
    attack: str | None = None
    images: int | None = None


@dataclass(frozen=True)
class Row:
    """One model: its figures by the key of their column, and a paper's of the same method.

    Attributes:
        model: The model.
        cells: Only what was measured.
        published: Only what the paper states; empty where it has no row of that method, or where
            it is not plain which of several models it belongs to.
    """

    model: Model
    cells: Mapping[str, Cell]
    published: Mapping[str, Cell]


def make_rows(models: Sequence[Model], published: Sequence[Point] = ()) -> list[Row]:
    """Makes a row of each model.

    A paper's row stands beside the only model of its method, the one of its label, or, of several,
    the only one that was trained at the strength that Table 1 is about.

    Args:
        models: In any order, which rows keep.
        published: Rows of a paper.
    """
    matched = _match(models, published)
    return [
        Row(model, _cells(model), _published_cells(matched.get(_name(model)))) for model in models
    ]


def _cells(model: Model) -> dict[str, Cell]:
    found = {column.key: _cell(model, column) for column in COLUMNS}
    return {key: cell for key, cell in found.items() if cell is not None}


def _cell(model: Model, column: Column) -> Cell | None:
    for name, attack in column.names.items():
        values = model.values(name, column.weights)
        if values:
            runs = (run for run in model.runs if name in run.figures(column.weights))
            images = {run.num_examples.get(name) for run in runs}
            return Cell(
                mean=statistics.fmean(values),
                deviation=model.deviation(name, column.weights),
                n=len(values),
                attack=attack,
                images=images.pop() if len(images) == 1 else None,
            )
    return None


def _published_cells(point: Point | None) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for column in COLUMNS if point is not None else ():
        for name, attack in column.published_names.items():
            value = None if point is None else point.mean(name, column.weights)
            if value is not None:
                cells.setdefault(column.key, Cell(value, attack=attack))
    return cells


def _match(models: Sequence[Model], published: Sequence[Point]) -> dict[tuple[str, str], Point]:
    """A paper's row for each model that it plainly belongs to."""
    matched: dict[tuple[str, str], Point] = {}
    for method in {model.method for model in models}:
        ours = [model for model in models if model.method == method]
        theirs = [point for point in published if point.method == method]
        same = {point.label: point for point in theirs}
        matched |= {_name(model): same[model.label] for model in ours if model.label in same}
        if len(theirs) == 1 and len(chosen := _of_table1(method, ours)) == 1:
            matched[_name(chosen[0])] = theirs[0]
    return matched


def _name(model: Model) -> tuple[str, str]:
    return model.method, model.label


def _of_table1(method: str, ours: Sequence[Model]) -> list[Model]:
    if len(ours) < 2:
        return list(ours)
    name, strength = _STRENGTHS.get(method, ("", math.nan))
    return [model for model in ours if _is_close(model.differs.get(name), strength)]


def _is_close(value: Any, strength: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, strength)
