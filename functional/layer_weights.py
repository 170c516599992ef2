"""The tensors that layers compute with, and how they are perturbed."""

import copy
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from robust_flatness.functional.evaluation import module_modes

PERTURBED_LAYERS = (_ConvNd, nn.Linear, nn.MultiheadAttention)
# TorchScript keeps nothing of a module's class but its name.
PERTURBED_NAMES = re.compile(r"Conv(Transpose)?[123]d|.*Linear|MultiheadAttention")
NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm)

# In the order in which layers register them, which a parametrization changes.
WEIGHT_NAMES = (
    *("weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight"),
    *("in_proj_bias", "bias", "bias_k", "bias_v"),
)

# These hooks set a layer's tensor before each forward, from parameters with these suffixes.
HOOKS = (SpectralNorm, WeightNorm, BasePruningMethod)
SUFFIXES = ("_orig", "_g", "_v")


class LayerTensor(NamedTuple):
    """A tensor that a layer computes with: its own, or the result of a parametrization."""

    layer: nn.Module
    name: str

    def own(self) -> Tensor | None:
        """Returns the layer's parameter or buffer, or `None` if the layer computes the tensor."""
        return _own(self.layer).get(self.name)

    def value(self) -> Tensor:
        """Returns the layer's parameter or buffer, or a copy of what it computes in eval mode.

        The copy requires a gradient if any of the parameters behind it does.
        """
        own = self.own()
        if own is not None:
            return own
        layer, name = self
        # Spectral norm updates its vectors in train mode.
        with torch.inference_mode(False), torch.no_grad(), module_modes(layer):
            if parametrize.is_parametrized(layer, name):
                if parametrize._cache_enabled:
                    raise ValueError(
                        "Expected to measure outside of `torch.nn.utils.parametrize.cached()`, "
                        "which hides changes of weights, but got a call inside."
                    )
                value = getattr(layer, name)
            else:
                before = getattr(layer, name)
                _computing_hooks(layer)[name](layer, ())
                value = getattr(layer, name)
                setattr(layer, name, before)
            copied: Tensor = value.detach().clone()
        return copied.requires_grad_(any(s.requires_grad for s in _computed(layer)[name]))


def perturbed_parameters(model: nn.Module, *, biases: bool = True) -> dict[str, Tensor]:
    """The tensors that a weight perturbation moves: those of convolutions and linear layers.

    Normalization layers are not perturbed, as in the paper. Each weight and each bias is a layer in
    Eq. (2), and a tensor that several modules share is one. For a layer with spectral norm, weight
    norm, pruning or another parametrization it is the tensor that the layer computes with, as a
    copy.

    They are by name, each once, in the order of `model.named_modules()`; flatness includes biases,
    AT-AWP does not.

    Raises:
        ValueError: If the network has no convolution and no linear layer, or one whose tensors
            cannot be perturbed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        >>> list(perturbed_parameters(model))
        ['0.weight', '0.bias']
    """
    return {name: tensor.value() for name, tensor in layer_tensors(model, biases=biases).items()}


def layer_tensors(model: nn.Module, *, biases: bool = True) -> dict[str, LayerTensor]:
    """The tensors of `perturbed_parameters`, for code that reads them often."""
    tensors: dict[str, LayerTensor] = {}
    names: dict[object, str] = {}
    behind: dict[str, Sequence[Tensor]] = {}
    layers = list(_perturbed_layers(model))
    for prefix, layer in layers:
        computed, own = _computed(layer), _own(layer)
        _check_layer(prefix, layer, computed)
        parts = {id(part) for sources in computed.values() for part in sources}
        attributes = [*(name for name, tensor in own.items() if id(tensor) not in parts), *computed]
        # In the order that they have without parametrizations.
        for attribute in sorted(attributes, key=lambda n: [*WEIGHT_NAMES, n].index(n)):
            name = f"{prefix}.{attribute}" if prefix else attribute
            tensor, sources = LayerTensor(layer, attribute), computed.get(attribute)
            value = tensor.value()
            # A tensor is the same if it is one in memory, or computed from the same parameters.
            key = _memory(value) if sources is None else tuple(map(id, sources))
            is_weight = value.ndim > 1 and not attribute.startswith("bias")
            if key not in names and (biases or is_weight):
                names[key], tensors[name], behind[name] = name, tensor, sources or ()
    if not tensors:
        raise ValueError(
            "Expected `model` to have convolution or linear layers to perturb but got "
            f"{type(model).__name__} without any."
        )
    for name, source in ((name, source) for name, parts in behind.items() for source in parts):
        if _memory(source) in names:
            raise ValueError(
                f"Expected `{name}` to be computed from parameters of its own but got "
                f"`{names[_memory(source)]}`, which another layer computes with as it is."
            )
    _warn_of_other_weights(model, [layer for _, layer in layers])
    return tensors


