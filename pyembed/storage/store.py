"""The store of a table: how its rows are kept. The base of all stores, and those in memory.

========================= =====================================================================
`MemoryStore`             rows in memory that the table allocated; it adds columns when asked
`ArrayStore`              rows in an array of the caller
`file_store.Reader`       a file that is read
`file_store.PrivateCopy`  a file whose changes stay in this process
`file_store.Writer`       a file that changes, with a transaction
========================= =====================================================================

`Table` checks arguments and calls the store; optimizers and layers take its columns to the kernels.
A change goes through two calls, in the block of a turn::

    with store.still():                            # or store.shared(), for additions under locks
        columns = store.begin_change(state, rows)  # the old content of these rows is safe now
        _core.scatter_add(columns[0], …)           # or another kernel that changes these rows
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed._checks import F32, IdArray
from pyembed.errors import ArgumentError, ClosedError, ReadOnlyError
from pyembed.init import Initializer
from pyembed.storage import manifest as manifests
from pyembed.storage import memory_lock, page_cache
from pyembed.storage.columns import zeroed_rows
from pyembed.storage.manifest import Manifest
from pyembed.storage.page_cache import Stats

I64 = NDArray[np.int64]
Steps = dict[str, dict[str, int]]
NO_STATE: Mapping[str, int] = {}
NO_ROWS = np.zeros(0, np.int64)


class Turns:
    """The turns of threads at the rows: many additions at once, or one other operation alone.

    The object itself is the turn of one thread alone, because a context manager of contextlib takes
    a microsecond more.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._adding = 0
        self.shared = SharedTurn(self)

    def __enter__(self) -> None:
        condition = self._condition
        condition.acquire()
        try:
            while self._adding:
                condition.wait()
        except BaseException:
            condition.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._condition.release()

    def begin_adding(self) -> None:
        """Enter the shared turn."""
        with self._condition:
            self._adding += 1

    def end_adding(self) -> None:
        """Leave the shared turn."""
        with self._condition:
            self._adding -= 1
            self._condition.notify_all()


