"""Networks of the user: a module, a class or function that builds one, or the path of one."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

# Names of the two arguments in constructors; other names are recognized by their order.
CLASSES = ("num_classes", "n_classes", "nb_classes", "num_class", "classes", "num_labels")
CHANNELS = ("in_channels", "in_chans", "in_ch", "input_channels", "num_input_channels")
# Names of the image channels or of the width: the former if required, or if the default is 1 or 3.
MAYBE_CHANNELS = ("channels", "num_channels", "n_channels")

if TYPE_CHECKING:
    Network = Callable[..., nn.Module] | nn.Module
else:
    # The type that the command line parses; modules come from Python only.
    Network = Callable[[int, int], nn.Module]


def import_path(path: str) -> Any:
    """Returns the object at a dotted path.

    Raises:
        ValueError: If there is no such object, or if importing its module raises an error.

    Example:
        >>> import_path("torch.nn.Linear").__name__
        'Linear'
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"Expected `network` to be a path such as package.Class but got {path}.")
    value: Any = None
    for i, part in enumerate(parts):
        parent, module = ".".join(parts[:i]), ".".join(parts[: i + 1])
        try:
            value = getattr(value, part) if hasattr(value, part) else import_module(module)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                missing = f"{parent} has no" if parent else "there is no module named"
                raise ValueError(
                    f"Expected `network` to be the path of a class or function but got {path}: "
                    f"{missing} {part}."
                ) from error
            raise ValueError(
                f"Expected `network` {path} to import but {module} raises {type(error).__name__}: "
                f"{' '.join(str(error).split())}."
            ) from error
    return value


def check_buildable(network: Any, name: str) -> None:
    """Raises an error if `network` is neither a module, nor a class of modules, nor a function."""
    other_class = inspect.isclass(network) and not issubclass(network, nn.Module)
    if other_class or not callable(network):
        kind = "a class of another kind" if other_class else f"a {type(network).__name__}"
        raise ValueError(
            "Expected `network` to be a torch.nn.Module, a class of them, or a function that "
            f"builds one, but got {name}, {kind}."
        )


def build_network(
    network: Network, num_classes: int | None = None, in_channels: int | None = None
) -> nn.Module:
    """Returns a network for a number of classes and of image channels.

    A module is returned as it is. A class or function is called with both numbers: by name if it
    has arguments such as `num_classes` and `in_channels`, else as its first required arguments, in
    this order; with one or none of them if it takes no more, as torchvision's `(**kwargs)`.

    Args:
        network: A module, a class of modules, or a function that builds one.
        num_classes: Number of classes; `None` passes neither number.
        in_channels: Number of image channels; `None` passes neither number.

    Raises:
        ValueError: If `network` is something else, requires more arguments, raises an error, or
            does not build a module.

    Example:
        >>> build_network(lambda num_classes: nn.Linear(4, num_classes), 3, 1)
        Linear(in_features=4, out_features=3, bias=True)
        >>> build_network(nn.Identity(), 3, 1)
        Identity()
    """
    if isinstance(network, nn.Module):
        return network
    # The command line's partial has the class among its arguments.
    own = [x for x in getattr(network, "args", ()) if inspect.isclass(x)]
    built_by = (*own, network.func)[0] if isinstance(network, partial) else network
    name = getattr(built_by, "__qualname__", None) or repr(built_by)
    check_buildable(network, name)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if num_classes is not None and in_channels is not None:
        args, kwargs = _arguments(network, name, num_classes, in_channels)
    try:
        built = network(*args, **kwargs)
    except Exception as error:
        # The messages of this package's networks name the argument themselves.
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


def _arguments(
    network: Callable[..., Any], name: str, num_classes: int, in_channels: int
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional and the named arguments for those of the numbers that are taken."""
    try:
        parameters = list(inspect.signature(network).parameters.values())
    except (TypeError, ValueError):
        return [num_classes, in_channels], {}
    bound = set(network.keywords) if isinstance(network, partial) else set()
    kinds = {parameter.kind for parameter in parameters}
    named = {
        p.name: p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in bound
    }
    names = list(named)
    classes = next((key for key in names if key in CLASSES), None)
    channels = next((key for key in names if _is_channels(key, named[key])), None)
    values = {} if classes is None else {classes: num_classes}
    values |= {} if channels is None else {channels: in_channels}
    left = [] if classes or bound & set(CLASSES) else [num_classes]
    left += [] if channels or bound & {*CHANNELS, *MAYBE_CHANNELS} else [in_channels]
    required = [k for k in names if named[k] is inspect.Parameter.empty and k not in values]
    # An argument before the number of classes is not the number of channels without its name.
    misplaced = classes and any(names.index(key) < names.index(classes) for key in required)
    if misplaced or len(required) > len(left):
        raise ValueError(
            f"Expected `network` to take numbers of classes and of channels but {name} requires "
            f"{', '.join(required)} as well."
        )
    values |= dict(zip(required, left))
    if not values and kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        return left, {}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    if takes_any and not classes and not required and not bound & set(CLASSES):
        values["num_classes"] = num_classes
    return [], values


def _is_channels(name: str, default: Any) -> bool:
    maybe = name in MAYBE_CHANNELS and default in (inspect.Parameter.empty, 1, 3)
    return maybe or name in CHANNELS


class UserNetwork(nn.Module):
    """The form in which the command line writes networks of other packages into `config.yaml`.

    `--model.network package.Network --model.network.depth 4` becomes a `UserNetwork` of
    `path="package.Network"` and `arguments={"depth": 4}`. Calling the class returns the
    `package.Network` itself.

    Args:
        num_classes: Number of classes, see `build_network`.
        in_channels: Number of image channels.
        path: Dotted path of a class or function, or of a module object.
        arguments: Further arguments by name.

    Raises:
        ValueError: If there is no such object, or if it does not build a network.

    Example:
        >>> UserNetwork(path="torch.nn.Linear", arguments={"in_features": 4, "out_features": 3})
        Linear(in_features=4, out_features=3, bias=True)
    """

    def __new__(
        cls,
        num_classes: int | None = None,
        in_channels: int | None = None,
        *,
        path: str,
        arguments: dict[str, Any] | None = None,
    ) -> Any:
        """Returns the network."""
        network, arguments = import_path(path), arguments or {}
        check_buildable(network, path)
        if isinstance(network, nn.Module):
            if arguments:
                raise ValueError(
                    f"Expected no arguments for {path}, a module that is built already, but got "
                    f"{', '.join(arguments)}."
                )
            return network
        return build_network(partial(network, **arguments), num_classes, in_channels)
