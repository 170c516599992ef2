"""Counts the operations that PyTorch dispatches, of which a GPU launches about one kernel each."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# The memory of results, and the marks of profilers.
NO_KERNELS = {"empty", "empty_like", "_record_function_enter_new", "_record_function_exit"}


class Operations(TorchDispatchMode):
    """`counts` of operations by name, without views and memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNELS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Number of operations."""
        return self.counts.total()
