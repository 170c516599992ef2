"""Reads a W&B run back from its offline file, so that tests can see what a dashboard would get.

The file is a LevelDB log of protocol buffers: after a header of 7 bytes, blocks of 32 KiB hold
chunks `(crc32 u32, length u16, type u8, data)`, and a record is one chunk or a chain of them. The
classes of the records are private to W&B, which is why nothing but tests may use this.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32 * 1024, 7


@dataclass
class OfflineRun:
    """What one offline run recorded: `history` holds one dictionary for each logged step."""

    run_id: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    finished: bool = False


def read_runs(folder: Path, timeout: float = 30.0) -> list[OfflineRun]:
    """Returns the offline runs under `<folder>/wandb`, the oldest first, after `wandb.finish()`."""
    # `latest-run` is a link to one of them, so the pattern names the folders that are real.
    paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    # W&B's own process may still be writing when `finish` returns; its last record is the exit.
    deadline = time.monotonic() + timeout
    while not all((run := _read(path)).finished for path in paths):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Run {run.run_id} has no end after {timeout:g} s: {paths}")
        time.sleep(0.05)
    return [_read(path) for path in paths]


def _records(data: bytes) -> Iterator[bytes]:
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        length, kind = struct.unpack_from("<HB", data, position + 4) if left >= _HEADER else (0, 0)
        if kind == 0:  # padding up to the next block
            position += left
            continue
        if position + _HEADER + length > len(data):
            return  # W&B is still writing it
        parts += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):  # a whole record, or the last of its chunks
            yield parts
            parts = b""


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project, run.group = (
                record.run.run_id,
                record.run.project,
                record.run.run_group,
            )
            run.tags = list(record.run.tags)
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "exit":
            run.finished = True
    return run


def _items(items: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
