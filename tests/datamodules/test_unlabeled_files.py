import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robust_flatness.datamodules import ImageFolder
from robust_flatness.datamodules.unlabeled_files import read_unlabeled

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
CARMON = {"data": IMAGES, "extrapolated_targets": LABELS, "prediction_model": "wrn"}


def save_pickle(content, path, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def save_folder(parent, names=("cat", "dog", "emu")):
    for label, name in enumerate(names):
        (parent / name).mkdir(parents=True)
        for i in (1, 0):
            color = (100 * label, i, 0)
            Image.new("RGB", (5, 4), color).save(parent / name / f"{i}.png")
    return parent


def assert_read(images):
    pixels, labels = images.__getitems__(range(6))
    assert torch.equal(pixels, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert labels.tolist() == LABELS.tolist()
    assert labels.dtype is torch.int64


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_any_protocol_are_read(tmp_path, protocol):
    channels_first = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))
    for images in (IMAGES, np.asfortranarray(IMAGES), channels_first.transpose(0, 2, 3, 1)):
        content = {**CARMON, "data": images, "number": np.int64(1), "list": [0.5, None]}
        path = save_pickle(content, tmp_path / "ti_500K_pseudo_labeled.pickle", protocol)
        assert_read(read_unlabeled(str(path), num_classes=3))


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_pickles_of_numpy_1_and_2_are_read(tmp_path, core):
    # Protocol 3 names modules in plain text.
    content = pickle.dumps(CARMON, protocol=3)
    for name in (b"numpy._core.", b"numpy.core."):
        content = content.replace(name, core.encode() + b".")
    assert core.encode() in content
    (tmp_path / "x.pickle").write_bytes(content)
    assert_read(read_unlabeled(tmp_path / "x.pickle", num_classes=3))


def test_labels_may_be_a_list_and_of_any_integers(tmp_path):
    for labels in (LABELS.tolist(), LABELS.astype(np.int32), LABELS.astype(np.uint8)):
        content = {**CARMON, "extrapolated_targets": labels}
        assert_read(read_unlabeled(save_pickle(content, tmp_path / "x.pickle"), num_classes=3))


def test_npz_files_are_read(tmp_path):
    np.savez(tmp_path / "ddpm.npz", image=IMAGES, label=LABELS)
    assert_read(read_unlabeled(tmp_path / "ddpm.npz", num_classes=3))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "ddpm.npz", image=IMAGES, label=LABELS)
    assert_read(read_unlabeled("~/ddpm.npz", num_classes=3))


def test_folders_are_numbered_by_name_or_as_the_labeled_ones(tmp_path):
    images = read_unlabeled(save_folder(tmp_path / "all"), num_classes=3)
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [images[i][0][:2, 0, 0].tolist() for i in (0, 3)] == [[0, 0], [100, 1]]
    names = ["ant", "cat", "dog", "emu"]
    part = save_folder(tmp_path / "part", ("cat", "emu"))
    images = read_unlabeled(part, num_classes=4, class_names=names)
    assert images.labels.tolist() == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="Expected 3 folders, one per class, in .*part but got 2"):
        read_unlabeled(part, num_classes=3)
    with pytest.raises(ValueError, match="named as the 2 classes of the labeled .* but got 'cat'"):
        read_unlabeled(part, num_classes=2, class_names=["dog", "emu"])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    content = {**CARMON, "data": Evil(f"touch {trace}")}
    path = save_pickle(content, tmp_path / "x.pickle", protocol)
    pattern = r"asks for posix.system, .* can run any code, only NumPy arrays and plain containers"
    with pytest.raises(ValueError, match=pattern):
        read_unlabeled(path, num_classes=3)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()


def reduced(function, *args, state=None):
    """An object that is pickled as a call of `function`, and as what sets its state."""

    class Call:
        def __reduce__(self):
            return (function, args) if state is None else (function, args, state)

    return Call()


RECONSTRUCT = IMAGES.__reduce__()[0]
FROMBUFFER = IMAGES.__reduce_ex__(5)[0]
OBJECTS = np.dtype([("image", "O")])
# A record with an object, whose flags say that it has none.
DISGUISED = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
POINTERS = reduced(np.dtype, "V8", False, True, state=DISGUISED)
EMPTY = (np.ndarray, (0,), b"b")
STATE = IMAGES.__reduce__()[2]


