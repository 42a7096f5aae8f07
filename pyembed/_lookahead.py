"""The next batches' pages, asked for on a helper thread while the model computes this one.

It changes time, never results: a batch comes out as it went in, in its place, and a lookup that
finds its rows in memory does the same as one that has to wait for them. So does a step that finds
their old content in the journal, see `Rows.prefetch`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar

from numpy.typing import ArrayLike

from pyembed._checks import require_count
from pyembed.errors import DTypeError
from pyembed.table import Table

Batch = TypeVar("Batch")
MAX_DEPTH = 1 << 16
PATIENCE_SECONDS = 5.0  # how long the end of a loop waits for a source that gives no batch


class HasTable(Protocol):
    """A layer: it has a table, whichever framework it is of."""

    @property
    def table(self) -> Any:
        """Where its rows are."""


def lookahead(
    batches: Iterable[Batch],
    table: HasTable | Table,
    depth: int = 2,
    ids: Callable[[Batch], ArrayLike] | None = None,
) -> Generator[Batch, None, None]:
    """Yield the batches, with the pages of the next ones on their way into memory.

    With durability "power", and once the table has changes, the old content of their rows is on its
    way to the disk too, and a step does not wait for that sync: for batches that are trained on.

    Parameters
    ----------
    batches : iterable
        Read on a helper thread, at most `depth` batches ahead of the loop.
    table : Table, Embedding or EmbeddingBag
        The layers of `pyembed.torch` too.
    depth : int
        1 or more. Memory must hold the pages of `depth` + 1 batches.
    ids : function of a batch, optional
        The ids that it will look up, of any shape, a tensor too; if not given, a batch is its ids.

    Yields
    ------
    batch
        As it came from `batches`, in order.

    Raises
    ------
    ArgumentError, DTypeError
        At the call. What `batches` or `ids` raises, and an IdError, comes in the loop, in the place
        of the batch that it belongs to.

    Examples
    --------
    >>> import numpy as np, pyembed
    >>> t = pyembed.Table.memory(rows=4, dim=2)
    >>> for ids in pyembed.lookahead([[0, 1], [2, 3]], t):
    ...     rows = t.gather(ids)
    """
    require_count(depth, "depth", 1, MAX_DEPTH)
    found = table if isinstance(table, Table) else getattr(table, "table", None)
    if not isinstance(found, Table):
        allowed = "a Table, an Embedding or an EmbeddingBag"
        raise DTypeError(f"{type(table).__name__}; allowed: {allowed}")
    return _Source(batches, found, depth, ids).loop()


class _Source:
    """The helper thread and what it has ready: (batch, None), or (None, what ended it)."""

    def __init__(
        self,
        batches: Iterable[Any],
        table: Table,
        depth: int,
        ids: Callable[[Any], ArrayLike] | None,
    ) -> None:
        self._batches, self._table, self._depth, self._ids = iter(batches), table, depth, ids
        self._ready: deque[tuple[Any, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._ended = False  # the loop is over
        self._thread = threading.Thread(target=self._run, name="pyembed-lookahead", daemon=True)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or len(self._ready) < self._depth)
                if self._ended:
                    return
            batch, error = self._next()
            with self._changed:
                self._ready.append((batch, error))
                self._changed.notify_all()
            if error is not None:
                return

    def _next(self) -> tuple[Any, BaseException | None]:
        try:
            batch = next(self._batches)
            self._table.prefetch(batch if self._ids is None else self._ids(batch), wait=True)
        except BaseException as error:  # to be raised in the loop, where somebody sees it
            return None, error
        return batch, None

    def loop(self) -> Generator[Any, None, None]:
        self._thread.start()
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._ready)
                    batch, error = self._ready.popleft()
                    self._changed.notify_all()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield batch
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._thread.join(PATIENCE_SECONDS)
            if not self._thread.is_alive():
                with contextlib.suppress(AttributeError):
                    self._batches.close()  # type: ignore[attr-defined]