def all_tensors(model: nn.Module) -> dict[str, LayerTensor]:
    """The tensors of `layer_tensors`, then all other parameters: those of normalization layers."""
    tensors = layer_tensors(model)
    behind = {id(source) for m in model.modules() for s in _computed(m).values() for source in s}
    known = {_memory(own) for tensor in tensors.values() if (own := tensor.own()) is not None}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in behind and _memory(parameter) not in known:
                known.add(_memory(parameter))
                name = f"{prefix}.{attribute}" if prefix else attribute
                tensors[name] = LayerTensor(module, attribute)
    return tensors


def layer_tensor(model: nn.Module, name: str) -> LayerTensor:
    """Returns the tensor of a name, which may be any name of a shared one.

    Raises:
        ValueError: If the network has no such weight.
    """
    prefix, _, attribute = name.rpartition(".")
    layer: Any = model
    for part in prefix.split(".") if prefix else ():
        layer = getattr(layer, part, None)
    if isinstance(layer, nn.Module) and attribute in {*_own(layer), *_computed(layer)}:
        return LayerTensor(layer, attribute)
    raise ValueError(f"Expected the name of a weight of the network but got `{name}`.")


@contextmanager
def perturbed_weights(
    model: nn.Module,
    perturbation: Mapping[str, Tensor],
    tensors: Mapping[str, LayerTensor] | None = None,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Adds a perturbation to the weights in place and restores the weights bit for bit.

    They are restored from copies, also after an exception: subtracting would round. To what a
    parametrized layer computes, the perturbation is added each time that it is computed. Yields the
    parameters that were moved, each with its copy.

    Args:
        model: The network.
        perturbation: Summand by name.
        tensors: The tensors of these names, if known from `layer_tensors`.

    Raises:
        ValueError: If a name is not that of a weight of the network.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.clone()
        >>> with perturbed_weights(model, {"weight": torch.ones(1, 2)}):
        ...     moved = model.weight.detach().clone()
        >>> torch.equal(moved, before + 1), torch.equal(model.weight, before)
        (True, True)
    """
    tensors = tensors or {name: layer_tensor(model, name) for name in perturbation}
    moved = [(tensors[name], tensors[name].own(), nu) for name, nu in perturbation.items()]
    own = [parameter for _, parameter, _ in moved if parameter is not None]
    summands = [nu for _, parameter, nu in moved if parameter is not None]
    computed = [(tensor, nu) for tensor, parameter, nu in moved if parameter is None]
    with torch.inference_mode(False), torch.no_grad():
        before = [torch.empty_like(parameter) for parameter in own]
        if own:
            torch._foreach_copy_(before, own)
    try:
        if own:
            with torch.no_grad():
                torch._foreach_add_(own, summands)
        # Autocast keeps casts of the weights: without this the network would not see the change.
        torch.clear_autocast_cache()
        with _added_to_computed(model, computed) if computed else nullcontext():
            yield list(zip(own, before))
    finally:
        if own:
            with torch.no_grad():
                torch._foreach_copy_(own, before)
        torch.clear_autocast_cache()


@contextmanager
def differentiable_weights(
    model: nn.Module, tensors: Mapping[str, LayerTensor]
) -> Iterator[dict[str, Tensor]]:
    """Tensors with respect to which the loss can be differentiated, also if they are frozen.

    These are the parameters themselves, and for what layers compute zeros that are added to it.
    """
    leaves, computed = {}, []
    for name, tensor in tensors.items():
        if (leaf := tensor.own()) is None:
            leaf = torch.zeros_like(tensor.value()).requires_grad_()
            computed.append((tensor, leaf))
        leaves[name] = leaf
    frozen = [leaf for leaf in leaves.values() if not leaf.requires_grad]
    try:
        for leaf in frozen:
            leaf.requires_grad_(True)
        with _added_to_computed(model, computed) if computed else nullcontext():
            yield leaves
    finally:
        for leaf in frozen:
            leaf.requires_grad_(False)


@contextmanager
def _added_to_computed(
    model: nn.Module, summands: Sequence[tuple[LayerTensor, Tensor]]
) -> Iterator[None]:
    """Adds to what layers compute, wherever the same parameters give it; gradients pass to both.

    The parameters behind it are not changed, so there is nothing to restore.
    """
    alike: dict[object, list[LayerTensor]] = {}
    for module in model.modules():
        for name, sources in _computed(module).items():
            alike.setdefault(tuple(map(id, sources)), []).append(LayerTensor(module, name))
    with ExitStack() as stack:
        for (source, attribute), summand in summands:
            plus = _Plus(summand.clone() if summand.is_inference() else summand)
            for layer, name in alike[tuple(map(id, _computed(source)[attribute]))]:
                if parametrize.is_parametrized(layer, name):
                    steps: Any = layer.parametrizations[name]  # type: ignore[index]
                    steps.append(plus)
                    stack.callback(_remove, steps, plus)
                else:
                    # At once for code that reads the tensor without calling the layer, such as
                    # fused attention.
                    stack.callback(setattr, layer, name, getattr(layer, name))
                    hook = partial(_add_to, name=name, plus=plus)
                    hook(layer)
                    stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


def _remove(steps: nn.ModuleList, plus: nn.Module) -> None:
    del steps[[*steps].index(plus)]


def _add_to(layer: nn.Module, *_: Any, name: str, plus: nn.Module) -> None:
    setattr(layer, name, plus(getattr(layer, name)))


class _Plus(nn.Module):
    """A last parametrization that adds a tensor, which is no parameter or buffer of the network."""

    def __init__(self, summand: Tensor) -> None:
        super().__init__()
        self.summand = summand

    def forward(self, computed: Tensor) -> Tensor:
        return computed + self.summand


def _computed(layer: Any) -> dict[str, Sequence[Tensor]]:
    """Names of the tensors that a layer computes, with the tensors behind each."""
    computed: dict[str, Sequence[Tensor]] = {}
    if isinstance(layer, torch.jit.ScriptModule):
        return computed
    if parametrize.is_parametrized(layer):
        for name, steps in layer.parametrizations.items():
            computed[name] = [*steps.parameters(), *steps.buffers(recurse=False)]
    for name in _computing_hooks(layer):
        parts = (getattr(layer, name + suffix, None) for suffix in SUFFIXES)
        computed[name] = [part for part in parts if part is not None]
    return computed


def _computing_hooks(layer: nn.Module) -> dict[str, Any]:
    """Hooks that set a tensor before each forward, by the name of the tensor."""
    hooks: list[Any] = [h for h in layer._forward_pre_hooks.values() if isinstance(h, HOOKS)]
    return {h._tensor_name if isinstance(h, BasePruningMethod) else h.name: h for h in hooks}


def _own(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters of a layer, and fixed weights of a convolution or linear layer, by name."""
    own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, PERTURBED_LAYERS):
        buffers = layer.named_buffers(recurse=False)
        own |= {name: buffer for name, buffer in buffers if name in WEIGHT_NAMES}
    return own


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are one in memory, whichever module owns them."""
    return tensor.data_ptr() or id(tensor)


def _perturbed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions, linear layers and attention, without those that compute another's tensor."""
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, parametrize.ParametrizationList)
        for part in module.modules()
    }
    for prefix, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            if PERTURBED_NAMES.fullmatch(module.original_name):
                yield prefix, module
        elif hasattr(module, "_packed_params"):
            raise _refusal(prefix, module, "the weights", "floating point", "quantised ones")
        elif isinstance(module, PERTURBED_LAYERS):
            yield prefix, module