@pytest.mark.parametrize(
    "images",
    [
        np.array([[b"x", None]], dtype=object),
        np.zeros((6, 4, 5, 3), OBJECTS),
        np.zeros(6, [("image", "u1", (4, 5, 3))]),
        np.array([b"bytes"]),
        np.array(["text"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(3, complex),
        np.float64,
        OBJECTS,
        # The bytes of an array of objects would be taken for pointers.
        reduced(np.ndarray, (2,), "O", bytes(16)),
        reduced(np.ndarray, (6, 4, 5, 3), "u1", IMAGES.tobytes()),
        reduced(FROMBUFFER, bytes(16), np.dtype("O"), (2,), "C"),
        reduced(FROMBUFFER, IMAGES.tobytes(), np.dtype("u1"), (6, 4, 5, 3), "K"),
        reduced(FROMBUFFER, IMAGES.tobytes(), np.dtype("u1"), (6, 4, 5, 3), "C", (0, 2, 1, 3)),
        reduced(FROMBUFFER, IMAGES.tobytes(), np.dtype("u1"), (6, 4, 5, 3), "K", (0, 1, 2)),
        reduced(FROMBUFFER, IMAGES.tobytes(), np.dtype("u1"), (6, 4, 5, 4), "C"),
        reduced(FROMBUFFER, IMAGES.tobytes(), np.dtype("u1"), (-6, 4, 5, -3), "C"),
        reduced(FROMBUFFER, IMAGES.tobytes(), np.dtype("u1"), (2**62, 2**62, 0, 1), "C"),
        reduced(RECONSTRUCT, *EMPTY, state=(1, (2,), OBJECTS, False, [None, None])),
        reduced(RECONSTRUCT, *EMPTY, state=(1, (2,), POINTERS, False, bytes(range(16)))),
        reduced(RECONSTRUCT, *EMPTY, state=(*STATE[:4], STATE[4][1:])),
        reduced(RECONSTRUCT, *EMPTY, state=(1, (6, 4, 5, 3), "u1", False, IMAGES.tobytes())),
        reduced(RECONSTRUCT, *EMPTY, state={"array": None}),
        reduced(RECONSTRUCT, *EMPTY),
        reduced(np.dtype, "u1", False, True, state=(3, "|", None, ("a",), {"a": 1}, 8, 1, 0)),
        reduced(np.dtype, "u1", False, True, state=(3, "|", (np.dtype("u1"), (2,)), *[None] * 5)),
        {1, 2},
        frozenset([1]),
        {(1, 2): 3},
        bytearray(3),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_only_plain_arrays_of_numbers_are_read(tmp_path, images, protocol):
    path = save_pickle({**CARMON, "data": images}, tmp_path / "x.pickle", protocol)
    with pytest.raises(ValueError, match=r"Expected .*x.pickle"):
        read_unlabeled(path, num_classes=3)


def nested(depth):
    """A pickle of a dictionary whose key is a tuple that holds a tuple, and so on."""
    return b"\x80\x04})" + b"\x85" * depth + b"Ns."


@pytest.mark.parametrize(
    "content",
    [
        nested(300_000),
        b"\x80\x04]" + nested(300_000)[3:-2] + b"N\x86a.",  # a list of pairs
        b"\x80\x02}r\xff\xff\xff\xff.",  # the memory of a number of a memo
        b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".",  # of an array of bytes
        b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + b".",  # of bytes
        b"\x80\x04\x95" + (2**33).to_bytes(8, "little") + b"}.",  # of a frame
        # Attributes of what replaces NumPy's classes and functions.
        *[
            b"\x80\x02c" + path + b"\n" + state + b"b."
            for path in (
                b"_codecs\nencode",
                b"numpy\ndtype",
                b"numpy.core.multiarray\n_reconstruct",
            )
            for name in (b"U\x08__init__", b"U\x07__new__", b"U\x0c__setstate__")
            for state in (b"}" + name + b"Ns", b"N}" + name + b"Ns\x86")
        ],
    ],
)
def test_pickles_cannot_exhaust_or_change_the_process(tmp_path, content):
    (tmp_path / "x.pickle").write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected .*x.pickle"):
        read_unlabeled(tmp_path / "x.pickle", num_classes=3)
    assert_read(read_unlabeled(save_pickle(CARMON, tmp_path / "y.pickle", 2), num_classes=3))


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Changes, takes out, doubles or inserts a few bytes."""
    damaged = bytearray(content)
    for _ in range(random.integers(1, 4)):
        start = int(random.integers(len(damaged) + 1))
        end = start + int(random.integers(0, 9))
        new = random.integers(256, size=end - start, dtype=np.uint8).tobytes()
        damaged[start : start if random.random() < 0.3 else end] = (
            new if random.random() < 0.6 else damaged[start:end] * int(random.integers(0, 3))
        )
    return bytes(damaged)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_damaged_pickle_is_one_sentence_or_valid_images(tmp_path, protocol):
    # More of them: FUZZ=100000 pytest tests/datamodules/test_unlabeled_files.py
    small = {"data": IMAGES[:2, :1, :2], "extrapolated_targets": LABELS[:2], "name": "wrn"}
    content = pickle.dumps({**small, "other": np.float64(1)}, protocol)
    random, path = np.random.default_rng(protocol), tmp_path / "x.pickle"
    sentences: list[str] = []
    for _ in range(int(os.environ.get("FUZZ", "150"))):
        path.write_bytes(mutated(content, random))
        try:
            images = read_unlabeled(path, num_classes=3)
        except ValueError as error:
            sentences.append(str(error))
        else:
            pixels, labels = images.__getitems__(range(len(images)))
            assert (pixels.dtype, pixels.ndim, labels.shape) == (torch.uint8, 4, pixels.shape[:1])
    assert len(sentences) > 10
    assert all(str(path) in sentence for sentence in sentences)


@pytest.mark.parametrize("name", ["builtins eval", "numpy load", "numpy.ctypeslib load_library"])
def test_only_what_arrays_need_is_looked_up(tmp_path, name):
    module, function = name.split()
    (tmp_path / "x.pickle").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(ValueError, match=f"it asks for {module}.{function}"):
        read_unlabeled(tmp_path / "x.pickle", num_classes=3)


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    trace = tmp_path / "trace"
    objects = np.array([Evil(f"touch {trace}")], dtype=object)
    np.savez(tmp_path / "x.npz", image=objects, label=LABELS)
    with pytest.raises(ValueError, match="cannot be read: Object arrays cannot be loaded"):
        read_unlabeled(tmp_path / "x.npz", num_classes=3)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"to be the pickle .* but it cannot be read"),
        ({"data": IMAGES}, "in .*x.pickle but it has no `extrapolated_targets`"),
        ({**CARMON, "data": IMAGES / 255}, r"type uint8 but got \(6, 4, 5, 3\) and float64"),
        ({**CARMON, "data": IMAGES[0]}, r"shape \(N, H, W, C\) .* but got \(4, 5, 3\)"),
        ({**CARMON, "extrapolated_targets": LABELS[:5]}, r"6 integers but got shape \(5,\)"),
        ({**CARMON, "extrapolated_targets": LABELS / 2}, "6 integers but got .* float64"),
    ],
)
def test_other_contents_are_one_sentence(tmp_path, content, message):
    path = save_pickle(content, tmp_path / "x.pickle")
    with pytest.raises(ValueError, match=message):
        read_unlabeled(path, num_classes=3)


@pytest.mark.parametrize("name", ["x.pickle", "x.npz"])
@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04"])
def test_damaged_files_are_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} to be the pickle .* but it cannot be read"):
        read_unlabeled(tmp_path / name, num_classes=3)


def test_nothing_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="`unlabeled` to be the pickle .* but there is no .*none"):
        read_unlabeled(tmp_path / "none", num_classes=3)
    with pytest.raises(ValueError, match="if `unlabeled_share` is above 0 but got None"):
        read_unlabeled(None, num_classes=3)


def test_a_folder_of_images_takes_a_folder_of_unlabeled_ones(tmp_path):
    for part in ("train", "test"):
        save_folder(tmp_path / "labeled" / part)
    extra: Path = save_folder(tmp_path / "extra", ("emu",))
    data = ImageFolder(str(tmp_path / "labeled"), num_val=1, num_test=1, unlabeled=str(extra))
    source = data.unlabeled_source()
    assert source.labels.tolist() == [2, 2]
    assert len(source) == 2
