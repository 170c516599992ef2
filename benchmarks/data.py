"""Images a second that one core shuffles, flips, crops and turns into floats.

python benchmarks/data.py

Ours is what training does: the datamodules' loader over images in memory and their augmentation of
a whole batch. The others are torchvision's transforms of single images in PyTorch's DataLoader
without workers, as the research repositories have them; with workers they take more cores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rounds import Goal, Rounds, Variant, begin, benchmark_parser, print_goals
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from robust_flatness.datamodules.augmentation import Augment, Augmentation
from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.datamodules.images import ResidentImages, to_unit_range

OURS = "ours"


class Transformed(Dataset[tuple[Tensor, int]]):
    """Single images through a transform, as torchvision's data sets hand them out."""

    def __init__(self, images: Sequence[Any], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), index % 10


def batched(images: Tensor, batch: int, augment: Augment) -> Variant:
    """An epoch of the package's own pipeline."""
    resident = ResidentImages(images, torch.arange(len(images)) % 10)
    batches = GlobalBatches(batch, world_size=1, rank=0, seed=0)
    augmentation = Augmentation(augment, mean=(0.5,) * images.shape[1])
    sampler = batches.sampler(resident, epoch=0)
    loader = DataLoader(resident, batch, sampler=sampler, collate_fn=default_convert)

    def epoch() -> None:
        for number, (chosen, _) in enumerate(loader):
            noise = augmentation.noise(batches, len(chosen), 0, number)
            to_unit_range(augmentation(chosen, noise))

    return epoch


def single(images: Sequence[Any], batch: int, transform: Callable[[Any], Tensor]) -> Variant:
    """An epoch of single images."""
    loader = DataLoader(Transformed(images, transform), batch, shuffle=True, drop_last=True)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def variants(count: int, batch: int) -> dict[str, Variant]:
    """The pipelines by name."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    pictures = [to_pil_image(image) for image in images]
    floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    crop, flip = (32, 4), v2.RandomHorizontalFlip()
    old = v1.Compose([v1.RandomCrop(*crop), v1.RandomHorizontalFlip(), v1.ToTensor()])
    return {
        OURS: batched(images, batch, "flip_crop"),
        "ours, AutoAugment": batched(images, batch, "autoaugment"),
        "transforms v1, PIL": single(pictures, batch, old),
        "transforms v2, PIL": single(
            pictures, batch, v2.Compose([v2.RandomCrop(*crop), flip, *floats])
        ),
        "transforms v2, tensors": single(
            list(images), batch, v2.Compose([v2.RandomCrop(*crop), flip, floats[1]])
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--batch", type=int, default=128)
    given = parser.parse_args(arguments)
    begin(given)
    seen = given.images // given.batch * given.batch
    found = Rounds.of(variants(given.images, given.batch), given.rounds)
    title = f"{given.images} images of 3x32x32 in memory, batches of {given.batch}"
    found.print_table(title, "images a CPU s", lambda seconds: seen / seconds, digits=0)
    rates = [seen / seconds for seconds in found.seconds[OURS]]
    print_goals([Goal(f"{OURS}, images a CPU s", rates, 25_000, at_most=False)])


if __name__ == "__main__":
    main()
