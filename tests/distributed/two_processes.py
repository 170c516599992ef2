"""Run as a script: trains and measures on two gloo processes and leaves what each rank saw.

Lightning starts the second process itself, as it does for `python cli.py … --trainer.strategy ddp`.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).parent.parent))

from networks_for_tests import snapshot, tiny_body
from trainers import PLAIN, EvalBatchNorm, ToyData, quiet_trainer

from robust_flatness.callbacks import (
    AutoAttack,
    Flatness,
    RobustEarlyStopping,
    RobustEvaluation,
)
from robust_flatness.lightning_modules import ATAWP

CHUNK = 4


class EvalBatchNormAWP(ATAWP, EvalBatchNorm):
    """ATAWP with BatchNorm in eval mode."""


def module(cls, **kwargs):
    torch.manual_seed(0)
    return cls(network=tiny_body, **PLAIN, **kwargs)


def measuring_callbacks():
    light = {"steps": 2, "batch_size": CHUNK}
    return {
        "evaluation": RobustEvaluation(restarts=2, **light),
        "flatness": Flatness(num_perturbations=2, **light),
        "stopping": RobustEarlyStopping(patience=1, **light),
        "autoattack": AutoAttack(chunk_size=CHUNK, version="custom", attacks=["apgd-ce"]),
    }


class Recorder(Callback):
    """What this rank's network was before measuring, and what it logged."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(snapshot(pl_module))


def trained_weights(cls, devices):
    """Weights after training in float64 with the same global batches."""
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=2, devices=devices, strategy=strategy(devices))
    built = module(cls).double()
    trainer.fit(built, ToyData(double=True))
    return {name: p.detach().clone() for name, p in built.named_parameters()}


def strategy(devices):
    return "ddp" if devices > 1 else "auto"


def measured(devices):
    """What every rank measures while BatchNorm statistics drift apart."""
    torch.manual_seed(0)
    callbacks, before = measuring_callbacks(), Recorder()
    trainer = quiet_trainer(
        max_epochs=3,
        devices=devices,
        strategy=strategy(devices),
        callbacks=[before, *callbacks.values()],
    )
    built = module(ATAWP)
    trainer.fit(built, ToyData())
    return {
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "autoattack": callbacks["autoattack"].final_results["final"],
        "before": before.weights[-1],
        "after": snapshot(built),
        "epochs": trainer.current_epoch,
        "best_epoch": callbacks["stopping"].best_epoch,
    }


def main(folder):
    torch.set_num_threads(1)
    results = {
        "at": trained_weights(EvalBatchNorm, 2),
        "awp": trained_weights(EvalBatchNormAWP, 2),
        "measured": measured(2),
    }
    rank = torch.distributed.get_rank()
    torch.save(results, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
