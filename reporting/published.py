"""The paper's own numbers, which a report shows beside a user's runs.

They are in `published_data/*.csv`. Each row says where it stands in the paper (`source`) and what
its flatness is (`statistic`): tables give the mean over directions, figure 5 apparently the
maximum. All are of CIFAR-10; losses are in nats, errors are shares of 1.

Names are those of a run. Beyond them, `test/clean_loss` and `train_eval/clean_loss` are the
cross-entropy on clean images, and `test/autoattack_loss` and `train/autoattack_loss` that on
AutoAttack's images, which underestimates RLoss. `flatness/clean_worst/test` is on another scale
than in the paper's figures and its table of scaled networks (21.05 against 0.86 for AT).

Example:
    >>> published_models().mean("AT (baseline)", "test/robust_loss")
    3.91
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import pandas as pd

from robust_flatness.reporting.frame import Models, metric_values

_FOLDER = Path(__file__).with_name("published_data")
_STOPPED = "early_stopped/"
# Columns of text; all others are metrics.
_WORDS = ["method", "label", "figure", "source", "statistic", "note"]


@lru_cache
def published_models(table: Literal["models", "table1", "robustbench"] = "models") -> Models:
    """Reads a published table.

    Args:
        table: `models` are the 74 models of the supplement's tables of errors and losses, sorted by
            AutoAttack error; `table1` the 19 rows of Table 1; `robustbench` 8 networks of others,
            which have metrics of early-stopped weights alone.

    Returns:
        Its rows in the paper's order, with labels as the paper writes them, such as `TRADES λ=9`.
        `frame` has `method`, `source`, `statistic` and `note`.

    Example:
        >>> published_models("table1").mean("AT", "test/autoattack_error", "early_stopped")
        0.546
    """
    if table not in ("models", "table1", "robustbench"):
        known = "`models`, `table1` or `robustbench`"
        raise ValueError(f"Expected `table` to be {known} but got {table!r}.")
    frame = _read(table).set_index("label")
    metrics = frame.drop(columns=_WORDS, errors="ignore")
    rows: list[tuple[str, dict[str, float], dict[str, float], dict[str, int]]] = []
    for label, row in metrics.iterrows():
        stated = row.dropna().to_dict()
        final = {name: x for name, x in stated.items() if not name.startswith(_STOPPED)}
        stopped = {n.removeprefix(_STOPPED): x for n, x in stated.items() if n not in final}
        rows.append((str(label), final, stopped, {}))
    return Models(frame[["method", "source", "statistic", "note"]], metric_values(rows))


@lru_cache
def published_trajectories(figure: Literal["points", "lines"] = "points") -> pd.DataFrame:
    """Reads how the paper's models moved during training, from its figures, within ±0.03.

    Args:
        figure: `points` are flatness and RLoss of AT, AT-AWP, self-supervision and, without RLoss,
            +Unlabeled (figure 5; apparently the maximum over directions); `lines` all that is drawn
            for AT, with the mean over directions, worst-case flatness at ξ = 0.003 and eigenvalues
            within ±30, which sum four batches.

    Returns:
        16 rows for each method: `method`, `progress`, which is 1 at the end of training, and
        metrics by the names of a run's trajectory.

    Example:
        >>> rows = published_trajectories()
        >>> rows[rows["method"] == "at_awp"].iloc[-1]["test/robust_loss"]
        np.float64(1.3)
    """
    if figure not in ("points", "lines"):
        raise ValueError(f"Expected `figure` to be `points` or `lines` but got {figure!r}.")
    rows = _read("trajectories")
    rows = rows[rows["figure"] == figure]
    return rows.drop(columns=[name for name in _WORDS if name != "method"]).dropna(
        axis=1, how="all"
    )


def _read(name: str) -> pd.DataFrame:
    table = pd.read_csv(_FOLDER / f"{name}.csv", dtype=str)
    words = [name for name in _WORDS if name in table]
    # From text, because the parser of numbers may be off by the last digit.
    metrics = table.drop(columns=words).astype(float)
    return pd.concat([table[words].fillna(""), metrics], axis=1)
