"""Which rows were changed since the last commit: a bit for each row."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pyembed import _core

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
BLOCK = 4096  # bytes of bits that are taken together: a page
BLOCK_ROWS = 8 * BLOCK
BLOCK_SHIFT = BLOCK_ROWS.bit_length() - 1
RANGE_BLOCKS = 512  # that `parts` looks at together
RANGE_BYTES = RANGE_BLOCKS * BLOCK
RANGE_ROWS = 8 * RANGE_BYTES


class Touched:
    """Which rows were changed since the last commit: a bit for each.

    Bits lie in pages of `BLOCK_ROWS`, and take memory as rows are touched.

    `new` does not mark, so that a row counts as touched only once its old content is safe: a
    caller asks, records, syncs, marks, with nobody else in between. Anybody may ask meanwhile.

    Parameters
    ----------
    rows : int
        Of the last commit. Rows appended since have no content to go back to and are never new.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        blocks = -(-rows // BLOCK_ROWS)
        self._bits = np.zeros((blocks, BLOCK), np.uint8)
        self._touched = np.zeros(blocks, np.bool_)  # blocks with a bit set
        self._looking = threading.Lock()

    def new(self, rows: I64) -> I64:
        """Those of `rows` (ascending, unique) that are not marked, in their order."""
        rows = rows[: np.searchsorted(rows, self.rows)]
        with self._looking:
            unmarked: I64 = _core.unmarked_rows(self._bits.reshape(-1), rows)
        return unmarked

    def mark(self, rows: I64) -> None:
        """Say that these rows (ascending, unique, out of `new`) are safe to change."""
        with self._looking:
            _core.mark_rows(self._bits.reshape(-1), rows)
        self._touched[rows >> BLOCK_SHIFT] = True

    def parts(self) -> Iterator[tuple[int, U32, U8]]:
        """The marks, a range of `RANGE_ROWS` rows at a time: its number, which of its bytes are not
        zero, and these."""
        touched = np.flatnonzero(self._touched)
        for blocks in np.split(touched, np.flatnonzero(np.diff(touched // RANGE_BLOCKS)) + 1):
            if blocks.size:
                words = self._bits[blocks].view(np.uint64)
                block, word = np.nonzero(words != 0)  # first, as most bytes are zero
                bits = words[block, word].view(np.uint8)
                places = (blocks[block] % RANGE_BLOCKS * BLOCK + 8 * word).astype(np.uint32)
                used = np.flatnonzero(bits != 0)
                offsets = places[used >> 3] + (used & 7).astype(np.uint32)
                yield int(blocks[0]) // RANGE_BLOCKS, offsets, bits[used]

    def clear(self) -> None:
        """Forget the marks: the rows are those of the commit again."""
        blocks = np.flatnonzero(self._touched)
        self._bits[blocks] = 0
        self._touched[blocks] = False

    def commit(self, rows: int) -> None:
        """What was marked is committed; the table has this many rows now."""
        self.clear()
        if rows > self.rows:
            count = -(-rows // BLOCK_ROWS)
            for array in (self._bits, self._touched):
                array.resize((count, *array.shape[1:]), refcheck=False)  # adds zeros
        self.rows = rows
