"""`fit` and `test`: a LightningCLI with presets, default measures and run folders."""

import logging
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.utilities import rank_zero_info
from torch.multiprocessing.spawn import ProcessRaisedException

from robust_flatness.callbacks import LineProgressBar, Results
from robust_flatness.command_line.checks import (
    check_linked,
    check_monitors,
    check_settings,
    check_start,
    check_weights,
    left_out,
)
from robust_flatness.command_line.components import (
    DEFAULT_CALLBACKS,
    LEAVABLE,
    LINKED,
    ONLY_IN_FIT,
    OPTIONAL_CALLBACKS,
    known_classes,
)
from robust_flatness.command_line.files import DEFAULTS, Settings, run_folder_of
from robust_flatness.command_line.overview import group_help
from robust_flatness.command_line.parser import (
    OneSentenceParser,
    Option,
    leaves,
    options_of,
    program,
    read_options,
    reason_of,
)
from robust_flatness.command_line.presets import merge_presets
from robust_flatness.command_line.run_start import (
    RunStart,
    interrupted_status,
    resume_command,
    sigterm_exits,
    undo_normalization,
)
from robust_flatness.datamodules import RobustDataModule
from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.functional.checks import Eps
from robust_flatness.functional.noise import Norm
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger, EpochWandbLogger, make_wandb_logger
from robust_flatness.run_folder.checkpoint_io import AtomicCheckpointIO
from robust_flatness.run_folder.claim import RunFolder, is_first_process
from robust_flatness.run_folder.environment import shown, started_as

for message in (".*LeafSpec.*", ".*does not have many workers.*"):
    # Said by Lightning about itself, and about data that is in memory already.
    warnings.filterwarnings("ignore", message=message)
# Lightning's advertisement of a logger, in every run.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "litlogger" not in record.getMessage()
)

# What is raised if arguments or the machine are not as they should be.
REFUSALS = (ValueError, OSError, MisconfigurationException)
# Options of a run that belong to no class: type, default, help.
RUN_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "eps": (Eps | None, None, "Radius of training and of all measures; model.eps, … override it."),
    "norm": (Norm | None, None, "Norm of training and of all measures; model.norm, … override it."),
    "epochs_share": (float | None, None, "Factor on the epochs that presets and files set."),
    "without": (list[str] | str, [], f"What to disable, a list of {', '.join(LEAVABLE)}."),
    "name": (str | None, None, "Name of the method: the model's by default."),
    "folder": (str | None, None, "A new run folder: runs/<name>-<data>-s<seed> by default."),
    "project": (str, "robust-flatness", "W&B project."),
    "group": (str | None, None, "W&B group: the method by default."),
}


# What `--help` says of them; Lightning's own words are of its classes.
DESCRIPTIONS = {
    "fit": "Trains one model and measures it.",
    "test": "Measures a checkpoint, or a network that was trained elsewhere.",
}
CLASS_HELP = (
    "`--model.help ATAWP`, `--data.help CIFAR10`, `--landscape.help`: arguments of a class."
)
GROUPS = {"trainer": "Lightning's trainer", "model": "Training method", "data": "Data"}


class Parser(OneSentenceParser, LightningArgumentParser):
    """LightningCLI's parser, which says in one sentence what is wrong."""