def _check_layer(prefix: str, layer: nn.Module, computed: Container[str]) -> None:
    """Raises if it is not certain that a layer computes with the tensors of its names."""
    if isinstance(layer, torch.jit.ScriptModule):
        return
    parameters = dict(layer.named_parameters(recurse=False))
    if any(map(is_lazy, parameters.values())):
        end = "uninitialized ones; run a batch through the network first"
        raise _refusal(prefix, layer, "the parameters", "initialized", end)
    single = isinstance(layer, (_ConvNd, nn.Linear))
    for name in WEIGHT_NAMES:
        # Reading what is computed would move the vectors of spectral norm.
        if name in computed:
            continue
        missing = single and name == "weight" and not isinstance(getattr(layer, name, 0), Tensor)
        if missing or isinstance(vars(layer).get(name), Tensor):
            wanted = "a parameter, or computed by `torch.nn.utils.parametrize`,"
            raise _refusal(prefix, layer, f"`{name}`", wanted, "what other code sets")
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise _refusal(prefix, layer, f"`{name}`", "floating point", parameter.dtype)
    uses_weight = _computes_with_its_weight(layer) if single else True  # type: ignore[arg-type]
    what = f"`{prefix}` ({type(layer).__name__})"
    if uses_weight is None:
        warnings.warn(
            f"Could not check that layer {what} computes with its `weight` as it is; this "
            "parameter is perturbed.",
            stacklevel=4,
        )
    elif not uses_weight:
        raise ValueError(
            f"Expected layers to compute with their `weight` as it is but got {what}, which makes "
            "another tensor of it in `forward`; write that as a parametrization "
            "(`torch.nn.utils.parametrize`), which can be perturbed."
        )


