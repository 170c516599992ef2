"""What a loader of the trainer delivers, after its hooks, read in a process of its own.

User code runs in a fork that ends afterwards: whatever it changes there, training never sees it.
Generators, counters, caches, persistent workers and global random state stay as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.trainer.connectors.data_connector import (
    _DataLoaderSource,
    _process_dataloader,
    _request_dataloader,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robust_flatness.callbacks.forked import Refusal, in_fork
from robust_flatness.callbacks.loader_order import Batches, delivered_batches, seed_all

STAGES = {
    "train": RunningStage.TRAINING,
    "val": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
}
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(frozen=True)
class Delivery:
    """Images and labels as the module gets them, on the CPU, and the batches to read them again.

    Attributes:
        images: What `batch[0]` held, float32 or float64 if it was floating point.
        labels: What `batch[1]` held.
        batches: Indices of the images if another process may draw others, else `None`.
    """

    images: Tensor
    labels: Tensor
    batches: Batches | None


def source_of(trainer: Trainer, split: str) -> _DataLoaderSource:
    """Where Lightning takes the loaders of a split from."""
    source: _DataLoaderSource = _loop(trainer, split)._data_source
    return source


def has_loader(trainer: Trainer, split: str) -> bool:
    """Whether the trainer has a loader of a split, or can ask for it."""
    source = source_of(trainer, split)
    return source.instance is not None and source.is_defined()


def has_own_hooks(trainer: Trainer) -> bool:
    """Whether batches pass through transfer hooks that neither Lightning nor this package wrote."""
    selector = trainer._data_connector._datahook_selector
    if selector is None:
        return False
    hooks = (getattr(selector.get_instance(name), name) for name in HOOKS)
    known = ("lightning.", "robust_flatness.")
    return not all(getattr(hook, "__module__", "").startswith(known) for hook in hooks)


def read_delivery(
    trainer: Trainer,
    module: LightningModule,
    split: str,
    count: int,
    *,
    dataset: Dataset[Any] | None = None,
    batches: Batches | None = None,
    fixed: bool = False,
) -> Delivery:
    """Reads the images that a loader delivers first, after `collate_fn` and the transfer hooks.

    Nothing of it is left in this process.

    Args:
        trainer: The trainer.
        module: The module.
        split: `train`, `val` or `test`.
        count: Images, at most.
        dataset: Read in its order, as if a loader without shuffling delivered it in evaluation;
            `None` takes the loader of the split.
        batches: What an earlier delivery said to read again.
        fixed: Whether to refuse images that change, say by augmentation.

    Raises:
        ValueError: If there is no such loader, it cannot be read, or its images are not fixed.
    """
    state = {}
    if module.device.type != "cpu" and has_own_hooks(trainer):
        # A fork has no GPU: hooks find weights and buffers on the CPU.
        tensors = [*module.named_parameters(), *module.named_buffers()]
        state = {name: tensor.detach().cpu() for name, tensor in tensors}

    def read() -> tuple[np.ndarray, np.ndarray, Batches | None]:
        held = _move(module, state)
        trainer.state.stage = RunningStage.VALIDATING if dataset is not None else STAGES[split]
        module.train(trainer.training)
        seed_all(0)
        loader = _loader(trainer, split) if dataset is None else DataLoader(dataset, 128)
        drawn, custom = batches, True
        if drawn is None:
            limit = 1.0 if dataset is not None else getattr(trainer, f"limit_{split}_batches")
            drawn, custom = delivered_batches(loader, limit, count, trainer.world_size)
        seed_all(0)
        shared = _shared_tensors(loader, module)
        images, labels = _read(trainer, module, loader, drawn, count)
        if any(tensor._version != version for tensor, version in shared):
            raise RuntimeError("it changes shared memory")
        if fixed:
            _go_on(trainer, loader)
            again = _read(trainer, module, loader, drawn, count)
            if not all(map(torch.equal, (images, labels), again)):
                raise Refusal(changing(split))
        del held
        return images.numpy(), labels.numpy(), drawn if custom else None

    images, labels, drawn = in_fork(read, f"the loader of `split` {split}")
    return Delivery(torch.from_numpy(images), torch.from_numpy(labels), drawn)


def changing(split: str) -> str:
    """Says that the images of a split are not the same whenever they are read."""
    return (
        f"Expected the images of `split` {split} to be the same whenever they are read but got "
        "others the second time, as random augmentation gives; pass `dataset=` without it."
    )


def _loop(trainer: Trainer, split: str) -> Any:
    if split == "train":
        return trainer.fit_loop
    return trainer.fit_loop.epoch_loop.val_loop if split == "val" else trainer.test_loop


def _loader(trainer: Trainer, split: str) -> DataLoader[Any]:
    """The loader that Lightning iterates, prepared as Lightning would if it has not done so yet."""
    loop, stage = _loop(trainer, split), STAGES[split]
    combined = loop._combined_loader
    if combined is None:
        loaders = _request(trainer, loop._data_source, stage)
        is_combined = isinstance(loaders, CombinedLoader)
        combined = loaders if is_combined else CombinedLoader(loaders, "sequential")
        overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
        if overfit > 0 and split != "test":
            _resolve_overfit_batches(combined, stage)
        fn: Any = trainer.state.fn
        combined.flattened = [
            _process_dataloader(trainer, fn, stage, loader) for loader in combined.flattened
        ]
    # A single evaluation loader may come in a list; of training the list is part of the batch.
    loader = combined.iterables
    if split != "train" and len(combined.flattened) == 1:
        loader = combined.flattened[0]
    kind, ways = type(loader).__name__, "pass `dataset=`, or another `split`."
    if not isinstance(loader, DataLoader):
        raise Refusal(f"Expected a DataLoader for `split` {split} but got {kind}; {ways}")
    if isinstance(loader.dataset, IterableDataset):
        raise Refusal(
            f"Expected the loader of `split` {split} to have a dataset with indices but got the "
            f"IterableDataset {type(loader.dataset).__name__}; {ways}"
        )
    iterates = (getattr(type(loader), name) for name in ("__iter__", "_get_iterator"))
    if (*iterates,) != (DataLoader.__iter__, DataLoader._get_iterator):
        raise Refusal(
            f"Expected the loader of `split` {split} to iterate as DataLoader does but got a "
            f"{kind}, which may change the batches; {ways}"
        )
    return loader


def _request(trainer: Trainer, source: _DataLoaderSource, stage: RunningStage) -> Any:
    try:
        return _request_dataloader(source)
    except Exception:
        # In `fit` Lightning has not set up a datamodule for the test.
        if stage != RunningStage.TESTING or not isinstance(source.instance, LightningDataModule):
            raise
        source.instance.setup("test")
        return _request_dataloader(source)


def _read(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    batches: Batches,
    count: int,
) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in _collated(loader, batches):
        if isinstance(trainer.precision_plugin, DoublePrecision):
            # Half precision would round pixels before normalisation is undone.
            batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = module._apply_batch_transfer_handler(batch, torch.device("cpu"), dataloader_idx=0)
        pair = list(batch[:2]) if isinstance(batch, (list, tuple)) else []
        if len(pair) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in pair):
            found = [getattr(part, "dtype", type(part).__name__) for part in pair]
            raise Refusal(
                "Expected batches that begin with images and labels, both tensors, but got "
                f"{type(batch).__name__} {found or ''}; pass `dataset=`."
            )
        for parts, part in zip((images, labels), pair):
            wide = part.is_floating_point() and part.dtype != torch.float64
            parts.append((part.float() if wide else part).detach().cpu())
        if sum(map(len, images)) >= count:
            break
    if not images:
        raise Refusal("Expected the loader to deliver images but got an empty one.")
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def _shared_tensors(loader: DataLoader[Any], module: LightningModule) -> list[tuple[Tensor, int]]:
    """Tensors in shared memory that the user's objects hold, with their versions."""
    owners = [loader.sampler, loader.batch_sampler, loader.collate_fn, module, loader.dataset]
    while (inner := getattr(owners[-1], "dataset", None)) is not None:
        owners.append(inner)
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    shared = [value for value in values if isinstance(value, Tensor) and value.is_shared()]
    return [(tensor, tensor._version) for tensor in shared]