class CLI(LightningCLI):
    """LightningCLI with run folders, default measures, presets, and arguments in any order."""

    parser_class: type[LightningArgumentParser] = Parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one of `fit` and `test` that was typed: each takes time to build."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "test") if name in self.parser_kwargs}

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Adds all arguments, in groups with titles that fit a terminal."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        groups = parser.groups or {}
        for name, title in (GROUPS | {subcommand: "Checkpoint"}).items():
            if name in groups:
                groups[name].title = title
        for name, callback in DEFAULT_CALLBACKS.items():
            group = groups[name]
            group.title, group.description = f"{name} ({callback.__name__})", f"{group.title}."
        if subcommand == "test":
            # `Results` prints a table, with whole names and intervals.
            parser.set_defaults(verbose=False)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the default callbacks and links what the data knows into the model."""
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for name, callback in DEFAULT_CALLBACKS.items():
            skip = {"dataset", "datasets", "normalization"}
            parser.add_class_arguments(callback, name, skip=skip, fail_untyped=False)
        for name, callback in OPTIONAL_CALLBACKS.items():
            text = f"Any --{name}.ARGUMENT adds {callback.__name__}."
            parser.add_argument(f"--{name}", type=callback | None, default=None, help=text)
        for name, (kind, default, text) in RUN_OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        text = "Whether W&B keeps the checkpoints as artifacts when training has ended."
        parser.add_argument("--log_checkpoints", action="store_true", help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Puts presets and files in front of the options, and checks what came out."""
        assert isinstance(parser, Parser)
        subcommand, *arguments = sys.argv[1:] if args is None else list(args)
        parser.typed = read_options(arguments)
        self._help(subcommand, parser.typed)
        try:
            self._presets = presets = merge_presets(arguments)
            written = [leaf for layer in presets.layers for leaf in leaves(layer)]
            for each in (parser, self._parser(subcommand)):
                assert isinstance(each, Parser)
                each.typed, each.written = parser.typed, written
                each.known = partial(self._known_options, subcommand)
            self.config = parser.parse_args([subcommand, *presets.arguments])
            check_settings(self.config[subcommand], subcommand)
            self._saved = check_start(self.config[subcommand], subcommand)
        except Exception as error:
            parser.error(reason_of(error))

    def _help(self, subcommand: str, typed: Sequence[Option]) -> None:
        """Prints and exits if a group of options, or the classes of an option, are asked for."""
        parser = self._parser(subcommand)
        for name, value, _ in typed:
            if name in ("h", "help") and value not in (None, "all"):
                titles = {key: group.title for key, group in (parser.groups or {}).items()}
                titles["options"] = "options"
                if value not in titles:
                    known = ", ".join(["all", *titles])
                    parser.error(f"Expected `--help` to be one of {known} but got {value}.")
                print(group_help(parser, str(titles[value]), f"{program()} {subcommand}"))
                parser.exit(0)
            option = name.removesuffix(".help")
            if value is None and option != name and option in known_classes():
                print(f"classes of --{option}:")
                for short, path in sorted(known_classes()[option].items()):
                    first = (resolve_name(path).__doc__ or "").strip().partition("\n")[0]
                    print(f"  {short:<22} {first}"[:80])
                print(f"arguments of one: {program()} {subcommand} --{name} {short}")
                parser.exit(0)

    def _known_options(self, subcommand: str) -> list[str]:
        names = list(self._parser(subcommand).get_defaults().keys())
        for key, path in self._presets.classes.items():
            names += [f"{key}.{name}" for name in options_of(path)]
        return names

    def before_instantiate_classes(self) -> None:
        """Sets the norm of further callbacks; lets `test` leave the run's config.yaml alone."""
        callbacks, presets = self.config[self.subcommand].trainer.callbacks or [], self._presets
        parser = self.parser
        assert isinstance(parser, Parser)
        set_by_name = {option.name for option in (*parser.written, *presets.typed)}
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            for name, value in presets.threat_model.items():
                arguments = callback.get("init_args") or {}
                if name in arguments and f"trainer.callbacks.{name}" not in set_by_name:
                    arguments[name] = value
        if self.subcommand == "test":
            self.save_config_callback = None

    def _parse_ckpt_path(self) -> None:
        """Does nothing: the configuration has the settings of the checkpoint already."""

    def instantiate_classes(self) -> None:
        """Builds everything; bad arguments end in one sentence."""
        self._folder: RunFolder | None = None
        self._wandb_logger: EpochWandbLogger | None = None
        config, parser = self.config[self.subcommand], self.parser
        assert isinstance(parser, Parser)
        try:
            super().instantiate_classes()
            check_linked(config, parser.written, parser.typed, self.datamodule)
            if isinstance(self.datamodule, RobustDataModule) and self.trainer is not None:
                # Before there are processes that would wait for each other.
                size = self.datamodule.batch_size
                GlobalBatches(size, self.trainer.world_size, 0, 0).check(size)
            if self._saved is not None:
                check_weights(self.model, self._saved, config.ckpt_path)
        except Exception as error:
            self._refuse(ValueError(reason_of(error)))
        except BaseException:
            self._discard()
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs it; what is wrong before anything is trained ends in one sentence."""
        try:
            super()._run_subcommand(subcommand)
            self._say_what_is_next()
        except REFUSALS as error:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            if any(c.already_saved for c in callbacks if isinstance(c, RunStart)):
                self._end_processes()
                raise
            self._refuse(error)
        except ProcessRaisedException as error:
            # Of a process of `ddp_spawn`: its traceback, which ends in the sentence.
            kind, _, said = str(error).strip().splitlines()[-1].partition(": ")
            refusals = ("ValueError", "MisconfigurationException")
            if self._folder is None or not self._folder.is_unused or not kind.endswith(refusals):
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

    def _say_what_is_next(self) -> None:
        """Prints the commands that follow `fit`, in the form that this process was started in."""
        if self.subcommand != "fit" or self._folder is None or not self.trainer.is_global_zero:
            return
        folder = shown(self._folder.path)
        command = shlex.join([*started_as(), "report", str(folder.parent)])
        print(f"Tables and figures of all runs: {command}")
        if any((folder / "wandb").glob("offline-run-*")):
            print(f"To upload the run: wandb sync {folder}/wandb/offline-run-*")

    def _refuse(self, error: Exception) -> NoReturn:
        self._discard()
        self.parser.error(str(error))

    def _end_processes(self) -> None:
        """Ends the processes that this one started, which would wait for it."""
        trainer = getattr(self, "trainer", None)
        if trainer is not None and isinstance(trainer.strategy.launcher, _Launcher):
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def _discard(self) -> None:
        self._end_processes()
        if self._folder is not None:
            # An empty folder would only push the next run to another name.
            self._folder.discard()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the trainer its run folder, loggers, precision and the default callbacks."""
        trainer = self.config_init[self.subcommand].trainer
        own = trainer.callbacks or []
        own = own if isinstance(own, list) else [own]
        bars = any(isinstance(callback, ProgressBar) for callback in own)
        if trainer.enable_progress_bar is not False and not bars:
            own = [LineProgressBar(), *own]
        trainer.callbacks = [*own, *self._default_callbacks()]
        undo_normalization(self.datamodule, self.model, trainer.callbacks)
        if trainer.precision is None and isinstance(self.model, AT):
            # `bf16-mixed` on GPUs that have bfloat16, unless an older file says `fast: false`.
            on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
            fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            fast = fast and self.config[self.subcommand].model.init_args.get("fast") is not False
            kwargs.setdefault("precision", "bf16-mixed" if fast else None)
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
            self._compare_threat_models()
        return built

    def _compare_threat_models(self) -> None:
        """Says in a line if measures have another radius or norm than training."""
        config = self.config[self.subcommand]
        model = config.model.get("init_args") or {}
        if model.get("eps") is None or "norm" not in model:
            return
        default = getattr(self.datamodule, "eps", 8 / 255)
        trained = (model["eps"] * model.get("eps_scale", 1.0), model["norm"])
        others: dict[tuple[float, str], list[str]] = {}
        for name in (*DEFAULT_CALLBACKS, *OPTIONAL_CALLBACKS):
            measure = config[name] or {}
            measure = measure.get("init_args", measure)
            if "norm" in measure and name not in left_out(config):
                eps = default if measure["eps"] is None else measure["eps"]
                others.setdefault((eps, measure["norm"]), []).append(name)
        others.pop(trained, None)
        if others:
            parts = [f"{', '.join(names)} with {e:.4g} in {n}" for (e, n), names in others.items()]
            rank_zero_info(
                f"Training attacks with a radius of {trained[0]:.4g} in {trained[1]}, "
                f"{' and '.join(parts)}."
            )

    def _default_callbacks(self) -> list[Callback]:
        config = self.config_init[self.subcommand]
        without = left_out(config)
        if "early_stopping" in without and config.best_checkpoint.monitor == "val/robust_error":
            without.add("best_checkpoint")
        if config.trainer.enable_checkpointing is False:
            without |= {"best_checkpoint", "last_checkpoint"}
        if self.subcommand == "test":
            without |= set(ONLY_IN_FIT)
        optional = [config[name] for name in OPTIONAL_CALLBACKS if config[name] is not None]
        chosen = [config[name] for name in DEFAULT_CALLBACKS if name not in without]
        for drawn in (config.trajectory, config.landscape):
            if drawn is not None:
                drawn.method = self.method
        return [*optional, *chosen, Results(settings=self.config_dump, method=self.method)]

    @property
    def method(self) -> str:
        """What the run is of: its name, by default the model's class."""
        return self.config[self.subcommand].name or type(self.model).__name__

    def _loggers(self) -> list[Logger] | bool:
        """The run's own table, and W&B unless the user named other loggers.

        `test` measures the end of a run once more: in W&B that would be one more epoch.
        """
        config = self.config_init[self.subcommand]
        if config.trainer.fast_dev_run:
            return False
        own, resumed = config.trainer.logger, run_folder_of(config.get("ckpt_path"))
        stem = f"{self.method}-{type(self.datamodule).__name__}-s{config.seed_everything}"
        # Absolute, as ModelCheckpoint forgets its best score if its folder's name changes.
        root = Path(config.trainer.default_root_dir or "runs").expanduser().resolve()
        if resumed is not None:
            self._folder = RunFolder(resumed)
        elif config.folder is None:
            numbered = (root / f"{stem}-{number}" for number in count(2))
            self._folder = RunFolder.claim_first(chain([root / stem], numbered))
        else:
            self._folder = RunFolder.claim_first([Path(config.folder).expanduser().resolve()])
        folder = self._folder.path
        table = EpochCSVLogger(folder)
        table.recording = self.subcommand == "fit"
        table.hold()
        if isinstance(own, (Logger, list)):
            return [table, *(own if isinstance(own, list) else [own])]
        if own is not False and self.subcommand == "fit" and "wandb" not in left_out(config):
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


