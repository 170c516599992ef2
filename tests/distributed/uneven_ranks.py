"""Run as a script on two gloo processes, of which one has fewer images than the other, or none."""

import random
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

sys.path.insert(0, str(Path(__file__).parent.parent))

from networks_for_tests import snapshot, tiny_body
from trainers import PLAIN, dataset, loader, quiet_trainer

from robust_flatness.callbacks import (
    AutoAttack,
    Curvature,
    EpochMeasure,
    Flatness,
    Landscape,
    RobustEarlyStopping,
    RobustEvaluation,
    WorstCaseFlatness,
)
from robust_flatness.lightning_modules import ATAWP
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.measures import AdaptiveSharpness, AutoAttackError

CHUNK, FEW, ODD, EPS = 4, 3, 21, 0.02


def module():
    torch.manual_seed(0)
    return ATAWP(network=tiny_body, **PLAIN)


def measuring_callbacks():
    """Measures of a set that is a single chunk: the second process has no image."""
    few = {"dataset": dataset(FEW, seed=5), "batch_size": CHUNK}
    light = {**few, "steps": 2, "eps": 0.1}
    shape = {"num_steps": 2, "num_directions": 1, "surface_steps": 2}
    return {
        "evaluation": RobustEvaluation(restarts=2, **light),
        "flatness": Flatness(num_perturbations=2, **light),
        "worst": WorstCaseFlatness(restarts=2, xi=0.05, **light),
        "curvature": Curvature(**few),
        "sharpness": EpochMeasure(
            measure=AdaptiveSharpness(num_perturbations=2, steps=2, eps=0.1, batch_size=CHUNK),
            dataset=few["dataset"],
        ),
        # Every image is misclassified under such an attack, so the first epoch stays the best.
        "stopping": RobustEarlyStopping(patience=1, **{**light, "eps": 1.0}),
        "landscape": Landscape(directions=["random", "adversarial"], **shape, **light),
        "autoattack": Attack(dataset=few["dataset"]),
    }


class Counting(AutoAttackError):
    """Counts the chunks that this process attacks."""

    attacked = 0

    def attack(self, *args):
        self.attacked += 1
        return super().attack(*args)


class Attack(AutoAttack):
    """Counts the chunks that this process attacks, and those that are kept."""

    kind = Counting

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.measure = self.kind(attacks=["apgd-ce"], chunk_size=CHUNK, eps=EPS)
        self.kept = -1

    @property
    def attacked(self):
        return self.measure.attacked

    def teardown(self, trainer, pl_module, stage):
        # All have measured, and none has cleared away yet.
        trainer.strategy.barrier()
        folder = self.measure.folder
        self.kept = len(list(folder.glob("*.npz"))) if folder is not None else 0
        trainer.strategy.barrier()
        super().teardown(trainer, pl_module, stage)


class Recorder(Callback):
    """The network as it is measured at the end of each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(snapshot(pl_module))


def attacked_data():
    """21 images that the network is right about, in 6 chunks, the last of one image."""
    images, _ = dataset(ODD, seed=5)[:]
    network = module().eval()
    with torch.no_grad():
        return TensorDataset(images, network(images).argmax(1))


def attack(folder, callback=None, **trainer):
    """AutoAttack with a run folder, as `test` runs it; the callback, and its figures."""
    callback = Attack(dataset=attacked_data()) if callback is None else callback
    tester = quiet_trainer(logger=EpochCSVLogger(folder), callbacks=[callback], **trainer)
    tester.test(module(), DataLoader(attacked_data(), CHUNK), verbose=False)
    return callback


def trained():
    """Training on 21 images in batches of 8, which two processes cannot share evenly."""
    before, callbacks = Recorder(), measuring_callbacks()
    folder = Path(sys.argv[1]) / "trained"
    trainer = quiet_trainer(
        max_epochs=5,
        devices=2,
        strategy="ddp",
        callbacks=[before, *callbacks.values()],
        default_root_dir=folder,
    )
    built = module()
    trainer.fit(built, loader(ODD))
    return {
        "epochs": trainer.current_epoch,
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "autoattack": callbacks["autoattack"].final_results["final"],
        "attacked": callbacks["autoattack"].attacked,
        "best_epoch": callbacks["stopping"].best_epoch,
        "before": before.weights[-1],
        "weights": {name: p.detach().clone() for name, p in built.named_parameters()},
    }


class Backwards(Sampler):
    """Somebody else's sampler."""

    def __iter__(self):
        return iter(range(ODD - 1, -1, -1))

    def __len__(self):
        return ODD


