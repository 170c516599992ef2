"""The command line: `python cli.py fit --model ATAWP`, or `robust-flatness fit --model ATAWP`."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from robust_flatness.command_line.parser import check_environment, run_function

if TYPE_CHECKING:
    from robust_flatness.command_line.lightning_cli import CLI

# Imported if a command needs it, as it takes seconds.
LIGHTNING_CLI = "robust_flatness.command_line.lightning_cli"
FUNCTIONS = {
    "study": "robust_flatness.study.command:study",
    "report": "robust_flatness.reporting.command:report",
    "dashboard": "robust_flatness.reporting.dashboard_command:dashboard",
}
COMMANDS = {
    "fit": "train one model, and measure it",
    "test": "measure a checkpoint, or a network that was trained elsewhere",
    "study": "train rows of Table 1, sweeps or your own configs, times seeds",
    "report": "turn finished runs into tables, figures and one HTML page",
    "dashboard": "set up a W&B workspace and report page",
}
HELP = f"""usage: cli.py [-h] [--version] COMMAND ...

Adversarial training, robust overfitting and flat minima.

commands, each with a --help of its own:
{chr(10).join(f"  {name:<11}{text}" for name, text in COMMANDS.items())}
"""


def __getattr__(name: str) -> Any:
    if name != "CLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_environment()
    return resolve_name(f"{LIGHTNING_CLI}:CLI")


def study_functions() -> Any:
    """What a study calls of the command line, imported if it does."""
    folder = "robust_flatness.command_line"
    functions = ("merge_settings", "check_arguments")
    places = [f"{folder}.options:read_options", *(f"{LIGHTNING_CLI}:{name}" for name in functions)]
    places += [f"{folder}.files:read_mapping"]
    command_line = resolve_name("robust_flatness.study.plan:CommandLine")
    return command_line(*(lambda *args, at=at: resolve_name(at)(*args) for at in places))


def main(args: Sequence[str] | None = None, cli_class: "type[CLI] | None" = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments; `None` takes those of the process.
        cli_class: What `fit` and `test` are built by; `None` is `CLI`.
    """
    # Behind all else, so that a user's file never hides a package; DDP's processes come here too.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else "nothing"
    if command in FUNCTIONS:
        passed = {"command_line": study_functions()} if command == "study" else {}
        run_function(resolve_name(FUNCTIONS[command]), arguments, **passed)
    elif command in COMMANDS:
        cli_class = cli_class or __getattr__("CLI")
        resolve_name(f"{LIGHTNING_CLI}:run_lightning_cli")(arguments, cli_class)
    elif command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"robust-flatness {version('robust-flatness')}")
    else:
        names = ", ".join(COMMANDS)
        sys.stderr.write(f"error: Expected one of {names} to come first but got {command}.\n")
        raise SystemExit(2)


if __name__ == "__main__":
    main()
