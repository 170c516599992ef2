"""Known options near a misspelt one."""

from collections.abc import Sequence
from difflib import get_close_matches
from pkgutil import resolve_name

from jsonargparse import ArgumentParser


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that suggests known names near a misspelt one.

    Example:
        >>> nearest("trainer.maxepochs", ["trainer.max_epochs", "trainer.devices", "name"])
        '; did you mean `--trainer.max_epochs`?'
        >>> nearest("trainer.foo", ["trainer.max_epochs"])
        '.'
    """
    name, end = name.lower().replace("-", "_"), name.lower().rsplit(".", 1)[-1]
    # A long beginning that is right does not make the ends alike.
    close = [
        known
        for known in get_close_matches(name, names, n=5, cutoff=0.7)
        if "." not in name or get_close_matches(end, [known.rsplit(".", 1)[-1]], cutoff=0.6)
    ]
    # Those of model and data come last, and are meant first.
    close = close or [known for known in reversed(names) if known.endswith(f".{name}")]
    suggested = " or ".join(f"`--{known}`" for known in close[:2])
    return f"; did you mean {suggested}?" if close else "."


def options_of(class_path: str) -> list[str]:
    """The options that a class takes, with those of its default classes; none if it has no such.

    Example:
        >>> options_of("lightning.pytorch.callbacks.LearningRateMonitor")
        ['logging_interval', 'log_momentum', 'log_weight_decay']
    """
    parser = ArgumentParser()
    try:
        parser.add_class_arguments(resolve_name(class_path), fail_untyped=False)
    except Exception:
        # The class is what is wrong, which is for the parser to say.
        return []
    keys = list(parser.get_defaults().keys())
    return [key.replace("init_args.", "").removesuffix(".class_path") for key in keys]
