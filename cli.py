"""The command line: `python cli.py fit --model ATAWP`, or `robust-flatness fit --model ATAWP`."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from robust_flatness.configs.environment import check_environment

check_environment()

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from torch.multiprocessing.spawn import ProcessRaisedException

from robust_flatness.callbacks import Results
from robust_flatness.configs.checkpoints import check_start, check_weights
from robust_flatness.configs.checks import (
    LINKED,
    check_linked,
    check_settings,
    left_out,
)
from robust_flatness.configs.claimed_folder import RunFolder, claim_first, is_first_process
from robust_flatness.configs.commands import run_command
from robust_flatness.configs.components import (
    DEFAULT_CALLBACKS,
    LEAVABLE,
    ONLY_IN_FIT,
    OPTIONAL_CALLBACKS,
    known_classes,
)
from robust_flatness.configs.compose import DEFAULTS, compose, run_folder_of
from robust_flatness.configs.normalization import hand_on_normalization
from robust_flatness.configs.options import read_options
from robust_flatness.configs.parser import Parser, refusing, set_known, told
from robust_flatness.configs.run_start import RunStart, check_monitors
from robust_flatness.configs.signals import interrupted_status, resume_command, sigterm_exits
from robust_flatness.datamodules import RobustDataModule
from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.loggers import EpochCSVLogger, EpochWandbLogger, make_wandb_logger
from robust_flatness.run_folder.checkpoint_io import AtomicCheckpointIO

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
SPAWNED_REFUSALS = [
    "ValueError",
    f"{MisconfigurationException.__module__}.{MisconfigurationException.__name__}",
]


class CLI(LightningCLI):
    """LightningCLI with run folders, default measures, and arguments in any order."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`fit` and `test`; nothing is validated or predicted outside callbacks."""
        both = LightningCLI.subcommands()
        return {name: both[name] for name in ("fit", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the default callbacks and links what the data knows into the model."""
        for name in LINKED:
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
        """Puts presets, files and options into one order first, and checks what came out."""
        arguments = list(sys.argv[1:] if args is None else args)
        self._typed = read_options(arguments[1:])
        with refusing(parser, arguments[1:]):
            if arguments and arguments[0] in self.subcommands():
                arguments = compose(arguments, known_classes())
                self._settings = yaml.safe_load(arguments[2])
                set_known(parser, self._parser(arguments[0]), self._settings)
            elif not {"-h", "--help"} & set(arguments):
                commands = ", ".join([*self.subcommands(), *COMMANDS])
                came = arguments[0] if arguments else "nothing"
                raise ValueError(f"Expected one of {commands} to come first but got {came}.")
            self.config = parser.parse_args(arguments)
            check_settings(self.config[self.config.subcommand], self.config.subcommand)

    def before_instantiate_classes(self) -> None:
        """Lets `test` leave the run's config.yaml alone."""
        if self.subcommand == "test":
            self.save_config_callback = None

    def _parse_ckpt_path(self) -> None:
        """Checks the checkpoint; its settings are those of the configuration already."""
        with refusing(self.parser):
            self._saved = check_start(self.config[self.config.subcommand], self.config.subcommand)

    def instantiate_classes(self) -> None:
        """Builds everything; bad arguments end in one sentence."""
        self._folder: RunFolder | None = None
        self._wandb_logger: EpochWandbLogger | None = None
        config = self.config[self.subcommand]
        try:
            super().instantiate_classes()
            check_linked(config, self._settings, self._typed, self.datamodule)
            if isinstance(self.datamodule, RobustDataModule) and self.trainer is not None:
                # Before there are processes that would wait for each other.
                size = self.datamodule.batch_size
                GlobalBatches(size, self.trainer.world_size, 0, 0).check(size)
            if self._saved is not None:
                check_weights(self.model, self._saved, config.ckpt_path)
        except Exception as error:
            self._refuse(ValueError(told(error)))
        except BaseException:
            self._discard()
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; what is found to be wrong before anything is trained ends in one sentence."""
        try:
            super()._run_subcommand(subcommand)
        except REFUSALS as error:
            if self._has_started:
                self._end_processes()
                raise
            self._refuse(error)
        except ProcessRaisedException as error:
            # Of a process of `ddp_spawn`: its traceback, which ends in the sentence.
            kind, _, said = str(error).strip().splitlines()[-1].partition(": ")
            if self._folder is None or not self._folder.is_unused or kind not in SPAWNED_REFUSALS:
                raise
            self._refuse(ValueError(said))
        except BaseException as error:
            self._discard()
            status = interrupted_status(error)
            # Lightning kills all processes if one of the others has a status that is not 0.
            if status is None or not is_first_process():
                raise
            if self._folder is not None and (command := resume_command(self._folder.path)):
                print(f"To resume the run: {command}", file=sys.stderr)
            sys.exit(status)

    @property
    def _has_started(self) -> bool:
        starts = [c for c in self.trainer.callbacks if isinstance(c, RunStart)]  # type: ignore[attr-defined]
        return any(start.already_saved for start in starts)

    def _refuse(self, error: Exception) -> NoReturn:
        self._discard()
        self.parser.error(str(error))

    def _end_processes(self) -> None:
        """Ends the processes that this one started, which would wait for it."""
        launcher = self.trainer.strategy.launcher if hasattr(self, "trainer") else None
        if isinstance(launcher, _Launcher):
            launcher.kill(signal.SIGKILL)

    def _discard(self) -> None:
        self._end_processes()
        if self._folder is not None:
            # An empty folder would only push the next run to another name.
            self._folder.discard()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the trainer its run folder, loggers and the default callbacks."""
        trainer = self.config_init[self.subcommand].trainer
        own = trainer.callbacks or []
        own = own if isinstance(own, list) else [own]
        bars = any(isinstance(callback, ProgressBar) for callback in own)
        if trainer.enable_progress_bar is not False and not bars:
            own = [RichProgressBar(), *own]
        trainer.callbacks = [*own, *self._default_callbacks()]
        hand_on_normalization(self.datamodule, self.model, trainer.callbacks)
        built = super().instantiate_trainer(logger=self._loggers(), **kwargs)
        callbacks: list[Callback] = built.callbacks  # type: ignore[attr-defined]
        for start in [c for c in callbacks if isinstance(c, RunStart)]:
            # First, so that no other callback does anything before it.
            callbacks.remove(start)
            callbacks.insert(0, start)
            start.wandb_logger = self._wandb_logger
        strategy = built.strategy
        # A plugin of the user's own, or of a strategy that needs another one, stays.
        if strategy._checkpoint_io is None and type(strategy.checkpoint_io) is TorchCheckpointIO:
            saves = built.loggers and self.subcommand == "fit"
            folder = Path(built.loggers[0].save_dir or "", "checkpoints") if saves else None
            strategy.checkpoint_io = AtomicCheckpointIO(folder)
        if self.subcommand == "fit":
            check_monitors(built, self.model)
        return built

    def _default_callbacks(self) -> list[Callback]:
        config = self.config_init[self.subcommand]
        left_out = self._left_out()
        if "early_stopping" in left_out and config.best_checkpoint.monitor == "val/robust_error":
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
        return left_out(self.config[self.subcommand])

    def _loggers(self) -> list[Logger] | bool:
        """The run's own table, and W&B unless the user named other loggers.

        `test` measures the end of a run once more: in W&B that would be one more epoch.
        """
        config = self.config_init[self.subcommand]
        if config.trainer.fast_dev_run:
            return False
        self._folder, given = self.run_folder(), config.trainer.logger
        folder = self._folder.path
        table = EpochCSVLogger(folder)
        table.recording = self.subcommand == "fit"
        table.hold()
        if isinstance(given, Logger):
            return [table, given]
        if isinstance(given, list):
            return [table, *given]
        if given is False or self.subcommand == "test" or "wandb" in self._left_out():
            return [table]
        self._wandb_logger = make_wandb_logger(
            folder,
            project=config.project,
            name=folder.name,
            group=config.group or self.method,
            config=self.config_dump,
            log_model=config.log_checkpoints,
        )
        self._wandb_logger.hold()
        return [table]

    def run_folder(self) -> RunFolder:
        """The checkpoint's run folder, else a new `runs/<method>-<data>-s<seed>`.

        The first process alone decides: others learn it through `trainer.log_dir`.
        """
        config = self.config[self.subcommand]
        resumed = run_folder_of(config.get("ckpt_path"))
        if resumed is not None:
            return RunFolder(resumed)
        if config.folder is not None:
            folder = Path(config.folder).expanduser().resolve()
            try:
                return claim_first([folder])
            except FileExistsError as error:
                raise ValueError(
                    f"Expected `--folder` to be a new folder but {folder} exists."
                ) from error
        stem = f"{self.method}-{type(self.datamodule).__name__}-s{config.seed_everything}"
        # Absolute, as ModelCheckpoint forgets its best score where its folder's name changes.
        root = Path(config.trainer.default_root_dir or "runs").expanduser().resolve()
        return claim_first(chain([root / stem], (root / f"{stem}-{n}" for n in count(2))))


def main(args: Sequence[str] | None = None, cli_class: type[CLI] = CLI) -> None:
    """Runs the command line.

    Args:
        args: Arguments; `None` takes those of the process.
        cli_class: What `fit` and `test` are built by.
    """
    # Behind all else, so that a user's file never hides a package; DDP's processes come here too.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments == ["--version"]:
        print(f"robust-flatness {version('robust-flatness')}")
        return
    if arguments and arguments[0] in COMMANDS:
        run_command(resolve_name(COMMANDS[arguments[0]]), arguments)
        return
    with sigterm_exits(at_once=arguments[:1] == ["test"]):
        _run(cli_class, args)


def _run(cli_class: type[CLI], args: Sequence[str] | None) -> None:
    cli_class(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=RunStart,
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
