"""Code of the user, called without a trace."""

import builtins
import io
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.heap import BufferWrapper
from typing import Any

import torch

_OPEN = open
# Seconds that reading may take.
PATIENCE = 600
EXCHANGES = ("all_gather", "all_gather_object", "all_reduce", "broadcast", "broadcast_object_list")


class Refusal(ValueError):
    """Says in a sentence why something is not read."""


def in_fork(read: Callable[[], Any], what: str) -> Any:
    """Calls a function in a fork of this process, which keeps whatever else the function does.

    Args:
        read: Runs without gradients, on one thread and no GPU. It may not exchange anything with
            other ranks, nor change files or shared memory. What it returns is pickled.
        what: What it reads, for the message.

    Returns:
        What `read` returned.

    Raises:
        ValueError: With the sentence of a `Refusal`, or if `read` fails in another way.

    Example:
        >>> log = []
        >>> in_fork(lambda: log.append(1) or len(log), "a log"), log
        (1, [])
    """
    answer, problem = None, "forks are not available here"
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(read, sender))
        refusal = None
        try:
            with warnings.catch_warnings():
                # Python warns of forks beside other threads; loaders with workers fork as well.
                warnings.simplefilter("ignore")
                process.start()
            sender.close()
            # A lock that another thread holds stays locked in a fork.
            if receiver.poll(PATIENCE):
                answer, refusal, problem = receiver.recv()
                process.join()
            else:
                problem = f"no answer in {PATIENCE} s"
                process.kill()
        except EOFError:
            problem = "its process died"
        except (AssertionError, OSError) as error:
            problem = str(error)
        finally:
            receiver.close()
        if refusal:
            raise ValueError(refusal)
    if problem:
        raise ValueError(
            f"Expected to read {what} in a fork of this process, so that training does not "
            f"notice, but that failed ({problem}); pass `dataset=`."
        )
    return answer


def _answer(read: Callable[[], Any], sender: Connection) -> None:
    # What a loader says, it says in training.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable()
    warnings.simplefilter("ignore")
    # A fork has one thread, and other ranks do not wait for it.
    torch.set_num_threads(1)
    for name in EXCHANGES:
        setattr(torch.distributed, name, _refuse_exchange)
    setattr(torch.distributed, "barrier", lambda *_, **__: None)  # noqa: B010
    # What a fork writes to files or to shared memory stays.
    builtins.open = io.open = _open_to_read
    answer = refusal = problem = None
    try:
        before = _shared_numbers()
        with torch.inference_mode(False), torch.no_grad():
            answer = read()
        if _shared_numbers() != before:
            raise RuntimeError("it changes shared memory")
    except Refusal as error:
        refusal = str(error)
    except BaseException as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    sender.send((answer, refusal, problem))


def _open_to_read(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if set(mode) & set("wax+") and file != os.devnull:
        raise RuntimeError(f"it writes to {file}")
    return _OPEN(file, mode, *args, **kwargs)


def _shared_numbers() -> list[bytes]:
    """What is in the `Value`s and `Array`s of multiprocessing."""
    arenas = getattr(getattr(BufferWrapper, "_heap", None), "_arenas", [])
    return [bytes(arena.buffer) for arena in arenas]


def _refuse_exchange(*_: Any, **__: Any) -> None:
    raise RuntimeError("a loader or hook exchanges tensors with other ranks")
