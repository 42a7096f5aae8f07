"""A picture of a model: its most frequent words in two dimensions, coloured by group.

The groups are a k-means clustering of the words' directions. The picture shows the plane in which
the centres of the groups are furthest apart: their first two principal components. Words of one
colour are close in the model; two colours that look close may not be. Labels are pushed apart until
they can be read, and a line connects each label to its word's point.

This is the only module that needs matplotlib, scipy and adjustText.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyembed.errors import ArgumentError
from pyembed.train.corpus import StrPath
from pyembed.train.neighbours import Model

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
        If matplotlib, scipy or adjustText is not installed.
    ArgumentError
        If there are less than three words, or one is unknown.
    """
    try:
        from adjustText import adjust_text
        from matplotlib.figure import Figure
        from scipy.cluster.vq import kmeans2
    except ImportError as error:
        raise ImportError(
            f"a plot needs more packages ({error}); pip install 'pyembed-tables[plot]'"
        ) from error
    with Model(directory) as model:
        if words is None:
            words = [word for word in model.vocab if len(word) > 2][:count]
        if len(words) < 3:
            raise ArgumentError(f"{len(words)} words; a plot needs 3 or more")
        directions = model.directions(words).astype(np.float64)
    centres, groups = kmeans2(directions, min(_GROUPS, len(words)), minit="++", rng=0)
    figure = Figure(figsize=_INCHES, dpi=_DPI)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_axis_off()
    axes.margins(0.06)
    colours = [f"C{group}" for group in groups]
    x, y = _project(directions, centres).T
    axes.scatter(x, y, c=colours, s=14)
    labels = [
        axes.text(*place, color=colour, fontsize=10, ha="center", va="center")
        for *place, colour in zip(x, y, words, colours, strict=True)
    ]
    lines = {"arrowstyle": "-", "color": "grey", "lw": 0.5, "alpha": 0.4}
    adjust_text(labels, x, y, ax=axes, arrowprops=lines)
    figure.savefig(path)


def _project(points: F64, centres: F64) -> F64:
    """Project points onto the first two principal components of the centres of their groups."""
    basis = centres if len(centres) > 3 else points
    axes = np.linalg.svd(basis - basis.mean(axis=0), full_matrices=False).Vh
    projected: F64 = (points - points.mean(axis=0)) @ axes[:2].T
    return projected
