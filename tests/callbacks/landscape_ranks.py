"""Run as a script: curvature and landscapes on two gloo processes, statistics drifting apart."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from networks_for_tests import snapshot, tiny_body
from trainers import PLAIN, ToyData, quiet_trainer

from robust_flatness.callbacks import Curvature, Landscape
from robust_flatness.lightning_modules import AT

CHUNK = 4
LIGHT = {"num_steps": 3, "num_directions": 2, "steps": 2, "surface_steps": 2}


def callbacks():
    kinds = ["random", "adversarial", "hessian"]
    return [Curvature(batch_size=CHUNK), Landscape(directions=kinds, batch_size=CHUNK, **LIGHT)]


def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = AT(tiny_body, **PLAIN)
    trainer = quiet_trainer(
        devices=2, strategy="ddp", callbacks=callbacks(), default_root_dir=folder
    )
    trainer.fit(module, ToyData())
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    rank = torch.distributed.get_rank()
    torch.save({"logged": logged, "weights": snapshot(module)}, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
