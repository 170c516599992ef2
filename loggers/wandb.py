"""Weights & Biases: offline without an API key, and `epoch` as the axis of every chart.

Example:
    A run that is recorded in `runs/at-digits-s0/wandb`, and continues there if it is resumed::

        folder = "runs/at-digits-s0"
        logger = make_wandb_logger(folder, project="robust-flatness", name="at-digits-s0")
        Trainer(logger=[EpochCSVLogger(folder), logger], callbacks=[Trajectory()])
"""

import math
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.table import Table
from typing_extensions import override

from robust_flatness.run_folder.metrics import metric

# Names with these prefixes are logged once an epoch. All others keep Lightning's axis, the global
# step.
EPOCH_PREFIXES = (
    *("train/", "train_eval/", "val/", "test/", "flatness/", "hessian/", "awp/"),
    *("single_step/", "gradient/"),
    *("final/", "early_stopped/", "figures/"),
)


class EpochWandbLogger(WandbLogger):
    """Lightning's logger with `epoch` as the x-axis of what is logged once an epoch.

    The summary of such a metric has its best and its last value, such as `val/robust_error.min` and
    `val/robust_error.last`. Metrics of the end of a run have one value.

    Args:
        *args: As for `WandbLogger`.
        checkpoints: Folder whose checkpoints become artifacts after training. Lightning's own
            `log_model` calls the newest checkpoint of each `ModelCheckpoint` the best, and forgets
            those of a run that was cut off after its last epoch.
        run_id_file: Where the id of the W&B run is written when it is opened.
        **kwargs: As for `WandbLogger`.
    """

    def __init__(
        self,
        *args: Any,
        checkpoints: Path | None = None,
        run_id_file: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._run_id_file = checkpoints, run_id_file
        self._held: list[Callable[[], None]] | None = None
        self._uploaded: set[tuple[Path, float]] = set()
        self._defined: set[str] = set()
        # Lightning always passes it, and W&B then warns about it in every run.
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)

    def hold(self) -> None:
        """Keeps what is logged until `release`, so that a run that is refused is not opened."""
        self._held = []

    @rank_zero_only
    def release(self) -> None:
        """Opens the W&B run and logs what `hold` kept.

        Raises:
            ValueError: If W&B cannot open it.
        """
        held, self._held = self._held or [], None
        _ = self.experiment
        for log in held:
            log()

    @property
    @override
    def experiment(self) -> Any:
        """The W&B run. The first access opens it, also between `hold` and `release`."""
        if self._held is not None:
            self.release()
        if self._experiment is not None or getattr(rank_zero_only, "rank", 0) != 0:
            return super().experiment
        import wandb

        try:
            run = super().experiment
        except wandb.errors.Error as error:
            raise ValueError(
                f"Expected Weights & Biases to open a run but got: {error}. WANDB_MODE=offline "
                "records it here, and --without=wandb does without."
            ) from error
        if self._run_id_file is not None and self._id is not None:
            self._run_id_file.parent.mkdir(parents=True, exist_ok=True)
            self._run_id_file.write_text(f"{self._id}\n", encoding="utf-8")
        return run

    def __getstate__(self) -> dict[str, Any]:
        # Lightning's opens the run, so that spawned processes attach to it.
        return dict(self.__dict__) if self._held is not None else super().__getstate__()

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Adds settings to the run's config."""
        if self._held is not None:
            self._held.append(partial(self.log_hyperparams, params))
        else:
            super().log_hyperparams(params)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs values by name, with `epoch` if they belong to one; defines axes of new names."""
        if self._held is not None:
            self._held.append(partial(self.log_metrics, dict(metrics), step))
            return
        # Patterns such as `test/*` do not work: Lightning defines `*`, and if two match, W&B takes
        # either by chance (with wandb 0.31, 17 of 40 names got the more specific one).
        for name in metrics.keys() - self._defined:
            # Lightning adds `_step` to the name of the values of a batch.
            if name.startswith(EPOCH_PREFIXES) and not name.endswith("_step"):
                summary = None if name.startswith("figures/") else metric(name).summary
                self.experiment.define_metric(name, step_metric="epoch", summary=summary)
            self._defined.add(name)
        super().log_metrics(metrics, step)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Logs the checkpoints as versions of one artifact if `status` is `success`."""
        super().finalize(status)
        if status != "success" or self._checkpoints is None or self._experiment is None:
            return
        import wandb

        with warn_on_failure("send the checkpoints to Weights & Biases"):
            written = {(p, p.stat().st_mtime) for p in self._checkpoints.glob("*.ckpt")}
            # The newest comes last, because `latest` is the version that was logged last. A logger
            # may see the end of more than one `fit` or `test`.
            for path, time in sorted(written - self._uploaded, key=lambda pair: pair[::-1]):
                artifact = wandb.Artifact(
                    f"model-{self.version}", type="model", metadata={"original_filename": path.name}
                )
                # The name that Lightning's `download_artifact` expects.
                artifact.add_file(str(path), name="model.ckpt")
                self.experiment.log_artifact(artifact, aliases=["latest", path.stem])
                self._uploaded.add((path, time))


