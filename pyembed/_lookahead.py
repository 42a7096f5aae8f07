"""Lookahead: a helper thread reads the pages of the next batches while the model computes this one.

It changes time, never results: batches are yielded unchanged and in order, and lookups and steps
compute the same, whether their rows are in memory and in the journal already or not.
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
JOIN_SECONDS = 5.0  # the longest wait at the end of a loop for a source that yields no batch


class HasTable(Protocol):
    """A layer of any framework that has a table."""

    @property
    def table(self) -> Any:
        """The table that holds the rows of the layer."""


def lookahead(
    batches: Iterable[Batch],
    table: HasTable | Table,
    depth: int = 2,
    ids: Callable[[Batch], ArrayLike] | None = None,
) -> Generator[Batch, None, None]:
    """Yield batches, while a helper thread reads the pages of the next ones into memory.

    With durability "power", and once the table has changes, the thread also writes the old content
    of their rows to the journal, so that steps on these batches do not wait for its sync.

    Parameters
    ----------
    batches : iterable
        The batches; the helper thread reads them, at most `depth` ahead of the loop.
    table : Table, Embedding or EmbeddingBag
        The table, or a layer over it; layers of `pyembed.torch` are accepted too.
    depth : int
        1 or more. Memory must have room for the pages of `depth` + 1 batches.
    ids : function of a batch, optional
        Returns the ids that the batch will look up, of any shape, as an array or tensor. By default
        a batch is its ids.

    Returns
    -------
    generator
        It yields the batches unchanged and in order.

    Raises
    ------
    ArgumentError, DTypeError
        If `depth` or `table` is not allowed. Exceptions of `batches` and `ids`, and IdError, are
        raised in the loop instead of the batch that they belong to.

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
    """The helper thread and its queue, which holds (batch, None), and last (None, exception)."""

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
        except BaseException as error:  # raised in the loop, by the caller's thread
            return None, error
        return batch, None

    def _take(self) -> tuple[Any, BaseException | None]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            self._changed.notify_all()
        return item

    def loop(self) -> Generator[Any, None, None]:
        try:
            self._thread.start()
            take = self._take
        except RuntimeError:  # the system allows no more threads: each batch is read in its turn
            take = self._next
        try:
            while True:
                batch, error = take()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield batch
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            if self._thread.ident is not None:  # it was started
                self._thread.join(JOIN_SECONDS)
            if not self._thread.is_alive():
                with contextlib.suppress(AttributeError):
                    self._batches.close()  # type: ignore[attr-defined]
