"""Weights from files of other projects, whatever wrapped the network that wrote them."""

import re
from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

# Put between names by DataParallel and torch.compile.
WRAPPERS = {"module", "_orig_mod"}
# Where files keep the weights of training, as opposed to averages of them.
PLACES = {"state_dict", "model_state_dict", "model_state", "model", "network", "net"}
AVERAGES = re.compile(r"ema|averag|swa|teacher|shadow|best", re.IGNORECASE)
# A counter of BatchNorm that the usual momentum does not need; files of old versions lack it.
COUNTER = "num_batches_tracked"
STATISTICS = re.compile(r"(^|\.)(new_|_)?(mean|std)$")


def load_weights(
    network: nn.Module, tensors: Mapping[str, Tensor], path: str, *, normalized: bool
) -> None:
    """Loads all weights of a network from the tensors of a file, and leaves none out.

    In the file, names may have any prefix, and the names of wrappers between them. If the weights
    are there more than once, those of training are taken before averages, and a warning says so.

    Args:
        network: Changed in place.
        tensors: By name, beginning with the names of the mappings that a tensor is in.
        path: The file, for messages.
        normalized: Whether a normalisation is put in front of the network.

    Raises:
        ValueError: If the file lacks a weight, or has one of another shape, or has weights or a
            normalisation that the network lacks.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> file = {"model.module.weight": torch.ones(1, 2), "model.module.bias": torch.zeros(1)}
        >>> load_weights(network, file, "a.pt", normalized=False)
        >>> network(torch.ones(2)).item()
        2.0
    """
    state = {
        name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)
    }
    own, file = _by_plain_name(state), _by_plain_name(tensors)
    copies = _copies(own, file)
    prefix = copies[0] if copies else ""
    _check_all_are_there(own, file, prefix, path)
    _check_none_is_left(own, file, prefix, path, normalized=normalized)
    if len(copies) > 1 and not _equal(own, file, *copies[:2]):
        rank_zero_warn(
            f"{path} holds the weights more than once: those of `{copies[0]}` are taken, and not "
            f"those of `{copies[1]}`."
        )
    loaded = {name: file[prefix + k][1] for k, (name, _) in own.items() if prefix + k in file}
    network.load_state_dict(loaded, strict=False)


def _by_plain_name(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Names and tensors by their names without those of wrappers, unless two would be the same."""
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): (name, tensor)
        for name, tensor in tensors.items()
    }
    if len(plain) == len(tensors):
        return plain
    return {name: (name, tensor) for name, tensor in tensors.items()}


def _copies(own: Mapping[str, object], file: Mapping[str, object]) -> list[str]:
    """Prefixes with which names of the network are in a file: full copies, the best one first.

    Without a full copy it is the prefix of most names.
    """
    counts: dict[str, int] = {}
    for name in file:
        for end in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[end:] in own:
                counts[name[:end]] = counts.get(name[:end], 0) + 1
    needed = [name for name in own if not name.endswith(COUNTER)]
    full = [prefix for prefix in counts if all(prefix + name in file for name in needed)]
    if not full:
        return sorted(counts, key=lambda prefix: -counts[prefix])[:1]

    def strangeness(prefix: str) -> tuple[bool, int, int]:
        parts = prefix.split(".")[:-1]
        others = sum(part not in PLACES for part in parts)
        return bool(AVERAGES.search(prefix)), others, len(parts)

    return sorted(full, key=strangeness)


def _check_all_are_there(
    own: Mapping[str, tuple[str, Tensor]],
    file: Mapping[str, tuple[str, Tensor]],
    prefix: str,
    path: str,
) -> None:
    missing = [name for name in own if prefix + name not in file]
    if not all(name.endswith(COUNTER) for name in missing):
        held = f"holds {len(file)}, such as {next(iter(file.values()))[0]}" if file else "is empty"
        raise ValueError(
            f"Expected `weights` to have all of the network's {len(own)} tensors but {path} lacks "
            f"{len(missing)}, such as {own[missing[0]][0]}; it {held}."
        )
    for key, (name, weight) in own.items():
        saved_name, saved = file.get(prefix + key, (name, weight))
        if saved.shape != weight.shape:
            raise ValueError(
                f"Expected `weights` to have {name} of shape {tuple(weight.shape)} but got "
                f"{tuple(saved.shape)} for {saved_name} in {path}."
            )


def _check_none_is_left(
    own: Mapping[str, object],
    file: Mapping[str, tuple[str, Tensor]],
    prefix: str,
    path: str,
    *,
    normalized: bool,
) -> None:
    ends = [(name, [m.end() for m in re.finditer(r"\.", name)]) for name in file]
    left = [name for name, dots in ends if not any(name[end:] in own for end in (0, *dots))]
    statistics = [file[name][0] for name in left if STATISTICS.search(name)]
    if statistics and not normalized:
        raise ValueError(
            f"Expected `input_mean` and `input_std`, as {path} has a normalisation, "
            f"{statistics[0]}, that the network lacks, but got None; zeros and ones are none."
        )
    rest = [
        file[name][0]
        for name in left
        if name.startswith(prefix) and not STATISTICS.search(name) and not name.endswith(COUNTER)
    ]
    if rest:
        raise ValueError(
            f"Expected `network` to have all weights of {path} but it lacks {len(rest)}, such as "
            f"{rest[0]}."
        )


def _equal(
    own: Mapping[str, object], file: Mapping[str, tuple[str, Tensor]], first: str, second: str
) -> bool:
    pairs = [(file.get(first + name), file.get(second + name)) for name in own]
    return all(a is None or b is None or torch.equal(a[1], b[1]) for a, b in pairs)
