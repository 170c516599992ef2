"""The command line: `python cli.py fit --model ATAWP`, or `robust-flatness fit --model ATAWP`."""

import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from robust_flatness.callbacks import Results
from robust_flatness.configs.commands import run_command
from robust_flatness.configs.components import (
    DEFAULT_CALLBACKS,
    LEAVABLE,
    ONLY_IN_FIT,
    OPTIONAL_CALLBACKS,
    known_classes,
)
from robust_flatness.configs.compose import DEFAULTS, EXTERNAL, compose, run_folder_of
from robust_flatness.configs.parser import Parser
from robust_flatness.lightning_modules.loading import class_written
from robust_flatness.loggers import EpochCSVLogger, make_wandb_logger

for message in (".*LeafSpec.*", ".*does not have many workers.*"):
    # Said by Lightning about itself, and about data that is in memory already.
    warnings.filterwarnings("ignore", message=message)
# Lightning's advertisement of a logger, in every run.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "litlogger" not in record.getMessage()
)

# Functions beside `fit` and `test`, which these need not wait for.
COMMANDS = {
    "study": "robust_flatness.study.command:study",
    "report": "robust_flatness.reporting.command:report",
    "dashboard": "robust_flatness.reporting.dashboard_command:dashboard",
}

# What is raised where arguments or the machine are not as they should be.
REFUSALS = (ValueError, OSError, MisconfigurationException)


