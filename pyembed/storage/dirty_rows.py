"""The dirty rows of a table: a bit for each row that changed since the last commit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pyembed import _core

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
BLOCK = 4096  # bytes of bits that are cleared and read together: a page
BLOCK_ROWS = 8 * BLOCK
BLOCK_SHIFT = BLOCK_ROWS.bit_length() - 1
RANGE_BLOCKS = 512  # blocks in a range of `parts`
RANGE_BYTES = RANGE_BLOCKS * BLOCK
RANGE_ROWS = 8 * RANGE_BYTES


class DirtyRows:
    """The rows that changed since the last commit.

    The bits of unchanged pages of `BLOCK_ROWS` rows take no memory.

    `new` does not mark rows, because a row counts as dirty only once its old content is safe: the
    caller takes a lock, calls `new`, records these rows, syncs, and marks them. Other threads may
    call `new` in the meantime.

    Parameters
    ----------
    rows : int
        Number of rows at the last commit. Rows that were appended since have no content to go back
        to, and are never new.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        blocks = -(-rows // BLOCK_ROWS)
        self._bits = np.zeros((blocks, BLOCK), np.uint8)
        self._dirty = np.zeros(blocks, np.bool_)  # blocks with a bit set
        self._lock = threading.Lock()

    def new(self, rows: I64) -> I64:
        """Return the elements of `rows` (ascending, unique) that are not marked, in their order."""
        rows = rows[: np.searchsorted(rows, self.rows)]
        with self._lock:
            unmarked: I64 = _core.unmarked_rows(self._bits.reshape(-1), rows)
        return unmarked

    def mark(self, rows: I64) -> None:
        """Mark rows (ascending, unique, returned by `new`), which are now safe to change."""
        with self._lock:
            _core.mark_rows(self._bits.reshape(-1), rows)
        self._dirty[rows >> BLOCK_SHIFT] = True

    def parts(self) -> Iterator[tuple[int, U32, U8]]:
        """Yield the marks by ranges of `RANGE_ROWS` rows.

        Yields
        ------
        tuple
            The number of the range, the positions of its bytes that are not zero, and these bytes.
        """
        dirty = np.flatnonzero(self._dirty)
        for blocks in np.split(dirty, np.flatnonzero(np.diff(dirty // RANGE_BLOCKS)) + 1):
            if blocks.size:
                words = self._bits[blocks].view(np.uint64)
                block, word = np.nonzero(words != 0)  # first, as most bytes are zero
                bits = words[block, word].view(np.uint8)
                places = (blocks[block] % RANGE_BLOCKS * BLOCK + 8 * word).astype(np.uint32)
                used = np.flatnonzero(bits != 0)
                offsets = places[used >> 3] + (used & 7).astype(np.uint32)
                yield int(blocks[0]) // RANGE_BLOCKS, offsets, bits[used]

    def clear(self) -> None:
        """Remove all marks, after a rollback."""
        blocks = np.flatnonzero(self._dirty)
        self._bits[blocks] = 0
        self._dirty[blocks] = False

    def commit(self, rows: int) -> None:
        """Remove all marks after a commit of a table that has this many rows now."""
        self.clear()
        if rows > self.rows:
            count = -(-rows // BLOCK_ROWS)
            for array in (self._bits, self._dirty):
                array.resize((count, *array.shape[1:]), refcheck=False)  # adds zeros
        self.rows = rows
