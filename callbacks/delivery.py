"""What a loader of the trainer delivers, after its hooks, read in a fork of the process.

User code runs in a fork that ends afterwards: whatever it changes there, training never sees it.
Generators, counters, caches, persistent workers and global random state stay as they are.
"""

import builtins
import io
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.heap import BufferWrapper
from numbers import Integral
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

from robust_flatness.callbacks.loader_order import Batches, Refusal, delivered_batches, seed_all

STAGES = {
    "train": RunningStage.TRAINING,
    "val": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
}
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
EXCHANGES = ("all_gather", "all_gather_object", "all_reduce", "broadcast", "broadcast_object_list")
# Seconds that reading may take.
TIMEOUT = 600
_OPEN = open


@dataclass(frozen=True)
class Delivery:
    """Images and labels as the module gets them, on the CPU.

    Attributes:
        images: What `batch[0]` held, float32 or float64 if it was floating point.
        labels: What `batch[1]` held.
        batches: Indices of the images if another process may draw others, else None.
    """

    images: Tensor
    labels: Tensor
    batches: Batches | None


def source_of(trainer: Trainer, split: str) -> _DataLoaderSource:
    """Returns where Lightning takes the loaders of a split from."""
    source: _DataLoaderSource = _loop(trainer, split)._data_source
    return source


