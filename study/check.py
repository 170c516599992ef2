"""Asks the command line about runs before any of them starts."""

from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from robust_flatness.cli import CLI, main
from robust_flatness.command_line.options import read_options
from robust_flatness.command_line.parser import Parser
from robust_flatness.study.plan import PlannedRun

# Each takes about half a second.
_ASKED = 3


class _RefusedError(SystemExit):
    """What the command line says of a run that it would not start."""


class _Parser(Parser):
    """Raises what is wrong, where the command line would end."""

    @override
    def refuse(self, sentence: str) -> NoReturn:
        raise _RefusedError(sentence)


class _Asked(CLI):
    """The command line up to where it would make a trainer, and with it a run folder.

    A trainer may need GPUs that only the nodes of a cluster have.
    """

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **{**settings, "parser_class": _Parser})

    @override
    def _set_seed(self) -> None:
        # It would be written to the environment, which all runs inherit.
        return

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        return


def check_arguments(plan: Sequence[PlannedRun]) -> None:
    """Refuses a plan whose runs would refuse their arguments, without a trace of any of them.

    One run is asked of each file and sweep; of many, the first and the last ones, as a user's own
    stand behind the rows of Table 1.

    Args:
        plan: Runs, at least one.

    Raises:
        ValueError: If the command line refuses one, with its name and the reason.
    """
    firsts: dict[tuple[str, ...], PlannedRun] = {}
    for run in plan:
        firsts.setdefault(_kind(run), run)
    alone = list(firsts.values())
    for run in [alone[0], *alone[1:][1 - _ASKED :]]:
        try:
            main(run.arguments, _Asked)
        except _RefusedError as error:
            raise ValueError(f"{run.name}: {error}") from None


def _kind(run: PlannedRun) -> tuple[str, ...]:
    """Its files, and the names of its other options."""
    options = read_options(run.arguments[1:])
    return tuple(str(o.value) if o.name == "config" else o.name for o in options)
