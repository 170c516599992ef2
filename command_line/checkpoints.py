"""Whether a checkpoint is one that a run can start from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import Tensor

from robust_flatness.command_line.checks import check_resumed, is_external
from robust_flatness.lightning_modules import AT
from robust_flatness.lightning_modules.at import CLASS_KEY
from robust_flatness.lightning_modules.loading import read_checkpoint

Shapes = dict[str, tuple[int, ...]]
# Without these Lightning trains on from the first epoch, or with a fresh optimizer.
_TO_GO_ON = ("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")


def check_start(config: Namespace, subcommand: str) -> Shapes | None:
    """Refuses a checkpoint that `fit` or `test` cannot start from.

    Args:
        config: Of the subcommand, after the parser.
        subcommand: `fit` or `test`.

    Returns:
        The shapes of its weights by name; `None` if there is no checkpoint.

    Raises:
        ValueError: If there is no such file, another class wrote it, or it is broken.
    """
    path = config.get("ckpt_path")
    if not path and subcommand == "test" and not is_external(config):
        raise ValueError("Expected `--ckpt_path` to name a checkpoint to test but got none.")
    if path is None:
        return None
    # Lightning would go on with an untrained network if it finds no `last` or `best`.
    if not Path(path).is_file():
        raise ValueError(
            f"Expected `--ckpt_path` to be a checkpoint file but got {path or 'nothing'}."
        )
    content = read_checkpoint(path, "--ckpt_path")
    written, asked = content.get(CLASS_KEY), config.model.class_path.rsplit(".", 1)[-1]
    if written is not None and written != asked:
        raise ValueError(
            f"Expected `--ckpt_path` to be a checkpoint of {asked} but {path} is one of {written}."
        )
    check_resumed(config)
    epochs = config.trainer.max_epochs
    return check_checkpoint(content, path, resume=subcommand == "fit", max_epochs=epochs)


def check_checkpoint(
    content: Mapping[str, Any], path: str, *, resume: bool, max_epochs: int | None
) -> Shapes:
    """Refuses a checkpoint that Lightning did not write, or that cannot be gone on from.

    Args:
        content: The checkpoint.
        path: Its file, for messages.
        resume: Whether training goes on from it.
        max_epochs: Of the trainer; `None` and -1 are without end.

    Returns:
        The shapes of its weights by name.

    Raises:
        ValueError: If a part is absent or broken, or more epochs are behind it.
    """
    needed = ("state_dict", "pytorch-lightning_version", *(_TO_GO_ON if resume else ()))
    absent = [key for key in needed if key not in content]
    if absent:
        raise ValueError(
            f"Expected `--ckpt_path` to be a checkpoint of Lightning but {path} holds no "
            f"`{absent[0]}`."
        )
    weights = content["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(
            f"Expected `--ckpt_path` to hold tensors as weights but {path} holds something else."
        )
    if resume:
        for key in ("epoch", "global_step"):
            if not isinstance(content[key], int) or content[key] < 0:
                raise ValueError(
                    f"Expected `--ckpt_path` to hold a number as `{key}` but {path} holds "
                    f"{content[key]!r}."
                )
        done = content["epoch"] + 1
        if max_epochs not in (None, -1) and done > max_epochs:
            raise ValueError(
                f"Expected `--trainer.max_epochs` to be >= {done}, the epochs behind {path}, but "
                f"got {max_epochs}."
            )
    return {name: tuple(value.shape) for name, value in weights.items()}


def check_weights(model: LightningModule, saved: Shapes, path: str) -> None:
    """Refuses a checkpoint whose weights are not those of the model.

    Args:
        model: Built, not yet loaded. A class that changes checkpoints as they load is trusted.
        saved: Shapes of the checkpoint's weights.
        path: Its file, for the message.

    Raises:
        ValueError: If names or shapes differ.
    """
    loads = type(model).on_load_checkpoint
    changes = loads not in (LightningModule.on_load_checkpoint, AT.on_load_checkpoint)
    if changes or not model.strict_loading:
        return
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    start = f"Expected `--ckpt_path` to hold the weights of this {type(model).__name__} but {path}"
    for name in sorted(own.keys() ^ saved.keys()):
        raise ValueError(f"{start} {'lacks' if name in own else 'holds also'} {name}.")
    for name, shape in own.items():
        if shape != saved[name]:
            raise ValueError(
                f"{start} holds {name} of shape {saved[name]}, where the model has {shape}."
            )
