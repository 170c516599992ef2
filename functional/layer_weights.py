"""The weight tensors that layers compute with, and how they are perturbed."""

import copy
import re
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

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

PERTURBED_NAMES = re.compile(r"Conv(Transpose)?[123]d|.*Linear|MultiheadAttention")

# In the order that layers register them, which a parametrization changes.
WEIGHT_NAMES = (
    *("weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight"),
    *("in_proj_bias", "bias", "bias_k", "bias_v"),
)

OPERATIONS = {
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum", "tensordot"),
}

SIDE = 16

_known: "WeakKeyDictionary[nn.Module, bool | None]" = WeakKeyDictionary()


def perturbed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions, linear layers and attention, without those that compute another's tensor.

    In TorchScript layers are known by the names of their classes.

    Args:
        model: The network.

    Raises:
        ValueError: If a layer is quantised.
    """
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, parametrize.ParametrizationList)
        for part in module.modules()
    }
    for prefix, module in model.named_modules():
        if id(module) not in inside and _is_perturbed(prefix, module):
            yield prefix, module


def _is_perturbed(prefix: str, module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        # TorchScript keeps of a module's class nothing but the name.
        return PERTURBED_NAMES.fullmatch(module.original_name) is not None
    if hasattr(module, "_packed_params"):
        raise refusal(prefix, module, "the weights", "floating point", "quantised ones")
    return isinstance(module, PERTURBED_LAYERS)


def check_layer(prefix: str, module: nn.Module, computed: Container[str]) -> None:
    """Raises if it is not certain that a layer computes with the tensors of its names.

    Args:
        prefix: Its name in the network.
        module: A convolution, a linear layer, or attention.
        computed: Names of the tensors that are known to be computed.

    Raises:
        ValueError: If parameters are uninitialised, quantised, set by other code, or turned into
            another tensor in `forward`.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    named = dict(module.named_parameters(recurse=False))
    if any(is_lazy(parameter) for parameter in named.values()):
        end = "uninitialised ones; run a batch through the network first"
        raise refusal(prefix, module, "the parameters", "initialised", end)
    single = isinstance(module, (_ConvNd, nn.Linear))
    for name in WEIGHT_NAMES:
        # Only what is not computed is read here: spectral norm would move its vectors.
        if name in computed:
            continue
        missing = single and name == "weight" and not isinstance(getattr(module, name, 0), Tensor)
        if missing or isinstance(vars(module).get(name), Tensor):
            wanted = "a parameter, or computed by `torch.nn.utils.parametrize`,"
            raise refusal(prefix, module, f"`{name}`", wanted, "what other code sets")
    for name, parameter in named.items():
        if not parameter.is_floating_point():
            raise refusal(prefix, module, f"`{name}`", "floating point", parameter.dtype)
    if not single:
        return
    seen = computes_with_its_weight(module)  # type: ignore[arg-type]
    what = f"`{prefix}` ({type(module).__name__})"
    if seen is None:
        warnings.warn(
            f"Whether layer {what} computes with its `weight` as it is could not be seen; the "
            "parameter is perturbed.",
            stacklevel=4,
        )
    elif not seen:
        raise ValueError(
            f"Expected layers to compute with their `weight` as it is but got {what}, which makes "
            "another tensor of it in `forward`; write that as a parametrization "
            "(`torch.nn.utils.parametrize`), which can be perturbed."
        )


def refusal(prefix: str, module: nn.Module, what: str, wanted: str, got: object) -> ValueError:
    """What is said of a layer that cannot be perturbed.

    Args:
        prefix: Its name in the network.
        module: The layer.
        what: Is not as it should be.
        wanted: As it should be.
        got: What it is.
    """
    return ValueError(
        f"Expected {what} of layer `{prefix}` ({type(module).__name__}) to be {wanted} for weight "
        f"perturbations but got {got}."
    )


