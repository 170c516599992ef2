"""Ways to break a checkpoint and the config of its run, each with what its refusal must name."""

from collections.abc import Callable
from typing import Any

import torch


def _changed(**parts: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, **parts}


def _without(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {key: value for key, value in content.items() if key not in names}


def _weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, "state_dict": change(dict(content["state_dict"]))}


# What is done to the content of a checkpoint of AT after two epochs, and what the refusal names.
CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "empty": (lambda content: {}, "`state_dict`"),
    "a list": (lambda content: [1], "list"),
    "weights alone": (lambda content: content["state_dict"], "`state_dict`"),
    "no version": (_without("pytorch-lightning_version"), "`pytorch-lightning_version`"),
    "no loops": (_without("loops"), "`loops`"),
    "no callbacks": (_without("callbacks"), "`callbacks`"),
    "no optimizer": (_without("optimizer_states"), "`optimizer_states`"),
    "text as epoch": (_changed(epoch="x"), "`epoch`"),
    "more epochs": (_changed(epoch=7), "`--trainer.max_epochs` to be >= 8"),
    "weights of text": (_changed(state_dict={"a": "b"}), "tensors"),
    "no weights": (_changed(state_dict={}), "lacks"),
    "one weight less": (
        _weights(lambda weights: {k: v for k, v in weights.items() if k != "normalize.mean"}),
        "lacks normalize.mean",
    ),
    "one weight more": (_weights(lambda weights: {**weights, "foo": torch.zeros(1)}), "also foo"),
    "another shape": (
        _weights(lambda weights: {**weights, "normalize.mean": torch.zeros(3)}),
        "normalize.mean of shape (3,)",
    ),
    "another class": (_changed(robust_flatness_class="TRADES"), "is one of TRADES"),
}
# What is done to the config.yaml of its run.
RUN_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no model": (_without("model"), "`model`"),
    "no data": (_without("data"), "`data`"),
    "text as model": (_changed(model="AT"), "`model`"),
    "a number as model": (_changed(model=3), "`model`"),
    "a number as trainer": (_changed(trainer=3), "`--trainer`"),
    "a list": (lambda content: [1], "to hold a mapping"),
    "no YAML": (lambda content: "{", "YAML"),
    "an unknown key": (_changed(foo=3), "`--foo`"),
}
