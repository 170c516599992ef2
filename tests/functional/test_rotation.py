import pytest
import torch

from robust_flatness.functional.objectives import rotate


def test_label_k_is_k_quarter_turns_counter_clockwise():
    images = torch.rand(4, 3, 5, 5)
    turned = rotate(images, torch.arange(4))
    for k in range(4):
        assert torch.equal(turned[k], torch.rot90(images[k], k, (1, 2)))
    corner = torch.zeros(1, 1, 3, 3)
    corner[0, 0, 0, 2] = 1  # top right
    assert rotate(corner, torch.tensor([1]))[0, 0, 0, 0] == 1  # top left


def test_images_must_be_square():
    with pytest.raises(ValueError, match=r"square images to rotate but got \(4, 5\) pixels"):
        rotate(torch.rand(1, 1, 4, 5), torch.tensor([1]))
