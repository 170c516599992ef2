"""Run as a script: two gloo processes whose collectives refuse tensors of the CPU, as NCCL does.

The device is the one of `pretend_device`. Collectives that Python calls are checked; those inside
PyTorch, such as DDP's buckets and `broadcast_object_list`, choose their device themselves.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

from distributed.two_processes import VARIANTS, measuring_callbacks, module, training_callbacks
from networks_for_tests import snapshot
from pretend_device import is_marked, pretended_device
from trainers import ToyData, dataset, quiet_trainer

from robust_flatness.callbacks import WeightAveraging
from robust_flatness.lightning_modules import ATAWP

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "reduce", "gather", "scatter")
TRAINED = ("label noise", "awp", "entropy sgd", "callbacks")


@contextmanager
def refusing(monkeypatch):
    """Collectives raise on tensors that are not on the device; yields how often each was called."""
    calls = Counter()

    def checked(name, collective, *args, **kwargs):
        if not all(
            is_marked(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        ):
            raise RuntimeError(f"No backend type associated with device type cpu ({name}).")
        calls[name] += 1
        return collective(*args, **kwargs)

    for name in COLLECTIVES:
        collective = getattr(torch.distributed, name)
        monkeypatch.setattr(torch.distributed, name, partial(checked, name, collective))
    yield calls


def fitted(built, **kwargs):
    trainer = quiet_trainer(devices=2, strategy="ddp", **kwargs)
    data = ToyData(8)
    # A chunk for each process.
    data.measured = dataset(6)
    trainer.fit(built, data)
    return trainer


def main(folder):
    torch.set_num_threads(1)
    monkeypatch, results = pytest.MonkeyPatch(), {}
    with pretended_device(monkeypatch), refusing(monkeypatch) as calls:
        for variant in TRAINED:
            cls, arguments = VARIANTS[variant]
            built = module(cls, **arguments)
            fitted(built, callbacks=training_callbacks() if variant == "callbacks" else [])
            results[variant] = snapshot(built)
        results["trained by"], callbacks = dict(calls), measuring_callbacks()
        averaging = WeightAveraging(0.9, reference_steps=None)
        trainer = fitted(
            module(ATAWP),
            callbacks=[averaging, *callbacks.values()],
            default_root_dir=folder,
        )
        metrics = trainer.callback_metrics.items()
        results["logged"] = {name: value.item() for name, value in metrics}
        results["calls"] = dict(calls)
        try:
            torch.distributed.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            results["refused"] = str(error)
    monkeypatch.undo()
    rank = torch.distributed.get_rank()
    torch.save(results, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
