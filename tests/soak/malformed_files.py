"""Malformed checkpoints and data folders, and what a malformed input is made of."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_ba960bd" / "checkpoints" / "last.ckpt"


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        category: What it belongs to.
        label: What it is.
        arguments: The command line; `{shared}` is a folder with a finished `run`.
        names: The message has to hold one of these.
        prepare: Makes files in the folder that it runs in, and returns further arguments.
        environment: Variables that it runs with.
        may_work: Whether it may also end well.
        alone: Whether no options are added that make a run short.
    """

    category: str
    label: str
    arguments: Sequence[str]
    names: Sequence[str]
    prepare: Callable[[Path], Sequence[str]] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    may_work: bool = False
    alone: bool = False


def checkpoints() -> Iterator[Case]:
    """Checkpoints that are broken, or hold something else."""
    spoilers = {**_bytes_spoilers(), **_content_spoilers()}
    for label, spoil in spoilers.items():
        for command in ("fit", "test"):

            def prepare(folder: Path, spoil: Callable[..., Any] = spoil) -> list[str]:
                (folder / "own.ckpt").parent.mkdir(exist_ok=True)
                spoil(FIXTURE.read_bytes(), folder / "own.ckpt")
                return ["--ckpt_path=own.ckpt"]

            arguments = [
                command,
                "--model=ATAWP",
                *(["--trainer.max_epochs=3"] if command == "fit" else []),
            ]
            arguments += ["--model.network.width=4", "--trainer.enable_progress_bar=false"]
            names = ["ckpt_path", "checkpoint", "own.ckpt", "state_dict"]
            yield Case(
                "checkpoint",
                f"{command}: {label}",
                arguments,
                names,
                prepare,
                # Such a network is measured, with an error of 100 %.
                may_work=label == "all weights NaN",
                alone=True,
            )
    for path in ("none.ckpt", "/", "", "last", "best", "http://nowhere/x.ckpt"):
        arguments = ["test", "--model=ATAWP", f"--ckpt_path={path}"]
        yield Case("checkpoint", f"test: --ckpt_path={path}", arguments, ["ckpt_path"], alone=True)
    last = "--ckpt_path={shared}/run/checkpoints/last.ckpt"
    for model in ("AT", "TRADES", "MARTAWP"):
        arguments = ["test", f"--model={model}", last]
        yield Case("checkpoint", f"test: of ATAWP as {model}", arguments, ["--model"], alone=True)


def _bytes_spoilers() -> dict[str, Callable[[bytes, Path], Any]]:
    def flipped(at: float) -> Callable[[bytes, Path], Any]:
        def write(whole: bytes, path: Path) -> None:
            spoiled, start = bytearray(whole), int(len(whole) * at)
            for index in range(start, start + 8):
                spoiled[index] ^= 255
            path.write_bytes(spoiled)

        return write

    found: dict[str, Callable[[bytes, Path], Any]] = {
        "empty": lambda whole, path: path.write_bytes(b""),
        "text": lambda whole, path: path.write_text("weights"),
        "a folder": lambda whole, path: path.mkdir(),
        "a pickled call": lambda whole, path: path.write_bytes(pickle.dumps(_Calls())),
        "an empty zip": lambda whole, path: zipfile.ZipFile(path, "w").close(),
        "zeros": lambda whole, path: path.write_bytes(bytes(len(whole))),
    }
    for share in (0.1, 0.5, 0.9, 0.999):
        found[f"cut at {share}"] = lambda whole, path, share=share: path.write_bytes(
            whole[: int(len(whole) * share)]
        )
    return found | {f"flipped at {at}": flipped(at) for at in (0.2, 0.4, 0.6, 0.8)}


class _Calls:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("echo ran > ran.txt",))


def _content_spoilers() -> dict[str, Callable[[bytes, Path], Any]]:
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "an empty dictionary": lambda c: {},
        "a list": lambda c: [1],
        "a tensor": lambda c: c["state_dict"]["network.body.0.bias"],
        "None": lambda c: None,
        "no state_dict": lambda c: {k: v for k, v in c.items() if k != "state_dict"},
        "state_dict is a list": lambda c: {**c, "state_dict": [1]},
        "no weights": lambda c: {**c, "state_dict": {}},
        "a weight is missing": lambda c: {
            **c,
            "state_dict": dict(list(c["state_dict"].items())[1:]),
        },
        "a weight too many": lambda c: {
            **c,
            "state_dict": {**c["state_dict"], "foo": 1 * c["state_dict"]["network.body.0.bias"]},
        },
        "a weight of another shape": lambda c: {
            **c,
            "state_dict": {
                **c["state_dict"],
                "network.body.0.bias": c["state_dict"]["network.body.0.bias"][:1],
            },
        },
        "a weight is text": lambda c: {
            **c,
            "state_dict": {**c["state_dict"], "network.body.0.bias": "x"},
        },
        "all weights NaN": lambda c: {
            **c,
            "state_dict": {
                k: v * float("nan") if v.is_floating_point() else v
                for k, v in c["state_dict"].items()
            },
        },
        "hyper_parameters is text": lambda c: {**c, "hyper_parameters": "x"},
        "class is a number": lambda c: {**c, "robust_flatness_class": 3},
        "class is another": lambda c: {**c, "robust_flatness_class": "TRADES"},
    }

    def spoiler(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes, Path], Any]:
        def write(whole: bytes, path: Path) -> None:
            import torch

            torch.save(change(torch.load(FIXTURE, weights_only=False)), path)

        return write

    return {label: spoiler(change) for label, change in changes.items()}