class Unseeded(Backwards):
    """Draws what no other process draws."""

    def __iter__(self):
        return iter(random.Random().sample(range(ODD), ODD))


class Validating(ATAWP):
    """Validates, on a loader for which ranks wait for each other, or which they agree on."""

    val, agrees = None, False

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        self.trainer.strategy.barrier()
        if self.agrees:
            torch.distributed.all_reduce(torch.zeros(1))
        return self.val


PART = [7, 2, 9, 4, 1]
# How a loader is made from 21 images and the rank, what the trainer is told, and what is measured.
FOREIGN = {
    "in order": (lambda d, r: DataLoader(d, 4), {}, list(range(ODD))),
    "shuffled": (lambda d, r: DataLoader(d, 4, shuffle=True), {}, list(range(ODD))),
    "part": (lambda d, r: DataLoader(d, 2, sampler=SubsetRandomSampler(PART)), {}, PART),
    "custom": (lambda d, r: DataLoader(d, 4, sampler=Backwards()), {}, list(range(20, -1, -1))),
    "limited": (lambda d, r: DataLoader(d, 4), {"limit_val_batches": 2}, list(range(16))),
    "last dropped": (lambda d, r: DataLoader(d, 4, drop_last=True), {}, list(range(16))),
    "not injected": (
        lambda d, r: DataLoader(d, sampler=DistributedSampler(d, 2, r, seed=3), batch_size=4),
        {},
        list(range(ODD)),
    ),
    "batch sampler": (
        lambda d, r: DataLoader(d, batch_sampler=BatchSampler(SubsetRandomSampler(PART), 2, False)),
        {"use_distributed_sampler": False},
        PART,
    ),
    "custom batch sampler": (
        lambda d, r: DataLoader(
            d, batch_sampler=Reversed(DistributedSampler(d, 2, r, shuffle=False), 3, False)
        ),
        {"use_distributed_sampler": False},
        # Batches 0, 2, 4 and 1, 3, 5 of the ranks backwards, row by row.
        [4, 5, 2, 3, 0, 1, 10, 11, 8, 9, 6, 7, 16, 17, 14, 15, 12, 13, 20, 18, 19],
    ),
    "shares": (
        lambda d, r: DataLoader(dataset(12, seed=r), 4),
        {"use_distributed_sampler": False},
        "all ranks to measure the same images",
    ),
    "unseeded": (
        lambda d, r: DataLoader(d, 4, sampler=Unseeded()),
        {},
        "all ranks to measure the same images",
    ),
    "one broken": (
        lambda d, r: DataLoader(TensorDataset(d.tensors[0] + r, d.tensors[1]), 4),
        {},
        "pixels in [0, 1]",
    ),
    "late": (lambda d, r: DataLoader(d, 4), {"limit_val_batches": 0}, list(range(ODD))),
    "agreeing": (lambda d, r: DataLoader(d, 4), {"limit_val_batches": 0}, "with other ranks"),
}


class Reversed(BatchSampler):
    """Turns each batch around."""

    def __iter__(self):
        return (batch[::-1] for batch in super().__iter__())


def foreign_images():
    """Which of 21 images two processes measure, or why they do not."""
    found, data = {}, dataset(ODD, seed=5)
    for name, (make, options, _) in FOREIGN.items():
        measure = RobustEvaluation(split="val", steps=1, eps=0.1)
        settings = {"limit_train_batches": 1, "devices": 2, "strategy": "ddp", **options}
        trainer = quiet_trainer(callbacks=[measure], **settings)
        built = Validating(network=tiny_body, **PLAIN)
        built.val, built.agrees = make(data, trainer.global_rank), name == "agreeing"
        try:
            trainer.fit(built, loader(8))
        except ValueError as error:
            found[name] = str(error)
        else:
            images = measure.examples(trainer, built).images
            same_pixels = (data.tensors[0] == image for image in images)
            found[name] = [int(same.flatten(1).all(1).nonzero()) for same in same_pixels]
    return found


def main(folder):
    torch.set_num_threads(1)
    results = {"trained": trained(), "foreign": foreign_images()}
    # The run folder is that of rank 0: the other's name for it is wrong on purpose.
    rank = torch.distributed.get_rank()
    resumed = attack(Path(folder) / ("run" if rank == 0 else "wrong"), devices=2, strategy="ddp")
    results["resumed"] = {
        "attacked": resumed.attacked,
        "kept": resumed.kept,
        "verdicts": resumed.final_arrays["final/test/autoattack_correct"],
    }
    torch.save(results, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
