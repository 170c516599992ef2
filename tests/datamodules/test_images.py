import pytest
import torch
from torch.utils.data import DataLoader, default_convert

from robust_flatness.datamodules import LabeledImages, ResidentImages
from robust_flatness.datamodules.images import (
    EvaluationImages,
    channel_statistics,
    to_unit_range,
)


def random_images(n=10, channels=3):
    images = torch.randint(256, (n, channels, 4, 5), dtype=torch.uint8)
    return ResidentImages(images, torch.arange(n))


class OneByOne(LabeledImages):
    """Images that can only be asked for, as those in files."""

    def __init__(self, images):
        self.held, self.labels, self.largest = images, images.labels, 0

    def __getitems__(self, indices):
        self.largest = max(self.largest, len(indices))
        return self.held.__getitems__(indices)

    def subset(self, indices):
        return OneByOne(self.held.subset(indices))


def test_a_loader_gets_whole_batches():
    data = random_images()
    batches = list(DataLoader(data, 4, collate_fn=default_convert))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.images)
    assert batches[0][0].dtype is torch.uint8


def test_subsets_keep_the_order_asked_for():
    data = random_images()
    part = data.subset([7, 0, 3])
    assert part.labels.tolist() == [7, 0, 3]
    assert torch.equal(part.images, data.images[[7, 0, 3]])
    image, label = part[1]
    assert label == 0
    assert torch.equal(image, data.images[0])


def test_loading_reads_in_chunks_and_keeps_the_order():
    data = random_images()
    source = OneByOne(data)
    loaded = ResidentImages.load(source, chunk=3)
    assert torch.equal(loaded.images, data.images)
    assert torch.equal(loaded.labels, data.labels)
    assert source.largest == 3
    assert ResidentImages.load(data) is data


def test_evaluation_images_are_floats_in_order():
    data = random_images()
    view = EvaluationImages(data)
    items = list(view)
    assert len(items) == len(view) == 10
    assert [label for _, label in items] == list(range(10))
    assert all(type(label) is int for _, label in items)
    assert all(image.dtype is torch.float32 for image, _ in items)
    assert torch.equal(torch.stack([image for image, _ in items]), to_unit_range(data.images))
    assert data.images.dtype is torch.uint8


def test_unit_range_is_exact_at_both_ends():
    values = to_unit_range(torch.arange(256, dtype=torch.uint8))
    assert torch.equal(values, torch.arange(256) / 255)
    assert (values[0], values[-1]) == (0, 1)


def test_pixels_in_unit_range_are_rounded():
    pixels = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).view(1, 1, 2, 2)
    data = ResidentImages.from_unit_range(pixels, torch.tensor([0]))
    assert data.images.flatten().tolist() == [0, 0, 1, 255]


def test_statistics_are_those_of_the_pixels_for_any_chunk():
    data = random_images()
    pixels = data.images.double() / 255
    mean, std = channel_statistics(data, chunk=3)
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-9)
    assert (mean, std) == channel_statistics(OneByOne(data))
    assert {type(value) for value in mean + std} == {float}


def test_bad_images_are_refused():
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match=r"type torch.uint8 but got \(1, 1, 2, 2\) and torch.fl"):
        ResidentImages(torch.zeros(1, 1, 2, 2), labels)
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\) .* but got \(1, 2, 2\)"):
        ResidentImages(torch.zeros(1, 2, 2, dtype=torch.uint8), labels)
    with pytest.raises(ValueError, match=r"`labels` to be 2 integers but got shape \(1,\)"):
        ResidentImages(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), labels)
    with pytest.raises(ValueError, match=r"`labels` to be 1 integers .* torch.float32"):
        ResidentImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.tensor([0.5]))
    for low, high in [(-0.5, 1.0), (0.0, 255.0), (float("nan"), 1.0)]:
        with pytest.raises(ValueError, match=r"Expected pixels in \[0, 1\] but got pixels in"):
            ResidentImages.from_unit_range(torch.tensor([low, high]).view(1, 1, 1, 2), labels)
    with pytest.raises(ValueError, match="Expected pixels that differ in each channel"):
        channel_statistics(ResidentImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), labels))