def make_wandb_logger(
    folder: str | Path,
    *,
    project: str,
    name: str,
    group: str | None = None,
    tags: Sequence[str] = (),
    entity: str | None = None,
    config: Mapping[str, Any] | None = None,
    log_model: bool = False,
) -> EpochWandbLogger:
    """Makes a logger that writes to `<folder>/wandb` and never asks the user.

    Rank 0 decides whether the run is offline: if `WANDB_MODE` says so, or if there is no API key
    that can be checked. The id of the W&B run is kept in `<folder>/wandb/run_id`, so that a resumed
    run continues it. Other ranks use neither the network nor the disk.

    Args:
        folder: The run folder.
        project: The W&B project.
        name: The name of the run.
        group: The W&B group, such as the method.
        tags: Tags of the run.
        entity: The W&B user or team, by default that of the API key.
        config: All settings of the run.
        log_model: Whether the files in `<folder>/checkpoints` become versions of the artifact
            `model-<id>` at the end of training, each with its name as an alias, such as `best`.

    Returns:
        The logger. Its W&B run opens when it is first used.

    Raises:
        ValueError: If W&B refuses a setting, or has no folder that it can write to.
    """
    settings: dict[str, Any] = {"group": group, "tags": list(tags), "entity": entity}
    settings["resume"] = "allow"
    if getattr(rank_zero_only, "rank", 0) == 0:
        # Imported late: other projects, which load the callbacks, make their own loggers.
        from robust_flatness.loggers.wandb_login import check_settings, offline_mode, why_no_login

        path = Path(folder) / "wandb" / "run_id"
        # A new id does not use the random generators that training is seeded with.
        run_id = path.read_text(encoding="utf-8").strip() if path.exists() else secrets.token_hex(4)
        if os.environ.get("WANDB_SWEEP_ID"):
            # W&B accepts no other id from an agent of a sweep.
            run_id = os.environ.get("WANDB_RUN_ID") or run_id
        settings |= {"id": run_id, "run_id_file": path, "config": dict(config or {})}
        check_settings(project=project, run_id=run_id, run_tags=settings["tags"])
        # `WandbLogger(offline=True)` would set `WANDB_MODE` for all later runs of the process.
        if not offline_mode() and (reason := why_no_login()):
            settings["mode"] = "offline"
            print(
                f"Weights & Biases {reason}, so the run is recorded offline. To upload it: "
                f"wandb sync {folder}/wandb/offline-run-*"
            )
        if offline_mode() or "mode" in settings:
            # It would repeat at both ends where the run is.
            settings["settings"] = {"silent": True}
    if log_model:
        settings["checkpoints"] = Path(folder) / "checkpoints"
    return EpochWandbLogger(name=name, save_dir=folder, project=project, **settings)


def log_trajectory(
    logger: WandbLogger,
    rows: Sequence[Mapping[str, float]],
    images: Mapping[str, Path],
    names: tuple[str, str] = ("flatness/average/test", "test/robust_loss"),
) -> None:
    """Logs the path of a run through flatness and robust loss (Fig. 5 of the paper).

    The table `trajectory_table` has the columns `epoch`, `flatness` and `robust_loss`. The chart
    `trajectory` shows it in W&B without any set-up.

    Args:
        logger: Any W&B logger of Lightning.
        rows: Rows of `EpochCSVLogger`. Those without both metrics are not in the table.
        images: Image files, logged as `figures/<name>`.
        names: The metrics of flatness and robust loss.
    """
    import wandb

    points = trajectory_points(rows, names)
    content: dict[str, Any] = {
        f"figures/{name}": wandb.Image(str(path)) for name, path in images.items()
    }
    if points:
        table = wandb.Table(columns=["epoch", "flatness", "robust_loss"], data=points)
        flatness, loss = (metric(name).title for name in names)
        title = f"{flatness} (x) and {loss} (y)"
        content["trajectory"] = wandb.plot.scatter(table, "flatness", "robust_loss", title=title)
    if content:
        logger.log_metrics({**content, "epoch": rows[-1]["epoch"]})


def trajectory_points(
    rows: Sequence[Mapping[str, float]], names: tuple[str, str]
) -> list[list[float]]:
    """Epoch, flatness and robust loss of the rows that have both, as finite numbers."""
    points = [[row.get(name, math.nan) for name in ("epoch", *names)] for row in rows]
    return [point for point in points if all(map(math.isfinite, point))]


def log_summary(logger: WandbLogger, table: Table, epoch: int) -> None:
    """Logs the table that a run prints at its last `epoch` as the W&B table `summary_table`."""
    import wandb

    headers: list[str | int] = [
        " ".join(str(column.header).split()) or "figure" for column in table.columns
    ]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    content = wandb.Table(columns=headers, data=[list(row) for row in rows])
    logger.log_metrics({"summary_table": content, "epoch": epoch})  # type: ignore[dict-item]


@contextmanager
def warn_on_failure(action: str) -> Iterator[None]:
    """Turns an exception of an `action` into a warning, if no result depends on it.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught, warn_on_failure("draw"):
        ...     raise OSError("disk full")
        >>> str(caught[0].message)
        'The run goes on, but it could not draw: OSError: disk full'
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
        rank_zero_warn(f"The run goes on, but it could not {action}: {reason}", stacklevel=4)