def run_lightning_cli(arguments: Sequence[str], cli_class: type[CLI] = CLI) -> CLI:
    """Runs `fit` or `test` with typed arguments."""
    with sigterm_exits(at_once=arguments[0] == "test"):
        return cli_class(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunStart,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=cli_class.parser_class,
            parser_kwargs={
                arguments[0]: {
                    "default_config_files": [str(DEFAULTS)],
                    "description": f"{DESCRIPTIONS[arguments[0]]} {CLASS_HELP}",
                    "usage": f"{program()} {arguments[0]} [--model NAME] [--config FILE] [options]",
                },
                # A share of a name would also be a misspelt one.
                "allow_abbrev": False,
            },
            args=list(arguments),
        )


def merge_settings(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings of presets and files, and the remaining arguments of `fit`, for a study."""
    presets = merge_presets(arguments[1:])
    settings = presets.merged
    for name in presets.threat_model:
        # It is at all its places.
        settings.pop(name)
    return settings, [part for option in presets.typed for part in option.arguments]


class _RefusedError(SystemExit):
    """The sentence of a command line that is only checked."""


class _CheckingParser(Parser):
    """Raises the sentence in place of ending the process."""

    def refuse(self, sentence: str) -> NoReturn:
        raise _RefusedError(sentence)


class _CheckingCLI(CLI):
    """The command line up to the trainer, which may need GPUs that only a cluster has."""

    parser_class = _CheckingParser

    def _set_seed(self) -> None:
        # Lightning would write the seed to the environment, which all runs inherit.
        return

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        return


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises a `ValueError` if `fit` refuses arguments; leaves neither folder nor variable."""
    all_settings(arguments)


def all_settings(arguments: Sequence[str]) -> Settings:
    """The settings of `fit` with these arguments, as in the `results.json` of such a run.

    Raises:
        ValueError: If `fit` refuses the arguments.
    """
    try:
        settings: Settings = run_lightning_cli(arguments, _CheckingCLI).config_dump
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    return settings
