"""Imports run downwards only: a folder knows those of lower layers, and none beside it."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = {
    "functional": 1,
    "networks": 1,
    "run_folder": 2,
    "datamodules": 3,
    "measures": 3,
    "loggers": 3,
    "plotting": 3,
    "callbacks": 4,
    "lightning_modules": 4,
    "study": 5,
    "reporting": 5,
    "command_line": 6,
    "cli": 7,
}


def imported_folders(path: Path) -> set[str]:
    """Folders of this package that a file imports, also inside of functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    own = [name.split(".") for name in names if name.startswith("robust_flatness.")]
    return {parts[1] for parts in own}


def test_imports_run_downwards() -> None:
    upwards = {
        (path.relative_to(ROOT).as_posix(), imported)
        for folder, layer in LAYERS.items()
        for path in ([ROOT / "cli.py"] if folder == "cli" else (ROOT / folder).glob("*.py"))
        for imported in imported_folders(path) - {folder}
        if LAYERS[imported] >= layer
    }
    assert not upwards


def test_every_folder_of_the_package_has_a_layer() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert folders | {"cli"} == set(LAYERS)


def test_callbacks_load_neither_figures_nor_reports_nor_modules() -> None:
    code = (
        "import sys, robust_flatness.callbacks\n"
        "folders = ('plotting', 'reporting', 'lightning_modules', 'command_line', 'study')\n"
        "print(*(name for name in sys.modules if name.startswith("
        "tuple(f'robust_flatness.{folder}' for folder in folders))))\n"
        "print(sum(name.startswith('robust_flatness') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, count = done.stdout.splitlines()
    assert loaded == ""
    # Other projects load them for the callbacks alone.
    assert int(count) <= 66
