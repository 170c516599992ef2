"""Logged metrics: their names, labels, units and directions, and their values over epochs.

A new measure is one line of `METRICS`; labels of axes and columns, titles of panels and the
summaries in Weights & Biases follow from it, and with `in_tables` its rows and columns in the table
of `fit` and of the report page. Names that no line describes work as well.

Example:
    >>> flatness = metric("early_stopped/flatness/average/train")
    >>> flatness.title, flatness.unit, flatness.lower_is_better
    ('average-case flatness, train, early-stopped', 'nats', True)
    >>> metric("test/robust_error").text(0.524)
    '52.4 %'
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

Number = TypeVar("Number")
Rows = Sequence[Mapping[str, float]]
Weights = Literal["final", "early_stopped"]

# What titles call the images of a split. `train` has a second meaning, see `Metric.title`.
SPLITS = {"test": "test", "val": "early-stopping images", "train": "train", "train_eval": "train"}
# The robust loss on the images of each split with fixed weights.
LOSSES = {"test": "test/robust_loss", "val": "val/robust_loss", "train": "train_eval/robust_loss"}


@dataclass(frozen=True)
class Metric:
    """A logged number.

    Attributes:
        name: As logged, without `final/` or `early_stopped/`; in `METRICS` also without its split.
        label: What it measures, such as `RLoss`, without split and weights.
        unit: `nats`, `%` or empty. Values in `%` are logged as shares of 1.
        lower_is_better: None if neither direction is better.
        once: Whether it is measured once, at the end of a run, and not over epochs.
        in_tables: Whether the table that `fit` prints and that of the report page show it below, or
            behind, their usual metrics, if it was measured.
        split: `test`, `val`, `train` (fixed training images, or batches if the name begins with
            `train/`), `train_eval` or empty.
        weights: `final` or `early_stopped`.
    """

    name: str
    label: str
    unit: str = ""
    lower_is_better: bool | None = True
    once: bool = False
    in_tables: bool = False
    split: str = ""
    weights: Weights = "final"

    @property
    def is_share(self) -> bool:
        """Whether values are shares of 1, shown in percent."""
        return self.unit == "%"

    @property
    def title(self) -> str:
        """Label, split and weights, such as `RLoss, test`."""
        split = SPLITS.get(self.split, self.split)
        # Training logs the batches that it sees while the weights move under `train/`.
        if self.name.startswith("train/") and not self.once:
            split = "training batches"
        weights = "early-stopped" if self.weights == "early_stopped" else ""
        return ", ".join(filter(None, (self.label, split, weights)))

    @property
    def axis_label(self) -> str:
        """Title and, for shares, the unit, as an axis in percent shows it."""
        return f"{self.title}, in %" if self.is_share else self.title

    @property
    def summary(self) -> str | None:
        """What Weights & Biases keeps of the values over epochs; None for the last one."""
        if self.once:
            return None
        return "max,last" if self.lower_is_better is False else "min,last"

    def text(self, value: float, decimals: int = 3) -> str:
        """A value with its unit if that is `%`; `decimals` are of values that are no shares."""
        return f"{100 * value:.1f} %" if self.is_share else f"{value:.{decimals}f}"


METRICS = (
    Metric("robust_loss", "RLoss", "nats"),
    Metric("robust_loss_correct", "RLoss, correct when clean", "nats"),
    Metric("robust_loss_incorrect", "RLoss, incorrect when clean", "nats"),
    Metric("robust_error", "RErr (PGD)", "%"),
    Metric("autoattack_error", "RErr (AutoAttack)", "%", once=True),
    Metric("autoattack_loss", "loss on AutoAttack's images", "nats", once=True),
    Metric("error", "clean error", "%"),
    Metric("clean_loss", "clean loss", "nats"),
    Metric("gap/robust_loss", "RLoss, test − train", "nats"),
    Metric("gap/robust_error", "RErr (PGD), test − train", "%"),
    Metric("last_minus_best/robust_loss", "RLoss, last − early-stopped", "nats"),
    Metric("flatness/average", "average-case flatness", "nats"),
    Metric("flatness/worst", "worst-case flatness", "nats"),
    Metric("flatness/clean_average", "average-case flatness of the clean loss", "nats"),
    Metric("flatness/clean_worst", "worst-case flatness of the clean loss", "nats"),
    Metric("flatness/first_order", "first-order flatness", "nats", in_tables=True),
    Metric("flatness/clean_first_order", "first-order flatness (clean)", "nats", in_tables=True),
    Metric("sharpness/adaptive_average", "average adaptive sharpness", "nats", in_tables=True),
    Metric("sharpness/adaptive_worst", "worst adaptive sharpness", "nats", in_tables=True),
    Metric(
        "sharpness/clean_adaptive_average",
        "average adaptive sharpness (clean)",
        "nats",
        in_tables=True,
    ),
    Metric(
        "sharpness/clean_adaptive_worst", "worst adaptive sharpness (clean)", "nats", in_tables=True
    ),
    Metric("gradient/norm", "gradient norm", in_tables=True),
    Metric("gradient/clean_norm", "gradient norm (clean)", in_tables=True),
    Metric("gradient/relative_norm", "relative gradient norm", "nats", in_tables=True),
    Metric(
        "gradient/clean_relative_norm", "relative gradient norm (clean)", "nats", in_tables=True
    ),
    Metric("hessian/trace", "Hessian trace", in_tables=True),
    Metric("hessian/robust_trace", "Hessian trace (fixed attacks)", in_tables=True),
    Metric("hessian/scale_free_trace", "scale-free Hessian trace", "nats", in_tables=True),
    Metric(
        "hessian/robust_scale_free_trace",
        "scale-free Hessian trace (fixed attacks)",
        "nats",
        in_tables=True,
    ),
    Metric("hessian/max_eigenvalue", "largest Hessian eigenvalue"),
    Metric("hessian/min_eigenvalue", "smallest Hessian eigenvalue", lower_is_better=None),
    Metric("hessian/convexity", "convexity |λ_min| / |λ_max|"),
    Metric("margin/mean", "mean margin", lower_is_better=False, in_tables=True),
    Metric("margin/median", "median margin", lower_is_better=False),
    Metric("margin/percentile_10", "10th percentile of the margin", lower_is_better=False),
    Metric("margin/probability", "mean probability margin", lower_is_better=False),
    Metric("margin/robust_mean", "mean margin (PGD)", lower_is_better=False, in_tables=True),
    Metric("margin/robust_median", "median margin (PGD)", lower_is_better=False),
    Metric("margin/robust_percentile_10", "10th percentile of margin (PGD)", lower_is_better=False),
    Metric("margin/robust_probability", "mean probability margin (PGD)", lower_is_better=False),
    Metric("lipschitz/logits", "local Lipschitz constant", in_tables=True),
    Metric("lipschitz/kl", "KL (clean ‖ PGD)", "nats", in_tables=True),
    Metric("boundary/thickness", "boundary thickness", lower_is_better=False, in_tables=True),
    Metric("boundary/not_reached", "target class not reached", "%", lower_is_better=None),
    Metric("boundary/same_class", "target class predicted before", "%", lower_is_better=None),
    Metric("attack/largest_eps_error", "RErr (PGD) at the largest ε", "%", lower_is_better=None),
    Metric("attack/more_steps_error", "RErr (PGD) with more steps", "%"),
    Metric("attack/square_error", "RErr (PGD and Square)", "%"),
    Metric("single_step/fgsm_error", "error under FGSM", "%"),
    Metric("single_step/pgd_error", "error under PGD, steps of ε/4", "%"),
    Metric("gradient/alignment", "gradient alignment", lower_is_better=False),
    Metric("loss", "loss of the objective", "nats"),
    Metric("divergence", "KL divergence", "nats"),
    Metric("weighted_divergence", "weighted KL divergence", "nats"),
    Metric("rotation_loss", "rotation loss", "nats"),
    Metric("rotation_error", "rotation error", "%"),
    Metric("learning_rate", "learning rate", lower_is_better=None),
    Metric("unlabeled/share", "share of unlabeled images", "%", lower_is_better=None),
    Metric("label_noise/changed", "share of changed labels", "%", lower_is_better=None),
)
# Methods as the paper writes them. Other names are shown unchanged.
METHOD_LABELS = {
    "at": "AT",
    "at_awp": "AT-AWP",
    "autoaugment": "AutoAugment",
    "cyclic": "Cyclic",
    "entropy_sgd": "Entropy-SGD",
    "gelu": "GeLU",
    "label_noise": "Label noise",
    "label_smoothing": "Label smoothing",
    "larger_eps": "Larger ε",
    "late_multi_step": "“Late” multi-step",
    "mart": "MART",
    "mish": "MiSH",
    "self_supervision": "Self-supervision",
    "silu": "SiLU",
    "trades": "TRADES",
    "unlabeled": "+Unlabeled",
    "weight_averaging": "Weight averaging",
    "weight_clipping": "Weight clipping",
    "weight_decay": "Weight decay",
    # Sweeps and the paper's other models, which are not in Table 1.
    "adam": "Adam",
    "attack_steps": "Attack steps",
    "batch_size": "Batch size",
    "constant_rate": "Constant learning rate",
    "dropout": "Dropout",
    "fgsm_rs": "FGSM-RS",
    "ignore_incorrect": "Ignore incorrect",
    "learning_rate": "Learning rate",
    "n_fgsm": "N-FGSM",
    "pgd_tau": "PGD-τ",
    "prevent_label_leaking": "Prevent label leaking",
}
# Methods by their label and by their class.
_ROWS = {label: method for method, label in METHOD_LABELS.items()} | {
    "ATAWP": "at_awp",
    "ATEntropySGD": "entropy_sgd",
    "ATSelfSupervision": "self_supervision",
    "ATUnlabeled": "unlabeled",
}
_BY_NAME = {entry.name: entry for entry in METRICS}
# Robust errors by other attacks of the AutoAttack package than `standard`, see `attacks_name`.
_ATTACKS = {
    "apgd-ce": "APGD-CE",
    "apgd-dlr": "APGD-DLR",
    "apgd-t": "APGD-T",
    "fab": "FAB",
    "fab-t": "FAB-T",
    "square": "Square",
    "autoattack-plus": "AutoAttack plus",
    "autoattack-rand": "AutoAttack rand",
}


@lru_cache(maxsize=1024)
def metric(name: str) -> Metric:
    """Describes a logged number by its name.

    Args:
        name: As logged, such as `test/robust_loss` or `early_stopped/flatness/average/train`. Its
            split may stand anywhere in it. A name that ends in `_sem` is the standard error of
            another, and one that ends in `_early_stopped` is of the early-stopped weights.

    Returns:
        The entry of `METRICS` with name, split and weights. If there is none, the label is the name
        without its split; losses and errors are better if lower, and errors are shares.

    Example:
        >>> metric("early_stopped/hessian/train/max_eigenvalue").title
        'largest Hessian eigenvalue, train, early-stopped'
        >>> metric("my/new_measure/val").title
        'my/new_measure, early-stopping images'
    """
    logged = name.removeprefix("final/").removeprefix("early_stopped/")
    key = logged.removesuffix("_early_stopped")
    early_stopped = name.startswith("early_stopped/") or key != logged
    is_deviation = key.endswith("_sem")
    parts = key.removesuffix("_sem").split("/")
    split = next((part for part in parts if part in SPLITS), "")
    if split:
        parts.remove(split)
    key = "/".join(parts)
    entry = _BY_NAME.get(key) or _default(key)
    if is_deviation:
        label = f"standard error of {entry.label}"
        # Tables show it behind its value.
        entry = replace(entry, label=label, lower_is_better=None, in_tables=False)
    return replace(
        entry,
        name=logged,
        once=entry.once or logged != name,
        # Curvature is of test images unless its name says otherwise.
        split=split or ("test" if key.startswith("hessian/") else ""),
        weights="early_stopped" if early_stopped else "final",
    )


def attacks_name(version: str, attacks: Sequence[str] | None) -> str:
    """What stands for `autoattack` in the name of an error by a version or by some attacks.

    Example:
        >>> attacks_name("standard", None), attacks_name("plus", None)
        ('autoattack', 'autoattack-plus')
        >>> attacks_name("custom", ["apgd-t", "apgd-ce"])
        'apgd-ce+apgd-t'
    """
    if version == "custom":
        return "+".join(sorted(set(attacks or ())))
    return "autoattack" if version == "standard" else f"autoattack-{version}"


def with_attacks(metrics: Mapping[str, Number], attacks: Mapping[str, str]) -> dict[str, Number]:
    """Metrics by names that say which attacks an error is by.

    Results contain errors by any attacks of the AutoAttack package as `test/autoattack_error`, and
    the attacks beside them. What compares runs must not take one for the other.

    Example:
        >>> name = "test/autoattack_error"
        >>> renamed = with_attacks({name: 0.5}, {name: "apgd-ce+apgd-t"})
        >>> renamed, metric(next(iter(renamed))).title
        ({'test/apgd-ce+apgd-t_error': 0.5}, 'RErr (APGD-CE + APGD-T), test')
    """

    def own(name: str) -> str:
        attack = attacks.get(name.removesuffix("_early_stopped"), "autoattack")
        return name.replace("/autoattack_error", f"/{attack}_error")

    return {own(name): value for name, value in metrics.items()}


def is_by_other_attacks(name: str) -> bool:
    """Whether a metric is a robust error by other attacks of the package than `standard`."""
    attacks = name.rsplit("/", 1)[-1].removesuffix("_error").split("+")
    return name.endswith("_error") and set(attacks) <= set(_ATTACKS)


def errors_by_other_attacks(names: Iterable[str]) -> dict[str, str]:
    """The test errors by other attacks of the package than `standard`, with the attacks.

    Example:
        >>> errors_by_other_attacks(["test/error", "test/apgd-ce+square_error"])
        {'test/apgd-ce+square_error': 'APGD-CE + Square'}
    """
    own = sorted({name for name in names if name.startswith("test/") and is_by_other_attacks(name)})
    return {name: metric(name).label.removeprefix("RErr (")[:-1] for name in own}


def method_label(method: str) -> str:
    """A method's name as the paper writes it.

    Example:
        >>> method_label("at_awp"), method_label("my_method")
        ('AT-AWP', 'my_method')
    """
    return METHOD_LABELS.get(method, method)


def method_of(name: str) -> str:
    """The method that a run is of: what `--model TRADES` trains is of the same as `trades.yaml`.

    Example:
        >>> method_of("TRADES"), method_of("ATAWP"), method_of("my_method")
        ('trades', 'at_awp', 'my_method')
    """
    return _ROWS.get(name, name)


def _default(key: str) -> Metric:
    if is_by_other_attacks(key):
        label = " + ".join(_ATTACKS[attack] for attack in key.removesuffix("_error").split("+"))
        return Metric(key, f"RErr ({label})", "%", once=True, in_tables=True)
    is_error = key.endswith("error")
    lower = True if is_error or key.endswith("loss") else None
    return Metric(key, key, "%" if is_error else "", lower_is_better=lower)


def series(rows: Rows, name: str) -> list[tuple[float, float]]:
    """Returns the epochs and the finite values of a metric in the rows of a run.

    Example:
        >>> series([{"epoch": 1, "val/error": 0.5}, {"epoch": 0}], "val/error")
        [(1, 0.5)]
    """
    pairs = ((row["epoch"], row.get(name)) for row in rows)
    return sorted((e, value) for e, value in pairs if value is not None and math.isfinite(value))


def logged_split(rows: Rows) -> str | None:
    """Returns the first of `test`, `val` and `train` with flatness and robust loss in one epoch.

    Example:
        >>> logged_split([{"epoch": 0, "flatness/average/val": 0.1, "val/robust_loss": 2.0}])
        'val'
    """
    for split, loss in LOSSES.items():
        losses = dict(series(rows, loss))
        if any(epoch in losses for epoch, _ in series(rows, f"flatness/average/{split}")):
            return split
    return None
