"""Annotations that the command line gives a meaning of its own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Eps = float
else:

    class Eps(float):
        """A number that the command line and YAML also take as a fraction such as `8/255`.

        Only ever an annotation: values are plain floats, so that checkpoints stay loadable with
        `weights_only=True`.
        """