def has_own_hooks(trainer: Trainer) -> bool:
    """Returns whether batches pass through transfer hooks of the user."""
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

    Args:
        trainer: The trainer.
        module: The module.
        split: `train`, `val` or `test`.
        count: Number of images, at most.
        dataset: Read in its order, as if a loader without shuffling delivered it in evaluation;
            None takes the loader of the split.
        batches: `batches` of an earlier delivery, to read the same images.
        fixed: Whether to refuse images that change, say by augmentation.

    Raises:
        ValueError: If there is no such loader, it cannot be read, or its images are not fixed.
    """
    # A fork has no GPU: hooks get weights and buffers on the CPU.
    moved = module.device.type != "cpu" and has_own_hooks(trainer)
    tensors = [*module.parameters(), *module.buffers()] if moved else []
    copies = [tensor.detach().cpu() for tensor in tensors]

    def read() -> tuple[np.ndarray, np.ndarray, Batches | None]:
        held = [tensor.data for tensor in tensors]
        for tensor, copy in zip(tensors, copies):
            tensor.data, module._device = copy, torch.device("cpu")
        trainer.state.stage = RunningStage.VALIDATING if dataset is not None else STAGES[split]
        module.train(trainer.training)
        seed_all(0)
        loader = _loader(trainer, split) if dataset is None else DataLoader(dataset, 128)
        drawn, is_random = batches, True
        if drawn is None:
            limit = 1.0 if dataset is not None else getattr(trainer, f"limit_{split}_batches")
            drawn, is_random = delivered_batches(loader, limit, count, trainer.world_size)
        seed_all(0)
        shared = _shared_tensors(loader, module)
        images, labels = _read(trainer, module, loader, drawn, count)
        if any(tensor._version != version for tensor, version in shared):
            raise RuntimeError("it changes shared memory")
        if fixed:
            _advance(trainer, loader)
            again = _read(trainer, module, loader, drawn, count)
            if not all(map(torch.equal, (images, labels), again)):
                raise Refusal(changing(split))
        del held
        return images.numpy(), labels.numpy(), drawn if is_random else None

    images, labels, drawn = in_fork(read, f"the loader of `split` {split}")
    return Delivery(torch.from_numpy(images), torch.from_numpy(labels), drawn)


def changing(split: str) -> str:
    """Returns the message for images that are not the same whenever they are read."""
    return (
        f"Expected the images of `split` {split} to be the same whenever they are read but got "
        "others the second time, as random augmentation gives; pass `dataset=` without it."
    )


def in_fork(read: Callable[[], Any], what: str) -> Any:
    """Calls a function in a fork of this process, which keeps whatever else the function does.

    Args:
        read: Runs without gradients, on one thread and no GPU. It may not exchange anything with
            other processes, nor change files or shared memory. What it returns is pickled.
        what: What it reads, for the message.

    Raises:
        ValueError: With the sentence of a `Refusal`, or if `read` fails in another way.

    Example:
        >>> log = []
        >>> in_fork(lambda: log.append(1) or len(log), "a log"), log
        (1, [])
    """
    answer: Any = None
    problem: Refusal | str | None = "forks are not available here"
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(read, sender))
        try:
            with warnings.catch_warnings():
                # Python warns of forks beside other threads; loaders with workers fork as well.
                warnings.simplefilter("ignore")
                process.start()
            sender.close()
            # A lock that another thread holds stays locked in a fork.
            if receiver.poll(TIMEOUT):
                answer, problem = receiver.recv()
                process.join()
            else:
                problem = f"no answer in {TIMEOUT} s"
                process.kill()
        except EOFError:
            problem = "its process died"
        except (AssertionError, OSError) as error:
            problem = str(error)
        finally:
            receiver.close()
    if isinstance(problem, Refusal):
        raise problem
    if problem:
        raise ValueError(
            f"Expected to read {what} in a fork of this process, so that training does not "
            f"notice, but that failed ({problem}); pass `dataset=`."
        )
    return answer


def _answer(read: Callable[[], Any], sender: Connection) -> None:
    # What a loader prints, it prints in training.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable()
    warnings.simplefilter("ignore")
    # A fork has one thread, and other processes do not wait for it.
    torch.set_num_threads(1)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a loader or hook exchanges tensors with other ranks")

    for name in EXCHANGES:
        setattr(torch.distributed, name, refuse)
    setattr(torch.distributed, "barrier", lambda *_, **__: None)  # noqa: B010
    # What a fork writes to files or to shared memory stays.
    builtins.open = io.open = _open_to_read
    answer: Any = None
    problem: Refusal | str | None = None
    try:
        before = _shared_numbers()
        with torch.inference_mode(False), torch.no_grad():
            answer = read()
        if _shared_numbers() != before:
            raise RuntimeError("it changes shared memory")
    except Refusal as error:
        problem = error
    except BaseException as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    sender.send((answer, problem))


def _open_to_read(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if set(mode) & set("wax+") and file != os.devnull:
        raise RuntimeError(f"it writes to {file}")
    return _OPEN(file, mode, *args, **kwargs)


def _shared_numbers() -> list[bytes]:
    """What the `Value`s and `Array`s of multiprocessing hold."""
    arenas = getattr(getattr(BufferWrapper, "_heap", None), "_arenas", [])
    return [bytes(arena.buffer) for arena in arenas]


def _loop(trainer: Trainer, split: str) -> Any:
    if split == "train":
        return trainer.fit_loop
    return trainer.fit_loop.epoch_loop.val_loop if split == "val" else trainer.test_loop


def _loader(trainer: Trainer, split: str) -> DataLoader[Any]:
    """The loader that Lightning iterates, prepared as Lightning would if it has not done so yet."""
    loop, stage = _loop(trainer, split), STAGES[split]
    combined = loop._combined_loader
    if combined is None:
        loaders = _requested(trainer, split)
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


def _requested(trainer: Trainer, split: str) -> Any:
    """What the source of a split returns, set up for its stage if Lightning has not done so."""
    source, stage = source_of(trainer, split), "test" if split == "test" else "fit"
    datamodule = source.instance if trainer.state.fn != stage else None
    try:
        loaders = _request_dataloader(source)
        is_missing = _lacks_data(loaders)
    except Exception:
        if not isinstance(datamodule, LightningDataModule):
            raise
        is_missing = True
    if is_missing and isinstance(datamodule, LightningDataModule):
        datamodule.setup(stage)
        loaders = _request_dataloader(source)
    if _lacks_data(loaders):
        raise Refusal(
            f"Expected the loader of `split` {split} to have a dataset but got None; pass "
            "`dataset=`, or another `split`."
        )
    return loaders


def _lacks_data(loaders: Any) -> bool:
    found = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return any(getattr(loader, "dataset", loader) is None for loader in found)


def _read(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    batches: Batches,
    count: int,
) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    third: list[Any] = []
    if loader.num_workers and loader.worker_init_fn is not None:
        loader.worker_init_fn(0)
    indices: dict[str, Any] = {"batch_sampler": batches}
    if loader.batch_sampler is None:
        indices = {"batch_size": None, "sampler": [index for batch in batches for index in batch]}
    for batch in DataLoader(loader.dataset, collate_fn=loader.collate_fn, **indices):
        if isinstance(trainer.precision_plugin, DoublePrecision):
            # Half precision would round pixels before normalization is undone.
            batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = module._apply_batch_transfer_handler(batch, torch.device("cpu"), dataloader_idx=0)
        pair = list(batch[:2]) if isinstance(batch, (list, tuple)) else []
        if len(pair) < 2 or not all(isinstance(part, Tensor) and part.ndim for part in pair):
            types = [str(getattr(part, "dtype", type(part).__name__)) for part in pair]
            kind = type(batch).__name__ + f" of {', '.join(types)}" * bool(types)
            raise Refusal(
                "Expected batches that begin with images and labels, both tensors, but got a "
                f"{kind}; pass `dataset=` with items `(image, label)`."
            )
        if len(batch) > 2 and isinstance(batch[2], Tensor) and batch[2].ndim == 1:
            third += batch[2].tolist()
        for parts, part in zip((images, labels), pair):
            is_half = part.is_floating_point() and part.dtype != torch.float64
            parts.append((part.float() if is_half else part).detach().cpu())
        if sum(map(len, images)) >= count:
            break
    if not images:
        raise Refusal("Expected the loader to deliver images but got an empty one.")
    read = torch.cat(labels)[:count]
    check_no_indices(read, third[:count])
    return torch.cat(images)[:count], read


def check_no_indices(labels: Tensor, third: Sequence[Any]) -> None:
    """Raises a Refusal if labels are the indices of `(image, index, label)`.

    Args:
        labels: What came in the second place.
        third: What came in the third place, if anything.

    Example:
        >>> check_no_indices(torch.arange(20) % 10, [0] * 20)
    """
    indices = list(range(len(labels)))
    values = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in third]
    if len(indices) <= 10 or len(values) != len(indices) or sorted(labels.tolist()) != indices:
        return
    whole = all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)
    if whole and sorted(values) != indices:
        raise Refusal(
            "Expected images and labels in the first two places but got as labels the numbers 0 to "
            f"{indices[-1]}, each once, and other whole numbers behind them, as in (image, index, "
            "label); pass `dataset=` with items `(image, label)`."
        )


def _shared_tensors(loader: DataLoader[Any], module: LightningModule) -> list[tuple[Tensor, int]]:
    """Tensors in shared memory that the user's objects hold, with their versions."""
    owners = [loader.sampler, loader.batch_sampler, loader.collate_fn, module]
    owners += _nested_datasets(loader)
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    shared = [value for value in values if isinstance(value, Tensor) and value.is_shared()]
    return [(tensor, tensor._version) for tensor in shared]


def _advance(trainer: Trainer, loader: DataLoader[Any]) -> None:
    """Sets a later moment of training, in which augmentation would be another."""
    seed_all(1)
    fit_loop = trainer.fit_loop
    fit_loop.epoch_progress.increment_by(1)
    fit_loop.epoch_loop.batch_progress.increment_by(1)
    fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_by(1)
    fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_by(1)
    for dataset in _nested_datasets(loader):
        if callable(getattr(dataset, "set_epoch", None)):
            dataset.set_epoch(trainer.current_epoch)
        elif isinstance(getattr(dataset, "epoch", None), int):
            dataset.epoch += 1


def _nested_datasets(loader: DataLoader[Any]) -> list[Any]:
    """The loader's dataset, the dataset that this wraps, and so on."""
    datasets: list[Any] = [loader.dataset]
    while (inner := getattr(datasets[-1], "dataset", None)) is not None:
        datasets.append(inner)
    return datasets
