"""Random networks, trained with and without all measuring callbacks.

    python tests/soak/random_networks.py --count 100

Training ends in the same bits, global random states are equal, RErr is at least the error, and
flatness is finite; or a measure refuses the network in one sentence. The results are written to
`results/random_networks.md`; the suite trains 12 networks, `callbacks/test_random_networks.py`.
"""

import argparse
import logging
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from random_layers import random_network
from soak_results import progress, write_results
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from robust_flatness.callbacks import (
    AutoAttack,
    Curvature,
    EpochMeasure,
    FinalEvaluation,
    Flatness,
    Landscape,
    RobustEarlyStopping,
    RobustEvaluation,
    Trajectory,
    WorstCaseFlatness,
)
from robust_flatness.measures import AdaptiveSharpness, FirstOrderFlatness

FAILURES = {"failed", "crashed", "does not train"}
EXPECTED = (
    *("val/robust_error", "val/robust_loss", "flatness/average/val", "flatness/worst/val"),
    *("final/val/robust_error", "final/flatness/average/val", "final/val/autoattack_error"),
)


class Plain(LightningModule):
    """A module of somebody else: cross-entropy, and the optimizer that is drawn."""

    def __init__(self, network: nn.Module, optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.network(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """Logs a metric that stock callbacks could monitor."""
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """The optimizer of the parameters that are trained."""
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def measures() -> list[Callback]:
    """Every callback that measures, as light as it goes, on two chunks of images."""
    watch: dict[str, Any] = {"split": "val", "num_examples": 6, "eps": 0.1, "batch_size": 4}
    attacked = {**watch, "steps": 1}
    line: dict[str, Any] = {"directions": ["random"], "num_directions": 1, "num_steps": 2}
    attack = {name: value for name, value in watch.items() if name != "batch_size"}
    curvature = {name: value for name, value in watch.items() if name != "eps"}
    return [
        RobustEvaluation(**attacked),
        Flatness(**attacked, num_perturbations=2),
        WorstCaseFlatness(**{**attacked, "num_examples": 4}, restarts=1),
        Curvature(**{**curvature, "num_examples": 4}, tolerance=0.5, every_n_epochs=2),
        *(
            EpochMeasure(measure=measure, split="val", num_examples=4, every_n_epochs=2)
            for measure in (
                AdaptiveSharpness(case="worst", weight_steps=1, parameters="all", eps=0.1, steps=1),
                FirstOrderFlatness(weight_steps=1, loss="clean"),
            )
        ),
        RobustEarlyStopping(**{**attacked, "split": "train"}),
        Trajectory(figures=False),
        Landscape(**{**attacked, "num_examples": 4}, **line),
        FinalEvaluation(
            splits=["val"], num_examples=4, eps=0.1, steps=1, restarts=2, num_perturbations=1
        ),
        AutoAttack(**{**attack, "num_examples": 2}, version="custom", attacks=["apgd-ce"]),
    ]


@dataclass
class Trained:
    """What is left of a training: tensors, global random states and logged metrics."""

    state: dict[str, Tensor]
    randoms: tuple[Any, ...]
    metrics: dict[str, float]


def train(seed: int, callbacks: Sequence[Callback]) -> Trained:
    """Trains the network of a seed for two epochs, in a folder that is removed.

    Args:
        seed: Of the network, the data, the optimizer and the training.
        callbacks: That watch.
    """
    draw = random.Random(seed)
    network, channels, classes = random_network(draw)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(26, channels, 8, 8, generator=generator)
    labels = torch.randint(classes, (26,), generator=generator)
    parts = TensorDataset(images[:16], labels[:16]), TensorDataset(images[16:], labels[16:])
    optimizers: list[Callable[..., Any]] = [
        lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, 1e-3),
    ]
    module = Plain(network, draw.choice(optimizers))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=draw.choice([0, 2]),
            gradient_clip_val=1.0,
            callbacks=list(callbacks),
        )
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        trainer.fit(module, DataLoader(parts[0], 8, shuffle=True), DataLoader(parts[1], 5))
    # Buffers that no state dict holds count too.
    state = {**module.state_dict(), **dict(module.named_buffers())}
    torch_state = torch.get_rng_state().numpy().tobytes()
    randoms = (torch_state, str(np.random.get_state()), random.getstate())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for callback in callbacks:
        for part, values in (getattr(callback, "final_results", None) or {}).items():
            metrics |= {f"{part}/{name}": float(value) for name, value in values.items()}
    return Trained({k: v.detach().clone() for k, v in state.items()}, randoms, metrics)


def faults(plain: Trained, watched: Trained) -> list[str]:
    """What differs between both trainings, and what no measure may say."""
    found = []
    same = plain.state.keys() == watched.state.keys()
    if not same:
        found.append("other tensors than without measures")
    moved = [k for k in plain.state if same and not _equal(plain.state[k], watched.state[k])]
    if moved:
        found.append(f"measuring changed {', '.join(moved[:4])}")
    names = ("torch's", "NumPy's", "Python's")
    randoms = zip(names, plain.randoms, watched.randoms)
    found += [f"{name} random state moved" for name, one, other in randoms if one != other]
    metrics = watched.metrics
    for prefix in ("val", "final/val", "early_stopped/val"):
        error, robust = (metrics.get(f"{prefix}/{name}") for name in ("error", "robust_error"))
        if error is not None and robust is not None and robust < error:
            found.append(f"{prefix}: RErr {robust} below the error {error}")
    found += [f"{name} was not logged" for name in EXPECTED if name not in metrics]
    finite = all(torch.isfinite(v).all() for v in plain.state.values() if v.is_floating_point())
    if finite:
        bad = [k for k, v in metrics.items() if "flatness" in k and not math.isfinite(v)]
        found += [f"{name} is {metrics[name]}" for name in bad]
    return found


def outcome(seed: int) -> tuple[str, str]:
    """Trains the network of a seed twice; returns the outcome, and what it is about."""
    try:
        plain = train(seed, [])
    except Exception as error:  # A network that does not train is a fault of the generator.
        return "does not train", f"{type(error).__name__}: {error}"
    try:
        watched = train(seed, measures())
    except ValueError as error:
        refused = str(error).startswith("Expected") and len(str(error).splitlines()) == 1
        return "refused in a sentence" if refused else "crashed", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found = faults(plain, watched)
    return ("failed", "; ".join(found)) if found else ("equal", "")


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains many networks and writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for part in ("fabric", "pytorch", "pytorch.utilities.rank_zero"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    outcomes, details = {}, []
    for number in range(given.count):
        seed = given.first + number
        network = repr(random_network(random.Random(seed))[0]).replace("\n", "")
        outcomes[f"network {seed}"], text = outcome(seed)
        progress(number + 1, given.count, f"{outcomes[f'network {seed}']} {text}"[:200])
        if text:
            details.append(f"network {seed}: {text[:300]} `{' '.join(network.split())[:600]}`")
    title = "Random networks watched and unwatched"
    return write_results("random_networks", title, outcomes, details, FAILURES)


if __name__ == "__main__":
    sys.exit(main())