class CLI(LightningCLI):
    """LightningCLI with run folders, default measures, and arguments in any order."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `test`; nothing is validated or predicted outside callbacks."""
        both = LightningCLI.subcommands()
        return {name: both[name] for name in ("fit", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the default callbacks and links what the data knows into the model."""
        for name in ("num_classes", "in_channels", "mean", "std"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for name, callback in DEFAULT_CALLBACKS.items():
            skip = {"dataset", "datasets", "normalization"}
            parser.add_class_arguments(callback, name, skip=skip, fail_untyped=False)
        for name, callback in OPTIONAL_CALLBACKS.items():
            text = f"{callback.__name__}, where one of its arguments is set, as --{name}.ARGUMENT."
            parser.add_argument(f"--{name}", type=callback | None, default=None, help=text)
        parser.add_argument(
            "--without",
            type=list[str] | str,
            default=[],
            help=f"What to leave out of {', '.join(LEAVABLE)}: --without=[autoattack,wandb].",
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the method in run folder, figures and W&B group: the model's by default.",
        )
        parser.add_argument(
            "--folder",
            type=str | None,
            default=None,
            help="Run folder, which must not exist: runs/<method>-<data>-s<seed> by default.",
        )
        parser.add_argument("--project", type=str, default="robust-flatness", help="W&B project.")
        parser.add_argument("--group", type=str | None, default=None, help="W&B group.")
        text = "Whether W&B keeps the checkpoints as artifacts when training has ended."
        parser.add_argument("--log_checkpoints", action="store_true", help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Puts presets, files and options into one order first."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            if arguments and arguments[0] in self.subcommands():
                arguments = compose(arguments, known_classes())
            elif not {"-h", "--help"} & set(arguments):
                commands = ", ".join([*self.subcommands(), *COMMANDS])
                came = arguments[0] if arguments else "nothing"
                raise ValueError(f"Expected one of {commands} to come first but got {came}.")
        except ValueError as error:
            parser.error(str(error))
        self.config = parser.parse_args(arguments)

    def before_instantiate_classes(self) -> None:
        """Checks names, and lets `test` leave the run's config.yaml alone."""
        if self._external and self.subcommand == "fit":
            self.parser.error("Expected `test` for External, which is only measured, but got fit.")
        if self.config[self.subcommand].trainer.max_epochs == 0:
            # Found later, it would leave an empty run on W&B.
            self.parser.error("Expected `--trainer.max_epochs` to be >= 1 but got 0.")
        name = self.config[self.subcommand].name
        if name is not None and Path(name).name != name:
            self.parser.error(f"Expected `--name` to be a folder's name but got {name!r}.")
        unknown = self._left_out() - set(LEAVABLE)
        if unknown:
            self.parser.error(
                f"Expected `--without` to name some of {', '.join(LEAVABLE)} but got "
                f"{', '.join(sorted(unknown))}."
            )
        if self.subcommand == "test":
            self.save_config_callback = None

    def _parse_ckpt_path(self) -> None:
        """Checks the checkpoint's class; its settings come from its run's config.yaml."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if not path and self.config.subcommand == "test" and not self._external:
            self.parser.error("Expected `--ckpt_path` to name a checkpoint to test but got none.")
        if not path:
            return
        # Lightning would go on with an untrained network where it finds no `last` or `best`.
        if not Path(path).is_file():
            self.parser.error(f"Expected `--ckpt_path` to be a checkpoint file but got {path}.")
        try:
            written = class_written(path, "--ckpt_path")
        except ValueError as error:
            self.parser.error(str(error))
        asked = self.config[self.config.subcommand].model.class_path.rsplit(".", 1)[-1]
        if written is not None and written != asked:
            self.parser.error(
                f"Expected `--ckpt_path` to be a checkpoint of {asked} but {path} is one of "
                f"{written}."
            )
        if run_folder_of(path) is None:
            super()._parse_ckpt_path()

    @property
    def _external(self) -> bool:
        path = str(self.config[self.config.subcommand].model.class_path)
        return path.rsplit(".", 1)[-1] == EXTERNAL

    def instantiate_classes(self) -> None:
        """Builds everything; bad arguments end in one sentence."""
        self._folder: Path | None = None
        try:
            super().instantiate_classes()
        except REFUSALS as error:
            self._refuse(error)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; what is found to be wrong before anything is trained ends in one sentence."""
        try:
            super()._run_subcommand(subcommand)
        except REFUSALS as error:
            if self.trainer.global_step > 0:
                raise
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        if self._folder is not None:
            # Nothing was trained: an empty folder would only push the next run to another name.
            shutil.rmtree(self._folder, ignore_errors=True)
        self.parser.error(str(error))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the trainer its run folder, loggers and the default callbacks."""
        trainer = self.config_init[self.subcommand].trainer
        own = trainer.callbacks or []
        own = own if isinstance(own, list) else [own]
        bars = any(isinstance(callback, ProgressBar) for callback in own)
        if trainer.enable_progress_bar is not False and not bars:
            own = [RichProgressBar(), *own]
        trainer.callbacks = [*own, *self._default_callbacks()]
        return super().instantiate_trainer(logger=self._loggers(), **kwargs)

    def _default_callbacks(self) -> list[Callback]:
        config = self.config_init[self.subcommand]
        left_out = self._left_out()
        if "early_stopping" in left_out:
            left_out.add("best_checkpoint")
        if config.trainer.enable_checkpointing is False:
            left_out |= {"best_checkpoint", "last_checkpoint"}
        if self.subcommand == "test":
            left_out |= set(ONLY_IN_FIT)
        optional = [config[name] for name in OPTIONAL_CALLBACKS if config[name] is not None]
        chosen = [config[name] for name in DEFAULT_CALLBACKS if name not in left_out]
        results = Results(settings=self.config_dump, method=self.method)
        for drawn in (config.trajectory, config.landscape):
            if drawn is not None:
                drawn.method = self.method
        return [*optional, *chosen, results]

    @property
    def method(self) -> str:
        """What the run is of: its name, by default the model's class."""
        return self.config[self.subcommand].name or type(self.model).__name__

    def _left_out(self) -> set[str]:
        without = self.config[self.subcommand].without
        return {without} if isinstance(without, str) else set(without)

    def _loggers(self) -> list[Logger] | bool:
        """The run's own table, and W&B unless the user named other loggers.

        `test` measures the end of a run once more: in W&B that would be one more epoch.
        """
        config = self.config_init[self.subcommand]
        if config.trainer.fast_dev_run:
            return False
        folder, given = self.run_folder(), config.trainer.logger
        self._folder = None if folder.exists() else folder
        table = EpochCSVLogger(folder)
        table.recording = self.subcommand == "fit"
        if isinstance(given, Logger):
            return [table, given]
        if isinstance(given, list):
            return [table, *given]
        if given is False or self.subcommand == "test" or "wandb" in self._left_out():
            return [table]
        wandb_logger = make_wandb_logger(
            folder,
            project=config.project,
            name=folder.name,
            group=config.group or self.method,
            config=self.config_dump,
            log_model=config.log_checkpoints,
        )
        return [table, wandb_logger]

    def run_folder(self) -> Path:
        """The checkpoint's run folder, else a new `runs/<method>-<data>-s<seed>`.

        Rank 0 alone decides: other ranks learn it through `trainer.log_dir`.
        """
        config = self.config[self.subcommand]
        resumed = run_folder_of(config.get("ckpt_path"))
        if resumed is not None:
            return resumed
        if config.folder is not None:
            return self._new_folder(Path(config.folder).expanduser().resolve())
        stem = f"{self.method}-{type(self.datamodule).__name__}-s{config.seed_everything}"
        # Absolute, as ModelCheckpoint forgets its best score where its folder's name changes.
        root = Path(config.trainer.default_root_dir or "runs").expanduser().resolve()
        folder, number = root / stem, 1
        while folder.exists() and getattr(rank_zero_only, "rank", 0) == 0:
            number += 1
            folder = root / f"{stem}-{number}"
        return folder

    @staticmethod
    def _new_folder(folder: Path) -> Path:
        if folder.exists() and getattr(rank_zero_only, "rank", 0) == 0:
            raise ValueError(f"Expected `--folder` to be a new folder but {folder} exists.")
        return folder


def main(args: Sequence[str] | None = None, cli_class: type[CLI] = CLI) -> None:
    """Runs the command line.

    Args:
        args: Arguments; `None` takes those of the process.
        cli_class: What `fit` and `test` are built by.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments == ["--version"]:
        print(f"robust-flatness {version('robust-flatness')}")
        return
    if arguments and arguments[0] in COMMANDS:
        run_command(resolve_name(COMMANDS[arguments[0]]), arguments)
        return
    cli_class(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={
            **{name: {"default_config_files": [str(DEFAULTS)]} for name in CLI.subcommands()},
            # A share of a name would also be a misspelt one.
            "allow_abbrev": False,
            "epilog": f"Also, with a --help of their own: {', '.join(COMMANDS)}. And: --version.",
        },
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
