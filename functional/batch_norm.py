"""BatchNorm at lower cost while an attack differentiates the images alone."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from robust_flatness.functional.evaluation import Model

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def folded_batch_norm(
    model: Model, logits: Callable[[Tensor], Tensor], image: Tensor
) -> Iterator[None]:
    """Multiplies the scales of BatchNorm into the weights of convolutions, inside `held_scales`.

    A layer is folded if it alone uses the output of a convolution. To find that out, one image is
    passed through the network, once for each network; the layers that an image goes through must
    not depend on the image. Layers with hooks, parametrizations or a `forward` of their own stay
    as they are, as do compiled networks.

    Weights get no gradient inside, and must not change. Results differ by rounding.

    Args:
        model: The network in eval mode.
        logits: Calls the network.
        image: One image `(1, C, H, W)`.
    """
    pairs = _foldable_pairs(model, logits, image)
    try:
        if pairs:
            for (convolution, norm), weight, bias in zip(pairs, *_folded_weights(pairs)):
                convolution.forward = partial(_convolve, convolution, weight, bias)
                norm.forward = _identity
        yield
    finally:
        for layer in (layer for pair in pairs for layer in pair):
            vars(layer).pop("forward", None)


def _convolve(layer: Any, weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    output: Tensor = layer._conv_forward(inputs, weight, bias)
    return output


def _identity(inputs: Tensor) -> Tensor:
    return inputs


@torch.no_grad()
def _folded_weights(pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of convolutions that compute what they and their BatchNorm do."""
    statistics: list[Any] = [_statistics(norm) for _, norm in pairs]
    means = [part.running_mean for part in statistics]
    shifts = [m.new_zeros(m.shape) if n.bias is None else n.bias for m, (_, n) in zip(means, pairs)]
    deviations = torch._foreach_add(
        [s.running_var for s in statistics], [s.eps for s in statistics]
    )
    torch._foreach_sqrt_(deviations)
    scales = torch._foreach_div([_scale(norm, m) for (_, norm), m in zip(pairs, means)], deviations)
    centres = [m if c.bias is None else m - c.bias for m, (c, _) in zip(means, pairs)]
    biases = torch._foreach_sub(shifts, torch._foreach_mul(centres, scales))
    columns = [s.view(-1, *[1] * (c.weight.ndim - 1)) for s, (c, _) in zip(scales, pairs)]
    weights = torch._foreach_mul([c.weight for c, _ in pairs], columns)
    # What autocast would cast in each forward.
    device = weights[0].device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    types = [cast or convolution.weight.dtype for convolution, _ in pairs]
    return [w.to(t) for w, t in zip(weights, types)], [b.to(t) for b, t in zip(biases, types)]


def _scale(norm: Any, mean: Tensor) -> Tensor:
    if hasattr(norm, "held_scale"):
        scale: Tensor = norm.held_scale[1]
        return scale
    return torch.ones_like(mean) if norm.weight is None else norm.weight


def _statistics(norm: Any) -> Any:
    """The BatchNorm with the running statistics of a layer, or `None` if it is another layer."""
    inner: Any = norm
    if hasattr(norm, "held_scale"):
        # A subclass may compute something else.
        is_own = "held_scale" in next(vars(c) for c in type(norm).__mro__ if "forward" in vars(c))
        inner = getattr(norm, "statistics", None) if is_own else None
    return inner if type(inner) in BATCH_NORMS and inner.running_mean is not None else None


# By the network's first parameter, as wrappers come and go: the layers of the trial, and the
# positions of those to fold. There are no references to layers, so that networks are freed.
_TRIALS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _foldable_pairs(
    model: Model, logits: Callable[[Tensor], Tensor], image: Tensor
) -> list[tuple[Any, Any]]:
    """Convolutions, and for each the BatchNorm that alone uses its output."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules)
    layers = [] if compiled or first is None else [m for m in modules if _is_plain(m)]
    # Numbers, flags and strings may steer the way through the layers, but for private ones, in
    # which Lightning's modules keep what they are doing.
    plain = (bool, int, float, str, type(None))
    held = ({n: v for n, v in vars(m).items() if n[0] != "_"} for m in modules)
    flags = [{n: v for n, v in public.items() if isinstance(v, plain)} for public in held]
    key = type(model), [*map(id, layers)], flags
    known = _TRIALS.get(first) if layers else (key, [])
    if known is None or known[0] != key:
        trial = _Trial(layers)
        with torch.no_grad(), torch.random.fork_rng(devices=[image.device] * image.is_cuda), trial:
            logits(image)
        known = _TRIALS[first] = key, trial.pairs()
    if not known[1]:
        warnings.warn(
            "Expected a network that is not compiled, with BatchNorm after convolutions, for "
            f"`fold_batch_norm` but got {type(model).__name__}, which is used as it is.",
            stacklevel=5,
        )
    return [(layers[convolution], layers[norm]) for convolution, norm in known[1]]


def _is_plain(module: nn.Module) -> bool:
    kind = type(module) in CONVOLUTIONS or _statistics(module) is not None
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return kind and not hooks and not module._backward_pre_hooks and "forward" not in vars(module)


class _Trial(TorchDispatchMode):
    """Sees in a forward which layers use the outputs of convolutions."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.inside: int | None = None
        self.calls: list[int] = []
        self.handles: list[RemovableHandle] = []
        # By the id of a convolution's output: its layer, the output, and the layers that use it.
        self.outputs: dict[int, tuple[int, Tensor, set[int | None]]] = {}

    def __enter__(self) -> "_Trial":
        for position, layer in enumerate(self.layers):
            before, after = partial(self._before, position), partial(self._after, position)
            self.handles += [layer.register_forward_pre_hook(before)]
            self.handles += [layer.register_forward_hook(after)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for part in tree_leaves((args, kwargs)):
            if id(part) in self.outputs:
                self.outputs[id(part)][2].add(self.inside)
        return func(*args, **(kwargs or {}))

    def _before(self, position: int, *_: Any) -> None:
        self.inside = position
        self.calls.append(position)

    def _after(self, position: int, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.inside = None
        if type(layer) in CONVOLUTIONS:
            self.outputs[id(output)] = position, output, set()

    def pairs(self) -> list[tuple[int, int]]:
        """Positions of convolutions and of the BatchNorm layers to fold into them."""
        return [
            (convolution, user)
            for convolution, _, users in self.outputs.values()
            for user in users
            if user is not None
            and len(users) == 1
            and _statistics(self.layers[user]) is not None
            and self.calls.count(convolution) == self.calls.count(user) == 1
        ]
