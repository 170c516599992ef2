"""What an epoch of adversarial training costs: ours, and the textbook's.

python benchmarks/epoch.py
python benchmarks/epoch.py --profile ours       # where the time goes, by operation
python benchmarks/epoch.py --profile textbook

The textbook's epoch flips and crops single images in a DataLoader, crafts with the textbook's loop
in eval mode, and takes a step of SGD. Ours is that of a trainer with `AT`, a datamodule and the
logger that writes `metrics.csv`, without measures.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_ways import RandomImages
from rounds import Rounds, begin, benchmark_parser
from textbook import TEXTBOOK, textbook_pgd
from timed_trainers import quiet_trainer, train_on
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from robust_flatness.functional.attack import PGD
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.networks import ResNet18

OURS = "ours"
EPS = 8 / 255


class Pictures(Dataset[tuple[Any, int]]):
    """Images that are flipped and cropped one by one.

    Args:
        images: `(N, 3, 32, 32)` of 8 bits.
        labels: `(N,)`.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = [to_pil_image(image) for image in images], labels.tolist()
        crop, flip = transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()
        self.transform = transforms.Compose([crop, flip, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def textbook(count: int, batch: int, width: int) -> Callable[[], object]:
    """An epoch of the textbook."""
    images, labels = RandomImages(count).sources()[0].__getitems__(range(count))
    model = AT(partial(ResNet18, width=width)).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    loader = DataLoader(Pictures(images, labels), batch, shuffle=True, drop_last=True)
    attack = partial(textbook_pgd, eps=EPS, step_size=PGD(EPS).length, steps=7)

    def epoch() -> None:
        for images, labels in loader:
            adversarial, _ = attack(model.eval(), images, labels)
            optimizer.zero_grad()
            cross_entropy(model.train()(adversarial), labels).backward()
            optimizer.step()

    return epoch


def ours(count: int, batch: int, width: int, folder: str) -> Callable[[], object]:
    """An epoch in a trainer, with all that comes before and after it."""
    module, data = AT(partial(ResNet18, width=width)), RandomImages(count, batch_size=batch)
    trainer = quiet_trainer(max_epochs=0, logger=EpochCSVLogger(Path(folder)))
    return partial(train_on, trainer, module, data)


def print_profile(run: Callable[[], object], lines: int) -> None:
    """Prints the operations that take the most time."""
    run()
    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    print(f"{time.process_time() - started:.2f} CPU s")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, or profiles one of the two."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=16, help="of ResNet-18")
    parser.add_argument("--profile", choices=[TEXTBOOK, OURS])
    parser.add_argument("--lines", type=int, default=15, help="of the profile")
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    begin(given)
    sizes = (given.images, given.batch, given.width)
    with tempfile.TemporaryDirectory() as folder:
        tried = {TEXTBOOK: textbook(*sizes), OURS: ours(*sizes, folder)}
        if given.profile:
            print_profile(tried[given.profile], given.lines)
            return
        found = Rounds.of(tried, given.rounds)
    what = f"{given.images} images, batches of {given.batch}, ResNet-18 of width {given.width}"
    found.print_table(f"An epoch of AT with PGD-7: {what}", "CPU s")


if __name__ == "__main__":
    main()
