import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from toy_datamodule import record

from robust_flatness.callbacks import Flatness, WeightAveraging
from robust_flatness.datamodules import ImageFolder

SIZES = {"num_train_eval": 6, "num_val": 2, "num_test": 4, "batch_size": 4}


@pytest.fixture
def root(tmp_path):
    """Two classes of five training and four test images, each of its own color."""
    for part, count in (("train", 5), ("test", 4)):
        for label, name in enumerate(["cat", "dog"]):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 6), (100 * label, 10 * i, 50))
                image.putpixel((0, 0), (0, 0, 250))
                image.save(folder / f"{i}.png")
    return tmp_path


def test_classes_channels_and_statistics_are_those_of_the_folder(root):
    folder = ImageFolder(str(root), **SIZES)
    assert (folder.num_classes, folder.in_channels) == (2, 3)
    assert folder.class_names == ["cat", "dog"]
    everything = ImageFolder(str(root), **{**SIZES, "num_train_eval": 10}).split_dataset("train")
    pixels = torch.stack([image for image, _ in everything]).double()
    assert folder.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert folder.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_statistics_that_are_set_are_used_and_nothing_is_read(tmp_path):
    folder = ImageFolder(str(tmp_path / "none"), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    assert folder.mean == [0.1, 0.2, 0.3]
    assert folder.std == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"Expected `mean` to have 3 values but got \[0.1\]"):
        ImageFolder("data", mean=[0.1])


@pytest.mark.parametrize("in_memory", [True, False])
def test_items_are_the_files_at_the_indices(root, in_memory):
    folder = ImageFolder(str(root), in_memory=in_memory, **SIZES)
    indices = folder.split_indices()
    for split, per_class in (("train", 5), ("val", 4), ("test", 4)):
        dataset = folder.split_dataset(split)
        assert len(dataset) == len(indices[split]) > 0
        for (image, label), index in zip(dataset, indices[split], strict=True):
            assert image.shape == (3, 6, 8)
            red, green, blue = (image[:, 3, 3] * 255).round().tolist()
            assert (label, red, green, blue) == (
                index // per_class,
                100 * label,
                10 * (index % per_class),
                50,
            )


