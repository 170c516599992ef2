"""One HTML page with all figures and the table, interactive, which needs no network.

Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_page(Path(folder) / "index.html", models=[])
    ...     "Robust generalization" in path.read_text(encoding="utf-8")
    True
"""

import base64
import json
import mimetypes
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from robust_flatness.reporting.models import Model, Point
from robust_flatness.reporting.page_data import page_data
from robust_flatness.reporting.runs import LeftOut, Run
from robust_flatness.run_folder.atomic_write import whole_file

_FOLDER = Path(__file__).parent
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_PACKAGES = ("robust-flatness", "torch", "lightning")


def write_page(
    path: Path,
    *,
    models: Sequence[Model],
    published: Sequence[Point] = (),
    trajectories: Mapping[str, list[dict[str, float]]] | None = None,
    left_out: Sequence[LeftOut] = (),
    title: str = "Robust generalization and flat minima",
    images: Mapping[str, Path] | None = None,
) -> Path:
    """Writes the page; a reader finds the old or the new one, never half of one.

    The page holds plotly.js (about 5 MB), so that it opens anywhere and still does in years.

    Args:
        path: The HTML file. Its folder is created where it does not exist.
        models: Of one data set. There may be none.
        published: The paper's models, drawn faint.
        trajectories: The paper's trajectories by method: rows with `progress` in [0, 1] and figures
            by name.
        left_out: Folders that hold no usable run.
        title: The heading.
        images: Pictures that are shown as they are, by caption.

    Returns:
        `path`.

    Raises:
        ValueError: If a picture does not exist.
    """
    data = page_data(models, published, trajectories, left_out)
    runs = [run for model in models for run in model.runs]
    parts = {
        "title": escape(title),
        "facts": "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
            for name, text in _facts(models, runs)
        ),
        "images": _images(images or {}),
        "data": _json(data),
        "plotly": get_plotlyjs(),
        "style": _asset("page.css"),
        "figures_script": _asset("page_figures.js"),
        "script": _asset("page.js"),
    }
    # In one pass, so that nothing inside a part is taken for a slot.
    page = _SLOT.sub(lambda slot: parts[slot[1]], _asset("page_template.html"))
    with whole_file(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return path


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _json(data: Mapping[str, object]) -> str:
    """JSON that no name in it can end or leave; ASCII, so that every reader agrees on it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _images(images: Mapping[str, Path]) -> str:
    if not images:
        return ""
    figures = "".join(_image(caption, path) for caption, path in images.items())
    return f'<section><h2>More figures</h2><div class="images">{figures}</div></section>'


def _image(caption: str, path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"Expected `images` to hold files that exist but got {path}.")
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _facts(models: Sequence[Model], runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What the page is about: names and texts, only of what is known."""
    if not runs:
        return [("Runs", "none that finished")]
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    methods = len({model.method for model in models})
    facts = [
        ("Data", _list(run.data for run in runs)),
        ("Runs", f"{len(runs)} ({len(models)} models, {methods} methods)"),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Epochs", _range([run.epochs for run in runs])),
        ("Diverged", ", ".join(model.diverged for model in models if model.diverged)),
        ("Test images", _num_images(runs)),
        ("Hardware", _list(map(_hardware, runs))),
        ("Versions", _list(map(_versions, runs))),
    ]
    return [(name, text) for name, text in facts if text]


def _list(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _num_images(runs: Sequence[Run]) -> str:
    names = {
        "PGD": "test/robust_error",
        "AutoAttack": "test/autoattack_error",
        "flatness": "flatness/average/test",
    }
    counts = {
        label: [run.num_examples[name] for run in runs if name in run.num_examples]
        for label, name in names.items()
    }
    return ", ".join(f"{_range(found)} ({label})" for label, found in counts.items() if found)


def _hardware(run: Run) -> str:
    gpus = run.hardware.get("gpus") or []
    cores = run.hardware.get("cpu_cores")
    cpu = str(run.hardware.get("cpu") or "CPU")
    return ", ".join(map(str, gpus)) or (f"{cpu}, {cores} cores" if cores else "")


def _versions(run: Run) -> str:
    found = ((name, run.versions.get(name)) for name in _PACKAGES)
    return ", ".join(f"{name} {version}" for name, version in found if version)
