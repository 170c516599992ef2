"""What fails beside a run must not end it."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn


@contextmanager
def warn_on_failure(what: str) -> Iterator[None]:
    """Turns an exception into a warning, for figures and tables that no result depends on.

    Args:
        what: What is attempted, as it follows "could not".

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught, warn_on_failure("draw"):
        ...     raise OSError("disk full")
        >>> str(caught[0].message)
        'The run goes on, but it could not draw: OSError: disk full'
    """
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
        rank_zero_warn(f"The run goes on, but it could not {what}: {said}", stacklevel=4)
