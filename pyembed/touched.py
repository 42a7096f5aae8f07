"""Which rows were changed since the last commit, and since the last export: a bit for each row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed.errors import ArgumentError

I64 = NDArray[np.int64]
BLOCK = 4096  # bytes of bits that are taken together: a page
BLOCK_ROWS = 8 * BLOCK
BLOCK_SHIFT = BLOCK_ROWS.bit_length() - 1


class Touched:
    """Which rows were changed since the last commit, and since the last export: a bit for each.

    Bits lie in pages of `BLOCK_ROWS`, and take memory as rows are touched.

    `new` does not mark, so that a row counts as touched only once its old content is safe: a
    caller asks, records, syncs, marks, with nobody else in between.

    Parameters
    ----------
    rows : int
        Of the last commit. Rows appended since have no content to go back to and are never new.
    generation : int
        Of that commit; `since` knows nothing before it.
    """

    def __init__(self, rows: int, generation: int = 0) -> None:
        self.rows = rows
        blocks = -(-rows // BLOCK_ROWS)
        self._bits = np.zeros((blocks, BLOCK), np.uint8)
        self._touched = np.zeros(blocks, np.bool_)  # blocks with a bit set
        self._changed = np.zeros((blocks, BLOCK), np.uint8)
        self._base = (generation, rows)

    def new(self, rows: I64) -> I64:
        """Those of `rows` (ascending, unique) that are not marked, in their order."""
        rows = rows[: np.searchsorted(rows, self.rows)]
        unmarked: I64 = _core.unmarked_rows(self._bits.reshape(-1), rows)
        return unmarked

    def mark(self, rows: I64) -> None:
        """Say that these rows (ascending, unique, out of `new`) are safe to change."""
        _core.mark_rows(self._bits.reshape(-1), rows)
        self._touched[rows >> BLOCK_SHIFT] = True

    def clear(self) -> None:
        """Forget the marks: the rows are those of the commit again."""
        blocks = np.flatnonzero(self._touched)
        self._bits[blocks] = 0
        self._touched[blocks] = False

    def commit(self, rows: int) -> None:
        """What was marked is committed; the table has this many rows now."""
        blocks = np.flatnonzero(self._touched)
        self._changed[blocks] |= self._bits[blocks]
        self.clear()
        if rows > self.rows:
            count = -(-rows // BLOCK_ROWS)
            for array in (self._bits, self._changed, self._touched):
                array.resize((count, *array.shape[1:]), refcheck=False)  # adds zeros
        self.rows = rows

    def since(self, generation: int) -> I64:
        """Every row whose committed content may differ from that of an earlier generation.

        Exact for the generation of `restart`; for a later one, rows that changed before it too.

        Raises
        ------
        ArgumentError
            If the generation is before that of `restart`.
        """
        base, base_rows = self._base
        if generation < base:
            allowed = f"allowed: {base} and later; export all rows instead"
            raise ArgumentError(f"changes since generation {generation} are not known; {allowed}")
        words = self._changed.reshape(-1).view(np.uint64)
        word = np.flatnonzero(words)
        bits = np.unpackbits(words[word].view(np.uint8), bitorder="little").reshape(-1, 64)
        where, bit = np.nonzero(bits)
        rows = 64 * word[where] + bit
        return np.concatenate(
            [rows[: np.searchsorted(rows, base_rows)], np.arange(base_rows, self.rows)]
        )

    def restart(self, generation: int) -> None:
        """From now on `since` is asked for what comes after this commit: it was exported."""
        self._base = (generation, self.rows)
        self._changed = np.zeros_like(self._bits)
