"""Networks of the user's own: a module, a class, a factory, or the path of one of them."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

# Names by which constructors call the two numbers; others are recognised by their order.
CLASSES = ("num_classes", "n_classes", "nb_classes", "num_class", "classes", "num_labels")
CHANNELS = ("in_channels", "in_chans", "in_ch", "input_channels", "num_input_channels")
# Names of image channels or of the width: required, or 1 or 3 by default, they are the former.
PERHAPS_CHANNELS = ("channels", "num_channels", "n_channels")


if TYPE_CHECKING:
    Network = Callable[..., nn.Module] | nn.Module
else:
    # What the command line builds; modules come from Python alone.
    Network = Callable[[int, int], nn.Module]


def import_path(path: str) -> Any:
    """The object that a dotted path names.

    Args:
        path: Such as `package.module.Network`.

    Raises:
        ValueError: If there is no such object, or if its module raises an error on import.

    Example:
        >>> import_path("torch.nn.Linear").__name__
        'Linear'
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"Expected `network` to be a path such as package.Class but got {path}.")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            value = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                continue
            raise _import_error(path, name, error) from error
        except (Exception, SystemExit) as error:
            raise _import_error(path, name, error) from error
        for part in parts[length:]:
            if not hasattr(value, part):
                raise ValueError(
                    f"Expected `network` to be the path of a class or function but got {path}: "
                    f"{name} has no {part}."
                )
            value, name = getattr(value, part), f"{name}.{part}"
        return value
    raise ValueError(
        f"Expected `network` to be the path of a class or function but got {path}: there is no "
        f"module named {parts[0]}."
    )


def _import_error(path: str, module: str, error: BaseException) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"Expected `network` {path} to import but {module} raises {type(error).__name__}: {reason}."
    )


def check_buildable(network: Any, name: str) -> None:
    """Raises if an object is no network, and nothing that could build one.

    Args:
        network: The object.
        name: What it was called, for the message.

    Raises:
        ValueError: If it is neither a module, nor a class of modules, nor a function.
    """
    other_class = inspect.isclass(network) and not issubclass(network, nn.Module)
    if other_class or not callable(network):
        kind = "a class of another kind" if other_class else f"a {type(network).__name__}"
        raise ValueError(
            "Expected `network` to be a torch.nn.Module, a class of them, or a function that "
            f"builds one, but got {name}, {kind}."
        )


def build_network(
    network: Network,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """A network for so many classes and image channels.

    A module is returned as it is. A class or function is called with both numbers, by name if it
    has arguments such as `num_classes` and `in_channels`, else in this order as its first required
    arguments; with one of them or with none if it takes no more. So constructors may be
    `(num_classes, in_channels, ...)`, `(num_classes, ...)`, `(in_channels, num_classes, ...)`,
    `(*, num_classes, ...)`, `(**kwargs)` as torchvision's models, or have no arguments.

    Args:
        network: A module, a class of modules, or a function that builds one.
        num_classes: Number of classes; `None` passes neither number.
        in_channels: Number of image channels.

    Raises:
        ValueError: If it is something else, needs more arguments, fails, or builds no module.

    Example:
        >>> build_network(lambda num_classes: nn.Linear(4, num_classes), 3, 1)
        Linear(in_features=4, out_features=3, bias=True)
        >>> build_network(nn.Identity(), 3, 1)
        Identity()
    """
    if isinstance(network, nn.Module):
        return network
    name = _name(network)
    check_buildable(network, name)
    args, kwargs = _arguments(network, name, [num_classes, in_channels])
    try:
        built = network(*args, **kwargs)
    except Exception as error:
        # Networks of this package say themselves which of their arguments is wrong.
        if isinstance(error, ValueError) and str(error).startswith("Expected `"):
            raise
        values = [*map(str, args), *(f"{key}={value}" for key, value in kwargs.items())]
        raise ValueError(
            f"Expected `network` to be built by {name}({', '.join(values)}) but it raises "
            f"{type(error).__name__}: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(built, nn.Module):
        raise ValueError(
            f"Expected `network` {name} to build a torch.nn.Module but it returns a "
            f"{type(built).__name__}."
        )
    return built


def _name(network: Any) -> str:
    if isinstance(network, partial):
        # The command line's partial holds the class among its arguments.
        classes = [value for value in network.args if inspect.isclass(value)]
        return _name(classes[0] if classes else network.func)
    return getattr(network, "__qualname__", None) or repr(network)


def _arguments(
    network: Callable[..., Any], name: str, numbers: Sequence[int | None]
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments that a class or function takes of the two numbers."""
    if None in numbers:
        return [], {}
    try:
        parameters = list(inspect.signature(network).parameters.values())
    except (TypeError, ValueError):
        return list(numbers), {}
    preset = set(network.keywords) if isinstance(network, partial) else set()
    named = {
        p.name: p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in preset
    }
    classes = [key for key in named if key in CLASSES][:1]
    channels = [
        key
        for key, default in named.items()
        if key in CHANNELS
        or (key in PERHAPS_CHANNELS and default in (inspect.Parameter.empty, 1, 3))
    ][:1]
    values = dict.fromkeys(classes, numbers[0]) | dict.fromkeys(channels, numbers[1])
    left = [] if classes or preset & set(CLASSES) else [numbers[0]]
    left += [] if channels or preset & {*CHANNELS, *PERHAPS_CHANNELS} else [numbers[1]]
    order = list(named)
    required = [k for k, v in named.items() if v is inspect.Parameter.empty and k not in values]
    # What stands before the number of classes is not the number of channels, unless it says so.
    misplaced = classes and any(order.index(key) < order.index(classes[0]) for key in required)
    if misplaced or len(required) > len(left):
        raise ValueError(
            f"Expected `network` to take numbers of classes and of channels but {name} requires "
            f"{', '.join(required)} as well."
        )
    values |= dict(zip(required, left))
    kinds = {parameter.kind for parameter in parameters}
    if not values and kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        return left, {}
    if not classes and not required and inspect.Parameter.VAR_KEYWORD in kinds:
        values |= {} if preset & set(CLASSES) else {"num_classes": numbers[0]}
    return [], values


class UserNetwork(nn.Module):
    """A network by its path: how the command line writes down networks that are not this package's.

    `--model.network package.Network --model.network.depth 4` becomes a `UserNetwork` of
    `path="package.Network"` and `arguments={"depth": 4}`, which builds a `package.Network` and no
    module around it.

    Args:
        num_classes: Number of classes, see `build_network`; `None` passes neither of the numbers.
        in_channels: Number of image channels.
        path: Dotted path of a class or function, or of a module object.
        arguments: Further arguments by name.

    Raises:
        ValueError: If there is nothing of that path, or if it builds no network.

    Example:
        >>> UserNetwork(path="torch.nn.Linear", arguments={"in_features": 4, "out_features": 3})
        Linear(in_features=4, out_features=3, bias=True)
    """

    # The command line reads the arguments from here; it is never called.
    def __init__(
        self,
        num_classes: int | None = None,
        in_channels: int | None = None,
        *,
        path: str,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()

    def __new__(
        cls,
        num_classes: int | None = None,
        in_channels: int | None = None,
        *,
        path: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any:
        """Builds the network."""
        network, given = import_path(path), dict(arguments or {})
        check_buildable(network, path)
        if isinstance(network, nn.Module):
            if given:
                raise ValueError(
                    f"Expected no arguments for {path}, a module that is built already, but got "
                    f"{', '.join(given)}."
                )
            return network
        return build_network(partial(network, **given), num_classes, in_channels)
