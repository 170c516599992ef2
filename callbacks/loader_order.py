"""The order in which a loader delivers a dataset, fixed once for a run."""

import math
import operator
import random
from collections.abc import Iterable, Sized
from contextlib import suppress
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

Batches = list[list[Any]]


class Refusal(ValueError):
    """Says in a sentence why something is not read."""


def seed_all(seed: int) -> None:
    """Seeds the global generators of torch, numpy and `random`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def delivered_batches(
    loader: DataLoader[Any], limit: int | float, count: int, world_size: int = 1
) -> tuple[Batches, bool]:
    """Returns indices of the images that a loader delivers first, in batches of all processes.

    A shuffle of a whole set by a stock sampler counts as the order of that set; if `limit` leaves
    a part out, the part is drawn by a fixed seed. Other samplers are iterated once, by a fixed
    seed. This changes and iterates samplers, so call it in a process of its own.

    Args:
        loader: The loader, as Lightning prepared it.
        limit: Lightning's `limit_*_batches`; 0 switches a loop off and limits nothing here.
        count: Number of images that are enough. An item of an unbatched loader
            (`batch_size=None`) may hold any number of them: all items are returned.
        world_size: Number of processes. Of a sampler that divides its images among them, the
            shares of all are drawn.

    Returns:
        The batches, and whether another process may draw others, so that a run must keep these.

    Raises:
        ValueError: If the sampler draws an image more than once.

    Example:
        >>> loader = DataLoader(range(7), 2, sampler=SubsetRandomSampler([5, 6, 1]))
        >>> delivered_batches(loader, limit=1.0, count=10)
        ([[5, 6], [1]], False)
    """
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is not None and type(batch_sampler) is not BatchSampler:
        batches, custom = _custom_batches(batch_sampler, count, world_size), True
        batches = batches[: _limited(_length(batch_sampler, len(batches)), limit)]
    else:
        sampler: Any = loader.sampler if batch_sampler is None else batch_sampler.sampler
        order, shuffled, custom = _order(sampler, count, world_size)
        ranks = _ranks(sampler, world_size)
        size = 1 if batch_sampler is None else batch_sampler.batch_size
        of_rank = math.ceil(len(order) / ranks) / size
        drop_last = batch_sampler is not None and batch_sampler.drop_last
        available = math.floor(of_rank) if drop_last else math.ceil(of_rank)
        delivered = _limited(available, limit)
        if shuffled and delivered < available:
            generator = torch.Generator().manual_seed(0)
            order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
        step = size * ranks
        order = order[: delivered * step]
        batches = [order[start : start + step] for start in range(0, len(order), step)]
    if batch_sampler is not None:
        ends = np.cumsum([len(batch) for batch in batches])
        batches = batches[: int(np.searchsorted(ends, count)) + 1]
    return batches, custom


def _limited(available: int, limit: int | float) -> int:
    if limit == 0:
        return available
    return min(available, limit) if isinstance(limit, int) else int(available * limit)


def _length(sampler: object, otherwise: int) -> int:
    # A sampler may inherit a length that it cannot compute.
    with suppress(TypeError, NotImplementedError):
        if isinstance(sampler, Sized):
            return len(sampler)
    return otherwise


def _ranks(sampler: object, world_size: int) -> int:
    """Number of processes of this run among which a sampler divides its images."""
    shares = hasattr(sampler, "rank") and getattr(sampler, "num_replicas", 1) == world_size
    return world_size if shares else 1


def _order(sampler: Any, count: int, world_size: int) -> tuple[list[Any], bool, bool]:
    """A sampler's indices of all processes, whether it shuffles them, whether it is not stock."""
    _refuse_replacement(sampler)
    iterates = type(sampler).__iter__
    if isinstance(sampler, DistributedSamplerWrapper):
        # Lightning's: it divides the indices of another sampler among the processes.
        shared: Any = sampler.dataset
        return _order(shared._sampler, count, world_size)
    if iterates is SequentialSampler.__iter__:
        return list(range(len(sampler.data_source))), False, False
    if iterates is SubsetRandomSampler.__iter__:
        return _each_once(sampler.indices, sampler, 1), True, False
    if iterates is RandomSampler.__iter__ and sampler.num_samples == len(sampler.data_source):
        return list(range(sampler.num_samples)), True, False
    shuffled = False
    if iterates is DistributedSampler.__iter__:
        shuffled, sampler.shuffle = sampler.shuffle, False
    rows = _drawn(sampler, sampler, count, world_size)
    custom = iterates not in (DistributedSampler.__iter__, RandomSampler.__iter__)
    return _each_once(chain(*rows), sampler, _ranks(sampler, world_size)), shuffled, custom


def _refuse_replacement(sampler: object) -> None:
    if getattr(sampler, "replacement", False):
        raise Refusal(
            f"Expected the loader to deliver each image once but got a {type(sampler).__name__}, "
            "which draws with replacement; pass `dataset=`."
        )


def _custom_batches(batch_sampler: Any, count: int, world_size: int) -> Batches:
    """Batches of a custom batch sampler, each joined with those of the other processes."""
    sampler = getattr(batch_sampler, "sampler", None)
    _refuse_replacement(sampler)
    if _ranks(sampler, world_size) == 1:
        sampler = batch_sampler
    batches, seen = [], set[Any]()
    for row in _drawn(batch_sampler, sampler, count, world_size):
        of_ranks = [list(batch) for batch in row]
        longest = max(map(len, of_ranks))
        joined = [batch[k] for k in range(longest) for batch in of_ranks if k < len(batch)]
        batches.append(_each_once(joined, sampler, _ranks(sampler, world_size), seen))
    return [batch for batch in batches if batch]


def _drawn(
    iterable: Iterable[Any], sampler: Any, count: int, world_size: int
) -> list[tuple[Any, ...]]:
    """Row k holds the k-th draw of each process, by a fixed seed; endless samplers are cut off."""
    ranks, drawn = _ranks(sampler, world_size), []
    for rank in range(ranks):
        if ranks > 1:
            sampler.rank = rank
        parts: tuple[Any, ...] = (iterable, sampler)
        for part in parts:
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(0)
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(0)
        seed_all(0)
        drawn.append(list(islice(iterable, _length(iterable, count))))
    return [
        tuple(of_rank[k] for of_rank in drawn if k < len(of_rank))
        for k in range(max(map(len, drawn)))
    ]


def _each_once(
    indices: Iterable[Any], sampler: Any, ranks: int, seen: set[Any] | None = None
) -> list[Any]:
    """Indices without those that only fill up the shares of several processes."""
    seen = set() if seen is None else seen
    kept = []
    for index in indices:
        with suppress(TypeError):
            index = operator.index(index)
        if index not in seen:
            kept.append(index)
            seen.add(index)
        elif ranks == 1:
            raise Refusal(
                f"Expected the loader to deliver each image once but got a "
                f"{type(sampler).__name__} that draws image {index} again; pass `dataset=`."
            )
    return kept