class SharedTurn:
    """A turn that any number of threads share."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def __enter__(self) -> None:
        self._turns.begin_adding()

    def __exit__(self, *_: object) -> None:
        self._turns.end_adding()


class Store(ABC):
    """What keeps the rows of a table: the columns of a row, and the turns of threads at them.

    Parameters
    ----------
    steps : dict of str to dict
        See the attribute.

    Attributes
    ----------
    path : Path or None
        Where the file is; None in memory.
    columns : dict of str to Column
        The columns as the kernels take them; empty once the store is closed.
    steps : dict of str to dict
        Number of steps of each rule, ``{"adam": {"steps": 9}}``; committed and rolled back with
        the rows. Optimizers change it in place.
    id_map : int64 array or None
        See `pyembed.storage.id_map`.
    """

    path: Path | None = None
    id_map: I64 | None = None

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.columns: dict[str, _core.Column] = {}
        self._weight: _core.Column | None = None
        self._turns = Turns()
        self._has_locked = False  # whether lock_rows has locked pages

    def attach(self, array: F32, widths: Mapping[str, int], pages: _core.Pages | None) -> None:
        """Take the columns from an array of shape (rows, stride)."""
        columns, at = {}, 0
        for name, width in widths.items():
            columns[name] = _core.Column(array[:, at : at + width], pages)
            at += width
        self.columns, self._weight = columns, columns["weight"]

    def detach(self) -> None:
        """Drop the columns; the memory stays as long as an array shows it."""
        if self._has_locked:
            memory_lock.unlock_rows([column.array for column in self.columns.values()])
        self.columns, self._weight = {}, None

    @property
    @abstractmethod
    def manifest(self) -> Manifest:
        """The last commit, and whether rows changed since."""

    @property
    def keeps_journal(self) -> bool:
        """Whether `begin_change` needs the rows that will change."""
        return False

    @property
    def is_training(self) -> bool:
        """Whether rows that are looked up are likely to change."""
        return False

    @property
    def is_closed(self) -> bool:
        """Whether the columns are gone."""
        return self._weight is None

    @property
    def weight_column(self) -> _core.Column:
        """The weight as the kernels take it; ClosedError once the store is closed."""
        weight = self._weight
        if weight is None:
            raise ClosedError(f"the table {self.path or 'in memory'} was closed; open it again")
        return weight

    def still(self) -> Turns:
        """Return the turn of one thread alone: no other thread changes rows during the block."""
        return self._turns

    def shared(self) -> SharedTurn:
        """Return a turn that any number of threads share, to add to rows under locks."""
        return self._turns.shared

    @abstractmethod
    def begin_change(self, state: Mapping[str, int], rows: I64) -> tuple[_core.Column, ...]:
        """Keep the old content of rows, and return the columns that a kernel may change now.

        Parameters
        ----------
        state : mapping of str to int
            Names and widths of state columns; see `ensure_columns`.
        rows : int64 array, ascending and unique
            The rows that will change; only used with a journal.

        Returns
        -------
        tuple of Column
            The weight, then the columns of `state`.

        Raises
        ------
        ReadOnlyError, TableError, ClosedError
            No row was changed.
        """

    def columns_of(self, state: Mapping[str, int]) -> tuple[_core.Column, ...]:
        """Return the weight and these state columns, to be read."""
        columns = self.columns
        return (self.weight_column, *[columns[name] for name in state])

    @abstractmethod
    def ensure_columns(self, widths: Mapping[str, int]) -> None:
        """Have state columns of these names and widths: memory adds those that are missing.

        Raises
        ------
        ArgumentError
            If a file lacks one, or one has another width.
        """

    def write_ahead(self, ids: IdArray, owner: object) -> None:  # noqa: B027
        """Keep the old content of rows before a step asks for it, where that saves a wait."""

    @abstractmethod
    def append(self, n: int, init: Initializer, seed: int, num_threads: int) -> None:
        """Add rows at the end."""

    @abstractmethod
    def commit(self, meta: dict[str, Any] | None) -> None:
        """Make rows, steps and meta durable."""

    @abstractmethod
    def rollback(self) -> None:
        """Bring rows, steps and meta back to the last commit."""

    def lock_rows(self, n: int) -> int:
        """Lock the first rows in memory, instead of those that were locked before.

        Returns
        -------
        int
            How many are locked.
        """
        columns = [column.array for column in self.columns.values()]
        if self._has_locked:
            memory_lock.unlock_rows(columns)
        self._has_locked = n > 0
        return memory_lock.lock_rows(columns, n)

    @abstractmethod
    def stats(self) -> Stats:
        """Return how much is in memory."""

    def location(self) -> tuple[str, str] | None:
        """Return the path and the mode to open the table again; None in memory."""
        return None

    def close(self, commit: bool) -> None:
        """Commit or roll back what can be, and release the rows."""
        self.detach()

    def abandon(self) -> None:  # noqa: B027
        """Release the rows of a table that was dropped, or is open when Python exits."""


def require_width(column: _core.Column, name: str, width: int) -> None:
    """Compare the width of a column with the one that is asked for.

    Raises
    ------
    ArgumentError
    """
    if column.dim != width:
        raise ArgumentError(f"column {name!r} has width {column.dim}; expected {width}")


class MemoryStore(Store):
    """Rows in memory: commits count and keep meta, and nothing can be rolled back.

    Parameters
    ----------
    array : float32 array of shape (rows, stride)
    widths : mapping of str to int
        The columns of a row.
    """

    def __init__(self, array: F32, widths: Mapping[str, int]) -> None:
        super().__init__({})
        self._manifest = Manifest(array.shape[0], dict(widths))
        self.attach(array, widths, None)

    @property
    def manifest(self) -> Manifest:
        """The last commit, which is in memory alone."""
        return self._manifest

    def begin_change(self, state: Mapping[str, int], rows: I64) -> tuple[_core.Column, ...]:
        """Return the columns to change; missing state columns are added."""
        weight = self._weight or self.weight_column
        if not state:
            return (weight,)
        columns = self.columns
        try:
            return (weight, *[columns[name] for name in state])
        except KeyError:
            self.ensure_columns(state)
            return self.columns_of(state)

    def ensure_columns(self, widths: Mapping[str, int]) -> None:
        """Add the state columns that are missing, in memory of their own."""
        rows = self.weight_column.rows
        for name, width in widths.items():
            if name not in self.columns:
                self.columns[name] = _core.Column(zeroed_rows(rows, width))
            require_width(self.columns[name], name, width)

    def append(self, n: int, init: Initializer, seed: int, num_threads: int) -> None:
        """Add rows at the end; added state columns move into the row."""
        widths = {name: column.dim for name, column in self.columns.items()}
        rows, dim = self.weight_column.rows, self.weight_column.dim
        grown = zeroed_rows(rows + n, sum(widths.values()))
        old = [column.array for column in self.columns.values()]
        np.concatenate(old, axis=1, out=grown[:rows])
        recipe = init.for_shape(rows + n, dim)
        recipe.fill(grown[rows:, :dim], seed, rows, num_threads)
        self.attach(grown, widths, None)

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Count the commit, and keep its meta and steps."""
        before = self.manifest
        after = before.with_changes(
            generation=before.generation + 1,
            optimizer=self.steps,
            meta=before.meta if meta is None else meta,
        )
        # The round trip refuses a meta that no file could store, and copies it.
        self._manifest = manifests.decode(manifests.encode(after), "meta")

    def rollback(self) -> None:
        """Refuse: there is no journal."""
        raise ArgumentError("a table in memory keeps no journal; use Table.create")

    def stats(self) -> Stats:
        """Return the numbers of a table that no file backs."""
        return page_cache.in_memory(sum(column.array.nbytes for column in self.columns.values()))


class ArrayStore(MemoryStore):
    """Rows in an array of the caller, who sees each change at once.

    Parameters
    ----------
    array : float32 array of shape (rows, dim)
        It may be read-only.
    """

    def __init__(self, array: F32) -> None:
        super().__init__(array, {"weight": array.shape[1]})

    def begin_change(self, state: Mapping[str, int], rows: I64) -> tuple[_core.Column, ...]:
        """Return the columns to change."""
        if not self.weight_column.writable:
            raise ReadOnlyError("the array under this table is read-only; give a writable one")
        return super().begin_change(state, rows)

    def append(self, n: int, init: Initializer, seed: int, num_threads: int) -> None:
        """Refuse: the array belongs to the caller."""
        raise ArgumentError("the rows are an array of yours; append to it, and wrap the result")