def _refusal(prefix: str, layer: nn.Module, what: str, wanted: str, got: object) -> ValueError:
    return ValueError(
        f"Expected {what} of layer `{prefix}` ({type(layer).__name__}) to be {wanted} for weight "
        f"perturbations but got {got}."
    )


def _warn_of_other_weights(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Names the weights that belong to no layer that is perturbed."""
    covered = {_memory(parameter) for layer in layers for parameter in layer.parameters()}
    others = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, (NORMALIZATIONS, torch.jit.ScriptModule))
        for name, parameter in module.named_parameters(recurse=False)
        if not is_lazy(parameter) and parameter.ndim > 1 and _memory(parameter) not in covered
    ]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        warnings.warn(
            "Weight perturbations move convolution and linear layers only, not "
            f"{', '.join(others[:5])}{more}.",
            stacklevel=4,
        )


def _computes_with_its_weight(layer: _ConvNd | nn.Linear) -> bool | None:
    """Whether a layer passes `weight` itself to a convolution or product, not a tensor made of it.

    A copy of the layer is tried on zeros, unless its forward is PyTorch's. If that fails, for
    example because `forward` takes other inputs, it is `None`.
    """
    if getattr(layer.forward, "__module__", "").startswith("torch.nn.modules."):
        return True
    devices = {parameter.device for parameter in layer.parameters() if parameter.is_cuda}
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=list(devices)),
            # A parametrized weight is one tensor inside.
            parametrize.cached(),
        ):
            trial = copy.deepcopy(layer).eval()
            before = trial.weight.detach().clone()
            shape = [2, before.shape[1]]
            if isinstance(trial, _ConvNd):
                reach = (d * (k - 1) + 1 for d, k in zip(trial.dilation, trial.kernel_size))
                shape = [2, trial.in_channels, *(max(16, side) for side in reach)]
            with _Uses(trial.weight) as uses:
                trial.forward(before.new_zeros(shape))
            return uses.seen and torch.equal(trial.weight, before)
    except Exception:
        return None


OPERATIONS = {
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum", "tensordot"),
}


class _Uses(TorchFunctionMode):
    """Sees whether a tensor's memory enters an operation as a whole."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.start, self.size, self.seen = weight.data_ptr(), weight.numel(), False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in OPERATIONS:
            with torch._C.DisableTorchFunction():
                self.seen |= any(
                    part.data_ptr() == self.start and part.numel() == self.size
                    for part in tree_leaves((args, kwargs))
                    if isinstance(part, Tensor)
                )
        return func(*args, **kwargs)