def computes_with_its_weight(layer: _ConvNd | nn.Linear) -> bool | None:
    """Whether a layer hands `weight` itself to a convolution or product, not a tensor made of it.

    A copy of the layer is tried on zeros, once for each layer, unless its forward is PyTorch's.

    Args:
        layer: A convolution or linear layer, or one of a subclass.

    Returns:
        `None` if the trial fails, say because `forward` wants other inputs.

    Example:
        >>> class Standardized(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)
        >>> computes_with_its_weight(Standardized(2, 3)), computes_with_its_weight(nn.Linear(2, 3))
        (False, True)
    """
    if getattr(layer.forward, "__module__", "").startswith("torch.nn.modules."):
        return True
    if layer not in _known:
        _known[layer] = _try(layer)
    return _known[layer]


def _try(layer: _ConvNd | nn.Linear) -> bool | None:
    devices = {parameter.device for parameter in layer.parameters() if parameter.is_cuda}
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(devices=list(devices)),
            # A parametrised weight is one tensor inside.
            parametrize.cached(),
        ):
            trial = copy.deepcopy(layer).eval()
            before = trial.weight.detach().clone()
            shape = [2, before.shape[1]]
            if isinstance(trial, _ConvNd):
                reach = (d * (k - 1) + 1 for d, k in zip(trial.dilation, trial.kernel_size))
                shape = [2, trial.in_channels, *(max(SIDE, side) for side in reach)]
            with _Uses(trial.weight) as uses:
                trial.forward(before.new_zeros(shape))
            return uses.seen and torch.equal(trial.weight, before)
    except Exception:
        return None


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


NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm)

# These set a layer's tensor before each forward, from parameters with the names' suffixes.
COMPUTING_HOOKS = (SpectralNorm, WeightNorm, BasePruningMethod)

SUFFIXES = ("_orig", "_g", "_v")


def perturbed_parameters(model: nn.Module, *, biases: bool = True) -> dict[str, Tensor]:
    """The tensors that a weight perturbation moves: those of convolutions and linear layers.

    Normalisation layers are left out, as in the paper. Each weight and each bias is a layer of its
    own in Eq. (2), and a tensor that several modules share is one. Of a layer with spectral norm,
    weight norm, pruning or another parametrization it is the tensor that it computes with.

    Args:
        model: The network.
        biases: Whether biases belong to them (flatness) or not (AT-AWP).

    Returns:
        Parameters by name, each once, in the order of `model.named_modules()`. A computed tensor is
        a copy that requires a gradient if any of the parameters behind it does.

    Raises:
        ValueError: If the network has no convolution and no linear layer, or one whose tensors
            cannot be perturbed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
        >>> list(perturbed_parameters(model))
        ['0.weight', '0.bias']
    """
    found: dict[str, Tensor] = {}
    owned: dict[object, str] = {}
    behind: dict[str, Sequence[Tensor]] = {}
    for prefix, module in perturbed_layers(model):
        computed = _computed(module)
        check_layer(prefix, module, computed)
        for name in _tensor_names(module, computed):
            full = f"{prefix}.{name}" if prefix else name
            sources = computed.get(name)
            tensor = getattr(module, name) if sources is None else _value(module, name, sources)
            key = _memory(tensor) if sources is None else tuple(map(id, sources))
            weighs = tensor.ndim > 1 and not name.startswith("bias")
            if key in owned or not (biases or weighs):
                continue
            owned[key], found[full] = full, tensor
            if sources is not None:
                behind[full] = sources
    if not found:
        raise ValueError(
            "Expected `model` to have convolution or linear layers to perturb but got "
            f"{type(model).__name__} without any."
        )
    for name, source in ((name, source) for name, some in behind.items() for source in some):
        if _memory(source) in owned:
            raise ValueError(
                f"Expected `{name}` to be computed from parameters of its own but got "
                f"`{owned[_memory(source)]}`, which another layer computes with as it is."
            )
    _warn_of_others(model)
    return found


