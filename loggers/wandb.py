"""Weights & Biases without questions: offline without a key, `epoch` as the axis of every chart.

Example:
    A run that is recorded in `runs/at-digits-s0/wandb`, and goes on there when it is resumed::

        folder = "runs/at-digits-s0"
        logger = make_wandb_logger(folder, project="robust-flatness", name="at-digits-s0")
        Trainer(logger=[EpochCSVLogger(folder), logger], callbacks=[Trajectory()])
"""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from typing_extensions import override

from robust_flatness.loggers.failures import warn_on_failure
from robust_flatness.loggers.wandb_login import offline_mode, why_no_login
from robust_flatness.loggers.wandb_settings import check_settings, run_id

# What a run logs once an epoch; everything else keeps Lightning's axis, the global step.
EPOCH_PREFIXES = (
    "train/",
    "train_eval/",
    "val/",
    "test/",
    "flatness/",
    "hessian/",
    "awp/",
    "final/",
    "early_stopped/",
    "figures/",
)
# What stands at the end of a run only has one value, which needs no minimum beside it.
_FINAL = ("final/", "early_stopped/", "figures/", "test/autoattack", "train/autoattack")


class EpochWandbLogger(WandbLogger):
    """Lightning's logger with `epoch` as the x-axis of what is logged once an epoch.

    The summary of such a figure holds its minimum and its last value, as `val/robust_error.min` and
    `val/robust_error.last`; figures of the end of a run stand in the summary as they are.

    Each name is defined in full when it is first logged. Patterns such as `test/*` would not do:
    Lightning defines `*`, and where two patterns fit, W&B takes either of them by chance (with
    wandb 0.31, 17 of 40 names got the more specific one).

    Args:
        *args: As for `WandbLogger`.
        checkpoints: Folder whose checkpoints become artifacts once training has ended. Lightning's
            own `log_model` calls the newest checkpoint of each `ModelCheckpoint` the best, and
            forgets those of a run that was cut off after its last epoch.
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
        self._uploaded: dict[Path, float] = {}
        # Lightning passes it on also where nobody asked for it, and W&B warns of it in every run.
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)
        self._defined: set[str] = set()

    def hold(self) -> None:
        """Keeps what is logged until `release`, so that a start that is refused opens no run."""
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
        """The W&B run. It is opened when it is first asked for, also while figures are held."""
        if self._held is not None:
            self.release()
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            return self._opened()
        return super().experiment

    def _opened(self) -> Any:
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
        # Lightning's opens the run, so that processes that are spawned attach to it.
        return dict(self.__dict__) if self._held is not None else super().__getstate__()

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Adds settings to the run's config.

        Args:
            params: The settings.
        """
        if self._held is not None:
            self._held.append(lambda: self.log_hyperparams(params))
            return
        super().log_hyperparams(params)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs figures, after their axis and summary have been defined.

        Args:
            metrics: Names and values, `epoch` among them where they belong to one.
            step: The global step.
        """
        if self._held is not None:
            kept = dict(metrics)
            self._held.append(lambda: self.log_metrics(kept, step))
            return
        for name in metrics.keys() - self._defined:
            # Lightning's `…_step` is the value of a batch.
            if name.startswith(EPOCH_PREFIXES) and not name.endswith("_step"):
                summary = None if name.startswith(_FINAL) else "min,last"
                self.experiment.define_metric(name, step_metric="epoch", summary=summary)
            self._defined.add(name)
        super().log_metrics(metrics, step)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Logs the checkpoints as versions of one artifact, if training ended well.

        Args:
            status: `success`, or how else it ended.
        """
        super().finalize(status)
        if status == "success" and self._checkpoints is not None and self._experiment is not None:
            with warn_on_failure("send the checkpoints to Weights & Biases"):
                self._log_checkpoints(self._checkpoints)

    def _log_checkpoints(self, folder: Path) -> None:
        import wandb

        written = {path: path.stat().st_mtime for path in folder.glob("*.ckpt")}
        # The newest comes last, as `latest` goes to the version that was logged last.
        for path in sorted(written, key=lambda path: written[path]):
            # A logger may see the end of more than one `fit` or `test`.
            if self._uploaded.get(path) == written[path]:
                continue
            artifact = wandb.Artifact(
                f"model-{self.version}", type="model", metadata={"original_filename": path.name}
            )
            # Lightning's name for it, which follows its `download_artifact`.
            artifact.add_file(str(path), name="model.ckpt")
            self.experiment.log_artifact(artifact, aliases=["latest", path.stem])
            self._uploaded[path] = written[path]


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
    """Builds a logger that writes to `<folder>/wandb` and never asks a question.

    Rank 0 decides whether the run is offline: where `WANDB_MODE` says so, where there is no API
    key, and where the key cannot be checked. The id of the W&B run is kept in
    `<folder>/wandb/run_id` once the run is open, so that a resumed run goes on in the same one.
    Other ranks neither touch the network nor create a folder.

    Args:
        folder: The run folder.
        project: The W&B project.
        name: The name of the run.
        group: What the run is grouped under, such as the method.
        tags: Tags of the run.
        entity: The W&B user or team, by default that of the key.
        config: All settings of the run.
        log_model: Whether the files in `<folder>/checkpoints` become versions of the artifact
            `model-<id>` at the end of training, each with its name as an alias, such as `best`.

    Returns:
        The logger. Its W&B run starts when it is first used, before training.

    Raises:
        ValueError: If W&B takes no such name, or has no folder that it can write to.
    """
    settings: dict[str, Any] = {
        "group": group,
        "tags": list(tags),
        "entity": entity,
        "resume": "allow",
    }
    if getattr(rank_zero_only, "rank", 0) == 0:
        path = Path(folder) / "wandb" / "run_id"
        settings |= {"id": run_id(path), "run_id_file": path, "config": dict(config or {})}
        check_settings(project=project, run_id=settings["id"], run_tags=settings["tags"])
        # `WandbLogger(offline=True)` would set `WANDB_MODE` for the whole process, and thereby for
        # all runs that follow in it.
        if not offline_mode() and (reason := why_no_login()):
            settings["mode"] = "offline"
            print(
                f"Weights & Biases {reason}, so the run is recorded offline. To upload it: "
                f"wandb sync {folder}/wandb/offline-run-*"
            )
    if log_model:
        settings["checkpoints"] = Path(folder) / "checkpoints"
    return EpochWandbLogger(name=name, save_dir=folder, project=project, **settings)


