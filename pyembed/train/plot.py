"""A picture of a model: its most frequent words in two dimensions, coloured by group.

The groups are a k-means clustering of the words' directions. The picture shows the plane in which
the centres of the groups are furthest apart: their first two principal components. Words of one
colour are close in the model; two colours that look close may not be. Labels are pushed apart until
they can be read, and a line connects each label to its word's point.

This is the only module that needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyembed.errors import ArgumentError
from pyembed.train.corpus import StrPath
from pyembed.train.neighbours import Model
from pyembed.train.subword import F32, I64

F64 = npt.NDArray[np.float64]

_GROUPS = 10  # the colours of matplotlib's "tab10"
_INCHES, _DPI = (16, 11), 120


def plot_words(
    directory: StrPath, words: Sequence[str] | None, path: StrPath, count: int = 150
) -> None:
    """Draw words of a trained model into a picture file.

    Parameters
    ----------
    directory : path-like
        A trained model.
    words : sequence of str or None
        The words to draw; None draws the most frequent words of three or more characters.
    path : path-like
        The picture to write; its suffix chooses the format, such as ``.png``.
    count : int
        The number of words to draw if `words` is None.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ArgumentError
        If there are less than three words, or one is unknown.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a plot needs matplotlib ({error}); pip install 'pyembed-tables[plot]'"
        ) from error
    with Model(directory) as model:
        if words is None:
            words = [word for word in model.vocab if len(word) > 2][:count]
        if len(words) < 3:
            raise ArgumentError(f"{len(words)} words; a plot needs 3 or more")
        directions = model.directions(words)
    groups = k_means(directions, min(_GROUPS, len(words)))
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    _draw(canvas, axes, plane(directions, groups), words, groups)
    figure.savefig(path)


def k_means(points: F32, k: int) -> I64:
    """The group of each point, by Lloyd's algorithm from centres far apart, without randomness."""
    first = int(np.argmax(np.linalg.norm(points - points.mean(axis=0), axis=1)))
    chosen = [first]
    distance = np.full(len(points), np.inf)
    while len(chosen) < k:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(np.argmax(distance)))
    centres = points[chosen].astype(np.float64)
    groups = np.full(len(points), -1)
    for _ in range(100):
        nearest = np.argmin(((points[:, None] - centres) ** 2).sum(axis=2), axis=1)
        if np.array_equal(nearest, groups):
            break
        groups = nearest
        for g in np.unique(groups):
            centres[g] = points[groups == g].mean(axis=0)
    return groups


def plane(points: F32, groups: I64) -> F64:
    """Project points onto the first two principal components of the centres of their groups."""
    centred = points.astype(np.float64) - points.mean(axis=0)
    centres = np.stack([centred[groups == g].mean(axis=0) for g in np.unique(groups)])
    basis = centres if len(centres) > 3 else centred
    _, _, axes = np.linalg.svd(basis - basis.mean(axis=0), full_matrices=False)
    projected: F64 = centred @ axes[:2].T
    return projected


def _draw(canvas: Any, axes: Any, at: F64, words: Sequence[str], groups: I64) -> None:
    """Draw points, labels moved until they do not overlap, and the lines between them."""
    colours = [f"C{g}" for g in groups]
    axes.scatter(*at.T, c=colours, s=14)
    axes.margins(0.06)
    labels = [
        axes.text(x, y, word, color=colour, fontsize=10, ha="center", va="center")
        for (x, y), word, colour in zip(at, words, colours, strict=True)
    ]
    canvas.draw()
    boxes = [label.get_window_extent() for label in labels]
    sizes = np.array([(box.width + 4, box.height) for box in boxes])
    points = axes.transData.transform(at)
    frame = axes.get_window_extent()
    low = np.array([frame.x0, frame.y0])
    high = np.array([frame.x1, frame.y1])
    placed = spread_labels(points + np.array([0.0, sizes[0, 1]]), sizes, low, high)
    back = axes.transData.inverted().transform(placed)
    for label, place, point, colour in zip(labels, back, at, colours, strict=True):
        label.set_position(place)
        axes.plot(*np.array([point, place]).T, color=colour, lw=0.5, alpha=0.4, zorder=0)


def spread_labels(wanted: F64, sizes: F64, low: F64, high: F64) -> F64:
    """Move boxes from their wanted places until no two overlap, for at most 1000 rounds.

    In a round, each pair that is less than a unit apart moves apart by half of the missing distance
    along the axis where less is missing. In the first 400 rounds each box also moves back a little
    towards its wanted place.
    """
    centres = wanted.copy()
    order = np.arange(len(centres))
    by_order = np.sign(order[:, None] - order)[..., None]
    for turn in range(1000):
        if turn < 400:
            centres += 0.02 * (wanted - centres)
        difference = centres[:, None] - centres
        missing = (sizes[:, None] + sizes) / 2 + 1 - np.abs(difference)
        missing[order, order] = 0
        if turn >= 400 and not np.any(np.all(missing > 1, axis=2)):
            break
        close = np.all(missing > 0, axis=2, keepdims=True)
        axis = np.eye(2)[np.argmin(missing, axis=2)]
        sign = np.where(difference == 0, by_order, np.sign(difference))
        centres += 0.25 * np.where(close, axis * sign * missing, 0).sum(axis=1)
        centres = np.clip(centres, low + sizes / 2, high - sizes / 2)
    return centres
