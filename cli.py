"""The command line: `python cli.py fit --model ATAWP`, or `robust-flatness fit --model ATAWP`."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

from robust_flatness.command_line.overview import overview
from robust_flatness.command_line.parser import check_environment, program, run_function

COMMAND_LINE = "robust_flatness.command_line"
FUNCTIONS = {
    "study": "robust_flatness.study.command:study",
    "report": "robust_flatness.command_line.reports:report",
    "dashboard": "robust_flatness.command_line.reports:dashboard",
}
COMMANDS = {
    "fit": "train one model, and measure it",
    "test": "measure a checkpoint, or a network that was trained elsewhere",
    "study": "train rows of Table 1, sweeps or your own configs, times seeds",
    "report": "turn finished runs into tables, figures and one HTML page",
    "dashboard": "set up a W&B workspace and report page",
}


def __getattr__(name: str) -> Any:
    if name != "CLI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_environment()
    return resolve_name(f"{COMMAND_LINE}.lightning_cli:CLI")


def study_functions() -> Any:
    """What a study calls of the command line; imported when it does."""

    def imported_when_called(name: str) -> Callable[..., Any]:
        return lambda *args: resolve_name(f"{COMMAND_LINE}.{name}")(*args)

    names = ["parser:read_options", "lightning_cli:merge_settings"]
    names += ["lightning_cli:check_arguments", "files:read_mapping", "lightning_cli:all_settings"]
    command_line = resolve_name("robust_flatness.study.plan:CommandLine")
    return command_line(*map(imported_when_called, names))


def main(args: Sequence[str] | None = None, cli_class: type[Any] | None = None) -> None:
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
    check_environment()
    if command in FUNCTIONS:
        passed = {"command_line": study_functions()} if command == "study" else {}
        run_function(resolve_name(FUNCTIONS[command]), arguments, **passed)
    elif command in COMMANDS and arguments[1:] in (["-h"], ["--help"]):
        print(overview(program(), command, f"{COMMANDS[command].capitalize()}."))
    elif command in COMMANDS:
        run = resolve_name(f"{COMMAND_LINE}.lightning_cli:run_lightning_cli")
        run(arguments, cli_class or __getattr__("CLI"))
    elif command in ("-h", "--help"):
        print(f"usage: {program()} [-h] [--version] COMMAND ...\n")
        print("commands, each with a --help of its own:")
        print("\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items()))
        print("\n  --version  print the version and exit")
    elif command == "--version":
        print(f"robust-flatness {version('robust-flatness')}")
    else:
        names = ", ".join(COMMANDS)
        print(f"error: Expected one of {names} to come first but got {command}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
