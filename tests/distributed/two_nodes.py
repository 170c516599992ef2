"""Run as a script on each node: the command line, and what this node's process had at the end."""

import sys
from pathlib import Path

import torch

from robust_flatness import cli

made = []


class Remembered(cli.CLI):
    """Keeps the trainer that it makes."""

    def instantiate_trainer(self, **kwargs):
        made.append(super().instantiate_trainer(**kwargs))
        return made[-1]


def main(folder, arguments):
    torch.set_num_threads(1)
    cli.main(arguments, Remembered)
    (trainer,) = made
    weights = {name: p.detach() for name, p in trainer.lightning_module.named_parameters()}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    final = {
        type(callback).__name__: callback.final_results
        for callback in trainer.callbacks
        if hasattr(callback, "final_results")
    }
    found = {"logged": logged, "final": final, "weights": weights, "world": trainer.world_size}
    torch.save(found, Path(folder) / f"node{trainer.node_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
