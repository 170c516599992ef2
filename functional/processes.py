"""What several processes do as one."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raises on every process if any of them raises inside, so that none waits for it later.

    All processes must come here, and nothing inside may wait for another process.

    Raises:
        ValueError: If another process raised; the message is that of the first one.

    Example:
        >>> with errors_on_all_ranks():
        ...     checked = True
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    found: list[str | None] = []
    if distributed.is_available() and distributed.is_initialized():
        found = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(found):
        if message is not None:
            raise ValueError(f"{message} This was on process {rank}.")
