"""A device other than the CPU, pretended on the CPU: its tensors are CPU tensors with a mark.

`torch.device("cpu", 0)` is not equal to `torch.device("cpu")`, although tensors of both are the
same. Inside `PretendDevice` the first is an accelerator. Results of marked tensors are marked,
mixing marked and other tensors raises as on a GPU, and copies and values that go to Python are
recorded. What runs inside an operation of PyTorch is not seen, only what Python calls.
"""

from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
# Operations whose result Python or the host needs, so that it waits for the device.
WAITS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"}
WAITS |= {"nonzero", "equal", "masked_select", "unique", "allclose", "is_nonzero", "__array__"}
SETTERS = {"data", "grad", "requires_grad"}


class DeviceGenerator(torch.Generator):
    """A generator of the pretended device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls if device == DEVICE else torch.Generator, HOST)

    @property
    def device(self) -> torch.device:
        return DEVICE


def is_marked(tensor: Any) -> bool:
    return getattr(tensor, "__dict__", {}).get("_on_device", False)


def _mark(value: Any, marked: bool) -> Any:
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            tensor.__dict__["_on_device"] = marked
    return value


class PretendDevice(TorchFunctionMode):
    """Pretends that `DEVICE` is an accelerator.

    Args:
        refuses_float64: Whether the device has no float64, as Apple's GPUs.

    Attributes:
        waits: Names of the operations that gave a value of the device to Python.
        copies: Directions of copies, `to device` or `to host`.
    """

    def __init__(self, *, refuses_float64: bool = False) -> None:
        super().__init__()
        self.refuses_float64 = refuses_float64
        self.waits: list[str] = []
        self.copies: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        first = args[0] if args else None
        if name == "__get__" and owner == "device":
            return DEVICE if is_marked(first) else func(*args)
        if name == "__set__":
            if owner in SETTERS and isinstance(args[1], Tensor):
                if owner == "grad":
                    self._check(func, args)
                else:
                    _mark(first, is_marked(args[1]))
            return func(*args)
        if name == "_has_compatible_shallow_copy_type":
            return func(*args)
        if name in ("to", "cpu", "cuda"):
            return self._moved(func, name, args, kwargs)
        if name == "copy_":
            if is_marked(first) != is_marked(args[1]):
                self._copied(is_marked(first))
            return func(*args, **kwargs)
        if name == "__setitem__" and isinstance(args[2], Tensor):
            if is_marked(first) != is_marked(args[2]):
                self._copied(is_marked(first))
            return func(*args)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        marked = any(map(is_marked, tensors))
        if marked and name in WAITS:
            self.waits.append(name)
        if name in ("__getitem__", "__setitem__", "index_put_") and is_marked(first):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor)]
            if any(index.dtype == torch.bool for index in indices):
                self.waits.append(name)
            # PyTorch copies them itself.
            for index in indices:
                if not is_marked(index):
                    self._copied(True)
            tensors = [t for t in tensors if not any(t is index for index in indices)]
        if "device" in kwargs:
            marked = kwargs["device"] == DEVICE or (kwargs["device"] is None and marked)
            if marked and not tensors and name in ("tensor", "as_tensor"):
                self._copied(True)
        elif marked:
            self._check(func, tensors)
        return self._result(_mark_new(func(*args, **kwargs), tensors, marked), marked)

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        source, marked = args[0], is_marked(args[0])
        target = marked and name != "cpu"
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, Tensor):
                target = is_marked(value)
            elif isinstance(value, (torch.device, str)):
                target = torch.device(value) == DEVICE
        result = func(*args, **kwargs)
        if target != marked:
            self._copied(target)
            result = result.view_as(result) if result is source else result
        return self._result(_mark(result, target), target)

    def _copied(self, to_device: bool) -> None:
        self.copies.append("to device" if to_device else "to host")

    def _check(self, func: Any, tensors: Any) -> None:
        marks = {is_marked(t) for t in tensors if isinstance(t, Tensor) and t.ndim > 0}
        if len(marks) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device for {func}.")

    def _result(self, result: Any, marked: bool) -> Any:
        if marked and self.refuses_float64:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                    raise TypeError("The device has no float64.")
        return result


def _mark_new(result: Any, inputs: list[Tensor], marked: bool) -> Any:
    known = set(map(id, inputs))
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and id(t) not in known]
    _mark(tensors, marked)
    return result


@contextmanager
def pretended_device(monkeypatch: Any, **kwargs: Any) -> Any:
    """Trainers with `accelerator="cpu"` use the pretended device, and so do generators for it."""
    devices = staticmethod(lambda count: [DEVICE] * int(count))
    monkeypatch.setattr(CPUAccelerator, "get_parallel_devices", devices)
    monkeypatch.setattr(torch, "Generator", DeviceGenerator)
    with PretendDevice(**kwargs) as device:
        yield device