def _collated(loader: DataLoader[Any], batches: Batches) -> Iterator[Any]:
    """The batches as they leave `collate_fn`, read in this process."""
    if loader.num_workers and loader.worker_init_fn is not None:
        loader.worker_init_fn(0)
    indices: dict[str, Any] = {"batch_sampler": batches}
    if loader.batch_sampler is None:
        indices = {"batch_size": None, "sampler": [index for batch in batches for index in batch]}
    return iter(DataLoader(loader.dataset, collate_fn=loader.collate_fn, **indices))


def _go_on(trainer: Trainer, loader: DataLoader[Any]) -> None:
    """Goes to a later moment of training, in which augmentation would be another."""
    seed_all(1)
    fit_loop = trainer.fit_loop
    fit_loop.epoch_progress.increment_by(1)
    fit_loop.epoch_loop.batch_progress.increment_by(1)
    fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_by(1)
    fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_by(1)
    part: Any = loader.dataset
    while part is not None:
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(trainer.current_epoch)
        elif isinstance(getattr(part, "epoch", None), int):
            part.epoch += 1
        part = getattr(part, "dataset", None)


def _move(module: LightningModule, state: dict[str, Tensor]) -> list[Tensor]:
    """Puts tensors on the CPU in place of a module's own, and returns these to be kept."""
    held = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in state:
            held.append(tensor.data)
            tensor.data = state[name]
    if state:
        module._device = torch.device("cpu")
    return held
