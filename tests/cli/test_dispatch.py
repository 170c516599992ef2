"""What needs neither torch nor Lightning answers at once."""

import resource
import subprocess
import sys
import types

import pytest

from robust_flatness import cli

COMMANDS = ("fit", "test", "study", "report", "dashboard")


def called(*arguments: str, folder) -> tuple[int, str, float]:
    """Status, output and seconds of CPU time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "robust_flatness.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout + done.stderr, seconds


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [
        (["--help"], 0, "commands, each with a --help of its own"),
        (["--version"], 0, "robust-flatness "),
        (
            [],
            2,
            "Expected one of fit, test, study, report, dashboard to come first but got",
        ),
        (["ft", "--model=AT"], 2, "dashboard to come first but got ft."),
        (["report", "--help"], 0, "Class of the data"),
        (["report", "nowhere"], 2, "Expected `runs` to be a folder"),
    ],
)
def test_help_and_mistakes_answer_within_two_seconds(arguments, status, output, tmp_path):
    returned, printed, seconds = called(*arguments, folder=tmp_path)
    assert returned == status
    assert output in printed
    assert seconds < 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["robust-flatness", "cli.py"])
def test_help_names_all_commands_and_the_program_that_was_called(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"/anywhere/{program}"])
    cli.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {program} [-h] [--version] COMMAND")
    assert set(COMMANDS) <= set(printed.split())
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {program} report")


def test_a_function_is_called_without_torch_and_lightning():
    code = (
        "import sys\n"
        "from robust_flatness.cli import main\n"
        "from robust_flatness.command_line import reports\n"
        "def report(runs: str, published: bool = True): print(runs, published)\n"
        "reports.report = report\n"
        "main(['report', 'runs', '--published=false'])\n"
        "libraries = ('torch', 'lightning', 'numpy', 'pandas', 'matplotlib')\n"
        "print([name for name in libraries if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["runs False", "[]"], done.stderr


def function(runs: str, switch: bool = False, count: int = 1, options: list[str] | None = None):
    """Does nothing.

    Args:
        runs: A folder.
        switch: Whether to.
        count: A number.
        options: What follows.
    """
    print(runs, switch, count, options)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["x"], "x False 1 None"),
        (["x", "--switch", "--count", "2"], "x True 2 None"),
        (["x", "--switch", "false", "--", "--a=1", "b"], "x False 1 ['--a=1', 'b']"),
    ],
)
def test_functions_take_switches_and_what_follows_dashes(arguments, printed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "own_command", types.SimpleNamespace(function=function))
    monkeypatch.setitem(cli.FUNCTIONS, "report", "own_command:function")
    cli.main(["report", *arguments])
    assert capsys.readouterr().out.strip() == printed


def test_the_class_of_fit_is_importable_and_no_other_name():
    assert cli.CLI.__name__ == "CLI"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cli.nothing