def log_trajectory(
    logger: WandbLogger,
    rows: Sequence[Mapping[str, float]],
    images: Mapping[str, Path],
    names: tuple[str, str] = ("flatness/average/test", "test/robust_loss"),
) -> None:
    """Sends the path of a run through flatness and robust loss (Fig. 5 of the paper) to W&B.

    The table `trajectory_table` has the columns `epoch`, `flatness` and `robust_loss`; the chart
    `trajectory` draws it in the dashboard without anyone setting it up.

    Args:
        logger: Any W&B logger of Lightning.
        rows: Rows of `EpochCSVLogger`. Those without both figures are left out of the table.
        images: Image files, logged as `figures/<name>`.
        names: The metrics that are flatness and robust loss.
    """
    import wandb

    points = [[row.get(name, math.nan) for name in ("epoch", *names)] for row in rows]
    points = [point for point in points if all(map(math.isfinite, point))]
    content: dict[str, Any] = {
        f"figures/{name}": wandb.Image(str(path)) for name, path in images.items()
    }
    if points:
        table = wandb.Table(columns=["epoch", "flatness", "robust_loss"], data=points)
        title = "Average-case flatness (x) and robust test loss (y)"
        if names[1] != "test/robust_loss":
            title = f"{names[0]} (x) and {names[1]} (y)"
        content["trajectory"] = wandb.plot.scatter(table, "flatness", "robust_loss", title=title)
    if content:
        logger.log_metrics({**content, "epoch": rows[-1]["epoch"]})


def log_summary(logger: WandbLogger, table: Table, epoch: int) -> None:
    """Shows the table that a run ends with on the run's page, as the W&B table `summary_table`.

    Args:
        logger: Any W&B logger of Lightning.
        table: What `summary_table` made of the run's results.
        epoch: The last epoch.
    """
    import wandb

    headers: list[str | int] = [
        " ".join(str(column.header).split()) or "figure" for column in table.columns
    ]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    content = wandb.Table(columns=headers, data=[list(row) for row in rows])
    logger.log_metrics({"summary_table": content, "epoch": epoch})  # type: ignore[dict-item]
