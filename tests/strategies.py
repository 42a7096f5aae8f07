"""Hypothesis strategies: batches of ids with duplicates and boundary values, and awkward dims."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Ids = NDArray[np.int32] | NDArray[np.int64]

# Around the vector widths (4, 8, 16 floats), a typical row, and one float.
DIMS = st.sampled_from([1, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 257])
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 1, 4), (40,), (300,)])


@dataclass(frozen=True)
class Batch:
    """The shape of a table, and the ids of a batch."""

    rows: int
    dim: int
    ids: Ids
    seed: int

    def table(self, columns: int = 1) -> NDArray[np.float32]:
        """Return rows of `columns` groups of dim floats, non-negative since some are squares."""
        rng = np.random.default_rng(self.seed)
        return np.abs(rng.standard_normal((self.rows, columns * self.dim), np.float32))

    def grad(self) -> NDArray[np.float32]:
        """Return a gradient row for each id."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((*self.ids.shape, self.dim), np.float32)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Ids of int32 or int64, of any shape, from a few rows (many duplicates) or from many."""
    rows = draw(st.sampled_from([1, 2, 5, 64, 2049, 70000]))
    shape = draw(SHAPES)
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    ids = np.asarray(rng.integers(0, rows, shape))
    if ids.size > 1 and draw(st.booleans()):  # the first and the last row
        ids.flat[0], ids.flat[-1] = 0, rows - 1
    narrow = draw(st.booleans())
    return Batch(rows, draw(DIMS), np.asarray(ids, np.int32) if narrow else ids, seed)


def bad_ids(rows: int) -> st.SearchStrategy[int]:
    """Ids of the range of int64 that no table of so many rows has."""
    extremes = [-1, rows, rows + 1, -rows, -rows - 1, 2**31, -(2**31), 2**63 - 1, -(2**63)]
    return st.sampled_from([i for i in extremes if not 0 <= i < rows])
