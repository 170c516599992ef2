"""Whether a layer computes with the tensors of its names, so that these can be perturbed."""

import copy
import re
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
