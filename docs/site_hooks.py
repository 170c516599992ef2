"""Hooks of `mkdocs.yml`: pages that the repository holds outside `docs/`, and API pages."""

import ast
import json
import posixpath
import re
import tempfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from griffe import Class, Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Pages of the site that are files of the repository's root.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")
NOTEBOOK = "notebooks/quickstart"
API = "api/"
INLINE_CODE = re.compile(r"(?<!</span>)<code>[^<]+</code>")
OPTION = re.compile(r"--[\w.]+")
# Base classes that hold arguments of several classes of a package, below its page.
SHARED_BASES = {
    "callbacks": [
        "fixed_images.FixedImages",
        "measuring.MeasuringCallback",
        "measuring.HoldsMeasure",
        "training_step.TrainingStepCallback",
    ],
    "lightning_modules": ["pgd_mixin.PGDMixin", "awp_mixin.AWPMixin"],
}
PLACES = {p.split(".")[1]: f"{k}.{p}" for k, paths in SHARED_BASES.items() for p in paths}
# Holds the packages under their import name while the site is built.
links = tempfile.TemporaryDirectory()


class Docstrings(Extension):
    """Shows sections `Example` as code and `Shape` as a list, and links shared bases only."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Changes the docstring and the bases of a module, class or function."""
        if obj.docstring:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            shape = re.compile(r"(?m)^Shape:\n((?: {4}.+\n?)+)")
            text = shape.sub(lambda m: f"**Shape:**\n\n- {' '.join(m[1].split())}\n", text)
            for name, place in PLACES.items():
                link = rf"[`{name}\1`][robust_flatness.{place}\1]"
                text = re.sub(rf"`{name}((?:\.\w+)?)`", link, text)
            obj.docstring.value = text
        if isinstance(obj, Class):
            obj.bases = [base for base in obj.bases if not str(base).startswith("_")]


@event_priority(100)  # before mkdocstrings
def on_config(config: MkDocsConfig) -> None:
    """Lets mkdocstrings read the packages' source, which imports nothing."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    package = Path(links.name) / "robust_flatness"
    package.mkdir(exist_ok=True)
    for line in setup["options"]["package_dir"].split("\n")[2:]:
        folder = line.split("=")[1].strip()
        if not (package / folder).exists():
            (package / folder).symlink_to(ROOT / folder)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [links.name]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages of the root, the notebook as a page, the API, and files that pages link to."""
    pages = {uri: (ROOT / name).read_text() for name, uri in ROOT_PAGES.items()}
    pages[f"{NOTEBOOK}.md"] = notebook_page()
    for uri in re.findall(rf"{API}\w+\.md", Path(config.config_file_path).read_text()):
        pages[uri] = api_page(uri.removeprefix(API).removesuffix(".md"))
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in [*ROOT.glob("configs/**/*.yaml"), ROOT / "LICENSE", ROOT / "CITATION.cff"]:
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))


def notebook_page() -> str:
    """The notebook as Markdown, with a link to the file."""
    cells = json.loads((ROOT / f"docs/{NOTEBOOK}.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts)
    ]
    parts.insert(1, "[Download the notebook](quickstart.ipynb)")
    return "\n\n".join(parts)


def summary(folder: str) -> str:
    """First sentence of a package's docstring."""
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    return docstring.split("\n")[0]


def api_page(folder: str) -> str:
    """The page of one package, or of the list of packages."""
    if folder != "index":
        page = f"# robust_flatness.{folder}\n\n::: robust_flatness.{folder}\n"
        options = "{show_root_heading: true, show_root_toc_entry: true, heading_level: 3}"
        for number, base in enumerate(SHARED_BASES.get(folder, [])):
            page += "" if number else "\n## Shared bases\n"
            page += f"\n::: robust_flatness.{folder}.{base}\n    options: {options}\n"
        return page
    names = re.findall(r"api/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    rows = [f"| [{n}]({n}.md) | {summary(n)} |" for n in names if n != "index"]
    return "\n".join(["# API reference", "", "| package | content |", "|---|---|", *rows])


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points links between files of the repository at the pages of the site."""
    uri = page.file.src_uri
    source = {v: k for k, v in ROOT_PAGES.items()}.get(uri, f"docs/{uri}")

    def site_link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = ROOT_PAGES.get(path, path.removeprefix("docs/"))
        if uri != f"{NOTEBOOK}.md":
            target = target.replace(f"{NOTEBOOK}.ipynb", f"{NOTEBOOK}.md")
        return match[1] + posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return LINK.sub(site_link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keeps the names of options on one line."""

    def unbroken(code: re.Match[str]) -> str:
        return OPTION.sub(r'<span class="option">\g<0></span>', code[0])

    return INLINE_CODE.sub(unbroken, html)
