from urllib.error import URLError

import numpy as np
import pytest
import torch

from robust_flatness.datamodules import CIFAR10, CIFAR100


class Stand:
    """What torchvision's class gives, without the download: 50 and 40 images."""

    base_folder = "cifar-10-batches-py"

    def __init__(self, root, train=True, download=False):
        n = 50 if train else 40
        self.data = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(n)]


def failing(error):
    class Failing(Stand):
        def __init__(self, root, train=True, download=False):
            raise error

    return Failing


@pytest.fixture
def cifar10(monkeypatch):
    monkeypatch.setattr(CIFAR10, "dataset", Stand)
    return CIFAR10


def test_images_come_in_torchvision_s_order(cifar10):
    datamodule = cifar10(num_train_eval=5, num_val=6, num_test=7)
    datamodule.prepare_data()
    assert datamodule.split_indices() == {
        "train": list(range(5)),
        "val": list(range(34, 40)),
        "test": list(range(7)),
    }
    image, label = datamodule.split_dataset("val")[0]
    raw = torch.from_numpy(Stand(None, train=False).data[34])
    assert torch.equal(image, raw.permute(2, 0, 1).float() / 255)
    assert label == 4


def test_what_is_known_at_once():
    for cls, classes in ((CIFAR10, 10), (CIFAR100, 100)):
        datamodule = cls("~/nowhere")
        assert (datamodule.num_classes, datamodule.in_channels) == (classes, 3)
        assert len(datamodule.mean) == len(datamodule.std) == 3
        assert datamodule.eps == 8 / 255
        assert (datamodule.augment, datamodule.flip) == ("flip_crop", True)
        assert "~" not in str(datamodule.root)
    assert CIFAR10.dataset is not CIFAR100.dataset


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("Error downloading x")])
def test_no_network_is_one_sentence(monkeypatch, tmp_path, error):
    monkeypatch.setattr(CIFAR10, "dataset", failing(error))
    with pytest.raises(ConnectionError, match=r"to `root` .* copy its folder cifar-10-batches-py"):
        CIFAR10(str(tmp_path)).prepare_data()


def test_no_permission_and_no_copy_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(CIFAR10, "dataset", failing(PermissionError("denied")))
    with pytest.raises(PermissionError, match="Expected `root` to be a folder that can be written"):
        CIFAR10(str(tmp_path)).prepare_data()
    monkeypatch.undo()
    with pytest.raises(
        RuntimeError, match=r"Expected all of CIFAR10 in `root` .* call `prepare_data"
    ):
        CIFAR10(str(tmp_path)).setup()