def own_tensor(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by any of its names; `None` if a layer computes what has this name.

    Raises:
        ValueError: If the network has no tensor of this name.
    """
    module, attribute = _place(model, name)
    return None if attribute in _computed(module) else getattr(module, attribute)


def weight_at(model: nn.Module, name: str) -> Tensor:
    """The tensor of a name: a parameter, a buffer, or a copy of what a layer computes with.

    Raises:
        ValueError: If the network has no tensor of this name.
    """
    if (tensor := own_tensor(model, name)) is not None:
        return tensor
    module, attribute = _place(model, name)
    return _value(module, attribute, _computed(module)[attribute])


@contextmanager
def added_to_computed(model: nn.Module, summands: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds to what layers compute, whenever they compute it; gradients pass to both.

    The parameters behind are not touched, so that there is nothing to restore.

    Args:
        model: The network.
        summands: By name of a computed tensor; it is added wherever the same parameters give it.
    """
    with ExitStack() as stack:
        if summands:
            alike: dict[object, list[tuple[nn.Module, str]]] = {}
            for module in model.modules():
                for attribute, sources in _computed(module).items():
                    alike.setdefault(tuple(map(id, sources)), []).append((module, attribute))
            for name, summand in summands.items():
                module, attribute = _place(model, name)
                for place in alike[tuple(map(id, _computed(module)[attribute]))]:
                    stack.enter_context(_added(*place, summand))
        yield


@contextmanager
def differentiable_weights(
    model: nn.Module, weights: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Tensors that the loss can be differentiated for, also of frozen and computed weights.

    Args:
        model: The network.
        weights: Of `perturbed_parameters`.

    Returns:
        By name, parameters themselves, and zeros that are added to what layers compute.

    Example:
        >>> frozen = nn.Linear(2, 1).requires_grad_(False)
        >>> with differentiable_weights(frozen, {"weight": frozen.weight}) as leaves:
        ...     leaves["weight"] is frozen.weight, frozen.weight.requires_grad
        (True, True)
        >>> frozen.weight.requires_grad
        False
    """
    own = {name: own_tensor(model, name) for name in weights}
    leaves = {
        name: torch.zeros_like(weight).requires_grad_() if own[name] is None else weight
        for name, weight in weights.items()
    }
    frozen = [leaf for leaf in leaves.values() if not leaf.requires_grad]
    try:
        for leaf in frozen:
            leaf.requires_grad_(True)
        with added_to_computed(model, {n: leaf for n, leaf in leaves.items() if own[n] is None}):
            yield leaves
    finally:
        for leaf in frozen:
            leaf.requires_grad_(False)


class _Plus(nn.Module):
    """A last parametrization that adds a tensor, which is no parameter or buffer of the network."""

    def __init__(self, summand: Tensor) -> None:
        super().__init__()
        self.summand = summand

    def forward(self, computed: Tensor) -> Tensor:
        return computed + self.summand


@contextmanager
def _added(module: nn.Module, attribute: str, summand: Tensor) -> Iterator[None]:
    plus = _Plus(summand.clone() if summand.is_inference() else summand)
    if parametrize.is_parametrized(module, attribute):
        steps = _steps(module)[attribute]
        steps.append(plus)
        try:
            yield
        finally:
            del steps[[*steps].index(plus)]
        return
    before = getattr(module, attribute)
    # Also for code that reads the tensor without calling the layer, such as fused attention.
    setattr(module, attribute, plus(before))
    handle = module.register_forward_pre_hook(
        lambda layer, _: setattr(layer, attribute, plus(getattr(layer, attribute)))
    )
    try:
        yield
    finally:
        handle.remove()
        setattr(module, attribute, before)


def _computed(module: nn.Module) -> dict[str, Sequence[Tensor]]:
    """Names of the tensors that a layer computes, with the tensors behind each."""
    found: dict[str, Sequence[Tensor]] = {}
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    if parametrize.is_parametrized(module):
        for name, steps in _steps(module).items():
            found[name] = [*steps.parameters(), *steps.buffers(recurse=False)]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, COMPUTING_HOOKS):
            name = _name_of(hook)
            parts = (getattr(module, name + suffix, None) for suffix in SUFFIXES)
            found[name] = [part for part in parts if part is not None]
    return found


def _steps(module: nn.Module) -> Any:
    """The parametrizations of a parametrised layer by name, as lists of modules."""
    return module.parametrizations


def _name_of(hook: Any) -> str:
    name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    return name


def _tensor_names(module: nn.Module, computed: Mapping[str, Sequence[Tensor]]) -> list[str]:
    """Names of a layer's tensors, in the order that they have without parametrizations."""
    behind = {id(part) for sources in computed.values() for part in sources}
    own = (*module.named_parameters(recurse=False), *_weight_buffers(module))
    names = [*(name for name, tensor in own if id(tensor) not in behind), *computed]
    return sorted(names, key=lambda n: [*WEIGHT_NAMES, n].index(n))


def _weight_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Fixed weights of a convolution or linear layer."""
    if isinstance(module, torch.jit.ScriptModule) or not isinstance(module, PERTURBED_LAYERS):
        return []
    return [item for item in module.named_buffers(recurse=False) if item[0] in WEIGHT_NAMES]


def _value(module: nn.Module, name: str, sources: Sequence[Tensor]) -> Tensor:
    """What a layer computes in eval mode, when spectral norm leaves its vectors as they are."""
    with torch.inference_mode(False), torch.no_grad():
        if parametrize.is_parametrized(module, name):
            if parametrize._cache_enabled:
                raise ValueError(
                    "Expected to measure outside of `torch.nn.utils.parametrize.cached()`, which "
                    "hides changes of weights, but got a call inside."
                )
            with module_modes(_steps(module)[name]):
                value = getattr(module, name)
        else:
            before = getattr(module, name)
            with module_modes(module):
                for hook in module._forward_pre_hooks.values():
                    if isinstance(hook, COMPUTING_HOOKS) and _name_of(hook) == name:
                        hook(module, ())
            value = getattr(module, name)
            setattr(module, name, before)
        copied: Tensor = value.detach().clone()
    return copied.requires_grad_(any(part.requires_grad for part in sources))


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are one in memory, whoever owns them."""
    return tensor.data_ptr() or id(tensor)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, attribute = name.rpartition(".")
    module = model
    for part in prefix.split(".") if prefix else ():
        module = getattr(module, part, None)  # type: ignore[assignment]
    if isinstance(module, nn.Module):
        known = (*module.named_parameters(recurse=False), *_weight_buffers(module))
        if attribute in {*_computed(module), *(name for name, _ in known)}:
            return module, attribute
    raise ValueError(f"Expected the name of a weight of the network but got `{name}`.")


def _warn_of_others(model: nn.Module) -> None:
    """Names the weights that belong to no layer that is perturbed."""
    covered = {_memory(p) for _, layer in perturbed_layers(model) for p in layer.parameters()}
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
            stacklevel=3,
        )


@contextmanager
def perturbed_weights(model: nn.Module, perturbation: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds a perturbation to the weights in place and gives the weights back bit for bit.

    They come back from copies, also after an exception: subtracting would leave rounding behind.
    To what a parametrised layer computes with the perturbation is added each time it is computed.

    Args:
        model: The network.
        perturbation: Summand by parameter name, or by the name of what a layer computes with.

    Raises:
        ValueError: If a name is not that of a tensor of the network.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.clone()
        >>> with perturbed_weights(model, {"weight": torch.ones(1, 2)}):
        ...     moved = model.weight.detach().clone()
        >>> torch.equal(moved, before + 1), torch.equal(model.weight, before)
        (True, True)
    """
    own = {name: own_tensor(model, name) for name in perturbation}
    parameters = {name: tensor for name, tensor in own.items() if tensor is not None}
    computed = {name: nu for name, nu in perturbation.items() if own[name] is None}
    with torch.inference_mode(False), torch.no_grad():
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(perturbation[name])
        # Autocast keeps casts of the weights: without this the network would not see the change.
        torch.clear_autocast_cache()
        with added_to_computed(model, computed):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        torch.clear_autocast_cache()