def test_the_order_is_fixed_and_mixes_the_classes(root):
    torch.manual_seed(1)
    first = ImageFolder(str(root), seed=1, **SIZES).split_indices()
    torch.manual_seed(2)
    assert first == ImageFolder(str(root), seed=2, **SIZES).split_indices()
    assert not set(first["val"]) & set(first["test"])
    assert {index // 5 for index in first["train"]} == {0, 1}
    assert first["test"] != sorted(first["test"])


def test_training_does_not_depend_on_where_the_images_are(root):
    held = record(ImageFolder(str(root), seed=0, **SIZES), max_epochs=1)
    read = record(ImageFolder(str(root), seed=0, in_memory=False, **SIZES), max_epochs=1)
    assert len(held) == len(read) == 3
    for (images, labels), (others, other_labels) in zip(held, read, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_home_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert ImageFolder(f"~/{root.name}", **SIZES).num_classes == 2


def test_only_images_count_and_gray_ones_become_rgb(root):
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._0.png").write_text("no image")
    (root / "train" / ".cache").mkdir()
    Image.new("L", (8, 6), 200).save(root / "train" / "cat" / "gray.png")
    train, _ = ImageFolder(str(root), **SIZES).sources()
    assert len(train) == 11
    assert train[5][0][:, 3, 3].tolist() == [200, 200, 200]


def test_hidden_folders_are_skipped_at_any_depth(root):
    image = root / "train" / "cat" / "0.png"
    for hidden in (".ipynb_checkpoints", ".cache/deeper", "deep/.ipynb_checkpoints"):
        folder = root / "train" / "cat" / hidden
        folder.mkdir(parents=True)
        (folder / "0-checkpoint.png").write_bytes(image.read_bytes())
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / "deep" / "5.png").write_bytes(image.read_bytes())
    folder = ImageFolder(str(root), **SIZES)
    assert folder.class_names == ["cat", "dog"]
    assert len(folder.sources()[0]) == 11


def test_links_are_followed_and_loops_end(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (root / "train" / "cat").rename(elsewhere / "cat")
    (root / "train" / "cat").symlink_to(elsewhere / "cat")
    (elsewhere / "more").mkdir()
    (elsewhere / "more" / "5.png").write_bytes((elsewhere / "cat" / "0.png").read_bytes())
    cat = elsewhere / "cat"
    (cat / "more").symlink_to(elsewhere / "more")
    (cat / "again").symlink_to(elsewhere / "more")
    (elsewhere / "more" / "back").symlink_to(cat)
    (cat / "self").symlink_to(cat)
    # All classes would be cats.
    (cat / "up").symlink_to(root / "train")
    (cat / "around").symlink_to(root)
    (cat / "a").symlink_to(cat / "b")
    (cat / "b").symlink_to(cat / "a")
    (cat / "6.png").symlink_to(elsewhere / "more" / "5.png")
    with pytest.warns(UserWarning, match="Files left out, .*: 2, such as"):
        train, _ = ImageFolder(str(root), **SIZES).sources()
    assert train.labels.tolist() == [0] * 7 + [1] * 5


def test_files_that_are_no_images_are_counted_once(root):
    for name in ("train/1.png", "train/cat/notes.txt", "train/dog/x.gif", "test/dog/Thumbs.db"):
        (root / name).write_text("no image")
    folder = ImageFolder(str(root), **SIZES)
    with pytest.warns(UserWarning, match="Files left out, .*: 4, such as .*train/1.png"):
        folder.setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (folder.num_classes, len(folder.mean)) == (2, 3)


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(root, in_memory):
    path = root / "train" / "cat" / "9.png"
    for make in (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(root / "nowhere.png"),
        lambda: path.symlink_to(path),
    ):
        make()
        with pytest.raises(ValueError, match=r"Expected .*9.png to be a file but it is a FIFO"):
            ImageFolder(str(root), in_memory=in_memory, **SIZES).setup()
        path.unlink()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mean", [0.1, float("nan"), 0.1]),
        ("mean", [0.1, 0.1, float("inf")]),
        ("mean", [0.1, 0.1, 1e39]),
        ("std", [0.1, 0.1, float("nan")]),
        ("std", [float("inf"), 0.1, 0.1]),
        ("std", [0.1, 0.0, 0.1]),
        ("std", [0.1, -0.1, 0.1]),
        ("std", [0.1, 1e-50, 0.1]),
    ],
)
def test_statistics_that_cannot_normalize_are_refused(name, values):
    with pytest.raises(ValueError, match=f"Expected each value of `{name}` to be finite"):
        ImageFolder("data", **{name: values})
    normalization = [values if name == part else [0.5] * 3 for part in ("mean", "std")]
    with pytest.raises(ValueError, match=r"Expected `normalization` to be \(mean, std\)"):
        Flatness(normalization=normalization)
    with pytest.raises(ValueError, match=r"Expected `normalization` to be \(mean, std\)"):
        WeightAveraging(normalization=normalization)


def test_images_of_one_color_have_no_statistics(root):
    for path in root.glob("*/*/*.png"):
        Image.new("RGB", (8, 6), (9, 9, 9)).save(path)
    with pytest.raises(ValueError, match="Expected pixels that differ in each channel"):
        _ = ImageFolder(str(root), **SIZES).std


def test_gray_images_of_16_bits_are_scaled(root):
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16)
    for path in root.glob("*/*/*.png"):
        Image.fromarray(pixels).save(path)
    image, _ = ImageFolder(str(root), **SIZES).split_dataset("train")[0]
    expected = torch.from_numpy(pixels / 65535).float().expand(3, -1, -1)
    assert torch.allclose(image, expected, atol=0.51 / 255)


def truncate(root):
    path = root / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:60])


def resize(root):
    Image.new("RGB", (9, 6)).save(root / "test" / "dog" / "3.png")


def empty(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def add_class(root):
    (root / "test" / "emu").mkdir()


def remove_test(root):
    (root / "test").rename(root / "validation")


def no_class(root):
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"Expected .*0.png to be an image but it cannot be read"),
        (resize, r"images of one size, 8x6 pixels, but got 9x6 in .*3.png"),
        (empty, r"Expected images in .*dog but got none"),
        (add_class, r"Expected the same classes .* but got 'emu' in one of them only"),
        (remove_test, r"Expected a folder .*test with one folder per class but got none"),
        (no_class, r"Expected one folder per class in .*train but got none"),
    ],
)
def test_a_damaged_folder_is_one_sentence(root, damage, message, in_memory):
    damage(root)
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(root), in_memory=in_memory, **{**SIZES, "num_test": 6}).setup()


def test_too_few_test_images_are_one_sentence(root):
    with pytest.raises(ValueError, match=r"Expected at least 9 test images .* but got 8"):
        ImageFolder(str(root), **{**SIZES, "num_test": 7}).setup()
