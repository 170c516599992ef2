import pytest
import torch
from PIL import Image
from toy_datamodule import record

from robust_flatness.datamodules import ImageFolder

SIZES = {"num_train_eval": 6, "num_val": 2, "num_test": 4, "batch_size": 4}


@pytest.fixture
def root(tmp_path):
    """Two classes of five training and four test images, with a colour that tells each."""
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
    pixels = torch.stack(
        [
            image
            for image, _ in ImageFolder(str(root), **{**SIZES, "num_train_eval": 10}).split_dataset(
                "train"
            )
        ]
    ).double()
    assert folder.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert folder.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_statistics_given_are_taken_and_nothing_is_read(tmp_path):
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


def test_only_images_count_and_grey_ones_become_rgb(root):
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._0.png").write_text("no image")
    (root / "train" / ".cache").mkdir()
    Image.new("L", (8, 6), 200).save(root / "train" / "cat" / "grey.png")
    train, _ = ImageFolder(str(root), **SIZES).sources()
    assert len(train) == 11
    assert train[5][0][:, 3, 3].tolist() == [200, 200, 200]


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"Expected .*0.png to be an image but it cannot be read"),
        (resize, r"images of one size, 8x6 pixels, but got 9x6 in .*3.png"),
        (empty, r"Expected images in .*dog but got none"),
        (add_class, r"Expected the same classes .* but got 'emu' in one of them only"),
        (remove_test, r"Expected a folder .*test with one folder a class but got none"),
        (no_class, r"Expected one folder a class in .*train but got none"),
    ],
)
def test_a_damaged_folder_is_one_sentence(root, damage, message):
    damage(root)
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(root), **SIZES).setup()


def test_too_few_test_images_are_one_sentence(root):
    with pytest.raises(ValueError, match=r"Expected at least 9 test images .* but got 8"):
        ImageFolder(str(root), **{**SIZES, "num_test": 7}).setup()
