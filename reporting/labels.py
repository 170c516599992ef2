"""Names beside models, where there is room for them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from robust_flatness.plotting.canvas import FONT
from robust_flatness.reporting.scatter import METHOD, Spot

Array = NDArray[np.float64]

_MARGIN = 6.0  # pixels around a name that rings and lines better leave free
# Where a label may stand beside its model, in points, and which of its ends is there.
_OFFSETS = (
    (5, 0, "left", "center"),
    (-5, 0, "right", "center"),
    (0, 5, "center", "bottom"),
    (0, -5, "center", "top"),
    (4, 4, "left", "bottom"),
    (4, -4, "left", "top"),
    (-4, 4, "right", "bottom"),
    (-4, -4, "right", "top"),
)


def label_models(
    figure: Figure,
    axes: Axes,
    spots: Sequence[Spot],
    names: Sequence[str],
    others: Sequence[Spot] = (),
) -> list[Spot]:
    """Writes names beside models where they cover no model, and few lines and rings.

    Args:
        figure: With all that it will show, since that decides what room there is.
        axes: Of the models.
        spots: Models.
        names: One for each.
        others: Models without names, which must not be covered either.

    Returns:
        Models that there was no room for.
    """
    figure.draw_without_rendering()
    centres = axes.transData.transform([(spot.x, spot.y) for spot in (*spots, *others)])
    half = 2.6 * figure.dpi / 72
    taken = [Bbox([centre - half, centre + half]) for centre in centres]
    faint = _faint(axes)
    # The crowded first, which have the least choice.
    near = [sum(np.abs(centres - centre).max(axis=1) < 12 * half) for centre in centres]
    order = sorted(range(len(spots)), key=lambda index: -near[index])
    room = {index: _write(axes, spots[index], names[index], taken, faint) for index in order}
    return [spot for index, spot in enumerate(spots) if not room[index]]


def _faint(axes: Axes) -> Array:
    """Where a name is hard to read: along lines, arrows and bars, on rings; `(n, 2)` in pixels."""
    data = axes.transData
    paths = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    for text in axes.texts:
        if isinstance(text, Annotation) and text.arrow_patch is not None:
            paths.append(data.transform([text.xyann, text.xy]))
    rings = [np.empty((0, 2))]
    for drawn in axes.collections:
        if isinstance(drawn, LineCollection):
            paths += [data.transform(segment) for segment in drawn.get_segments()]
        elif drawn.get_gid() != METHOD:
            rings.append(data.transform(drawn.get_offsets()))
    return np.concatenate([*rings, *map(_along, paths)])


def _along(path: Array) -> Array:
    """Points close to each other on a path, `(n, 2)`."""
    shares = np.linspace(0, 1, 200)[:, None]
    return np.concatenate([a + shares * (b - a) for a, b in pairwise(path)])


def _write(axes: Axes, spot: Spot, name: str, taken: list[Bbox], faint: Array) -> bool:
    """Writes a name where it covers nothing that is taken, and takes its place."""
    text = axes.annotate(
        name, (spot.x, spot.y), xytext=(0, 0), textcoords="offset points", fontsize=FONT - 2
    )
    text.set(
        zorder=5, parse_math=False, path_effects=[withStroke(linewidth=1.5, foreground="white")]
    )
    found: list[tuple[int, int, Bbox]] = []
    for index, offset in enumerate(_OFFSETS):
        _move(text, *offset)
        box = text.get_window_extent()
        if _within(axes.bbox.get_points(), box.get_points()) and not box.count_overlaps(taken):
            low, high = box.padded(_MARGIN).get_points()
            covered = int(((low <= faint) & (faint <= high)).all(axis=1).sum())
            found.append((covered, index, box))
    if not found:
        text.remove()
        return False
    _, index, box = min(found, key=lambda place: place[:2])
    _move(text, *_OFFSETS[index])
    taken.append(box)
    return True


def _within(outer: Array, inner: Array) -> bool:
    """Whether corners `(2, 2)` are within others."""
    return bool((outer[0] <= inner[0]).all() and (inner[1] <= outer[1]).all())


def _move(text: Annotation, dx: float, dy: float, horizontal: str, vertical: str) -> None:
    text.xyann = (dx, dy)
    text.set(ha=horizontal, va=vertical)