def data_folders() -> Iterator[Case]:
    """Folders and files that hold no images, or not those that are needed."""
    for label, make in _folder_makers().items():

        def prepare(folder: Path, make: Callable[[Path], Any] = make) -> list[str]:
            root = folder / "images"
            for split in ("train", "test"):
                for number in range(24):
                    _png(root / split / "ab"[number % 2] / f"{number}.png", 8)
            make(root)
            return ["--data.root=images"]

        names = ["data.root", "images", "png", "class", "pixel"]
        yield Case("data", label, ["fit", "--data=ImageFolder"], names, prepare)
    for label, text in {
        "text": "images",
        "no arrays": b"PK\x05\x06" + bytes(18),
        "empty": "",
    }.items():
        arguments = ["fit", "--data.unlabeled_share=0.5"]
        prepare = writing("more.npz", text, "--data.unlabeled=more.npz")
        yield Case("data", f"unlabeled: {label}", arguments, ["unlabeled", "more.npz"], prepare)
    typed = ["fit", "--data.unlabeled_share=0.5", "--data.unlabeled=none.pickle"]
    yield Case("data", "unlabeled: no file", typed, ["unlabeled", "none.pickle"])
    evil = writing("evil.pickle", pickle.dumps(_Calls()), "--data.unlabeled=evil.pickle")
    typed = ["fit", "--data.unlabeled_share=0.5"]
    yield Case("data", "unlabeled: a pickled call", typed, ["unlabeled", "evil.pickle"], evil)
    # Not a folder that could be made, so that nothing is downloaded into it.
    for name in ("CIFAR10", "CIFAR100", "ImageFolder"):
        typed = ["fit", f"--data={name}", "--data.root=/dev/null/none"]
        yield Case("data", f"{name}: no folder", typed, ["data.root", "none"])


def _folder_makers() -> dict[str, Callable[[Path], Any]]:
    def replaced(text: bytes, pattern: str = "train/a/*.png") -> Callable[[Path], Any]:
        return lambda root: [path.write_bytes(text) for path in root.glob(pattern)]

    def removed(pattern: str) -> Callable[[Path], Any]:
        return lambda root: [path.unlink() for path in root.glob(pattern)]

    first = "train/a/0.png"
    return {
        "no images at all": removed("*/*/*.png"),
        "no training images": removed("train/*/*.png"),
        "no test images": removed("test/*/*.png"),
        "a class without images": removed("train/a/*.png"),
        "test classes differ": lambda root: (root / "test/a").rename(root / "test/c"),
        "one class": lambda root: [
            removed("*/b/*.png")(root),
            *((root / s / "b").rmdir() for s in ("train", "test")),
        ],
        "a text called png": replaced(b"no image", first),
        "an empty png": replaced(b"", first),
        "a png cut off": lambda root: (root / first).write_bytes((root / first).read_bytes()[:50]),
        "an image of another size": lambda root: _png(root / first, 9),
        "images of 1x1 pixels": lambda root: [_png(path, 1) for path in root.glob("*/*/*.png")],
        "a folder called png": lambda root: [(root / first).unlink(), (root / first).mkdir()],
        "a FIFO called png": lambda root: [(root / first).unlink(), os.mkfifo(root / first)],
        "a link to nothing": lambda root: [
            (root / first).unlink(),
            (root / first).symlink_to("none"),
        ],
        "a header of 30000x30000": replaced(
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00u0\x00\x00u0\x08\x02\x00\x00\x00\x8d\x8e\x1d\xc5",
            first,
        ),
    }


def _png(path: Path, size: int) -> None:
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def writing(name: str, text: str | bytes, option: str) -> Callable[[Path], Sequence[str]]:
    """Returns what writes a file and names it in an option."""

    def prepare(folder: Path) -> Sequence[str]:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return [option]

    return prepare
