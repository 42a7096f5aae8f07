"""Table: rows of float32 in memory or in a file, and what can be done with the rows that ids name.

It checks arguments, decides on threads, and says in the manifest that rows are about to change.
It knows neither optimizers (they ask for columns) nor bytes on disk (`store` does).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyembed import _core, grouping, manifest, store, threads
from pyembed import init as initialisers
from pyembed.arrays import (
    F32,
    as_ids,
    as_output,
    as_values,
    require_count,
    require_float32,
)
from pyembed.errors import ArgumentError, ClosedError, ReadOnlyError
from pyembed.init import Initializer
from pyembed.layout import fresh_rows, row_columns


class Table:
    """Rows of float32: a weight, and the columns of state that go with it.

    Made by `Table.create` and `Table.open` (a file), `Table.memory` and `Table.from_array`.

    A table on disk holds one lock: one writer, or any number of readers. Until a crash-safe
    journal exists, its promise is a flag: a table whose writer died says so when it is opened.

    Attributes
    ----------
    rows, dim : int
        Shape of the weight.
    columns : dict of str to int
        All columns of a row and their widths; the first is ``weight``.
    path : pathlib.Path or None
        Where it lies; None in memory.
    weight : float32 array of shape (rows, dim)
        A read-only view; see `writing` for a writable one.
    nbytes : int
        All columns.
    meta : dict
        What the last commit stored.
    generation : int
        How many commits there were.

    Examples
    --------
    >>> import numpy as np
    >>> with Table.memory(rows=4, dim=2) as t:
    ...     t.scatter_add([1, 3, 1], np.ones((3, 2), np.float32))
    ...     t.gather([1, 3, 0])
    array([[2., 2.],
           [1., 1.],
           [0., 0.]], dtype=float32)
    """

    def __init__(
        self, backing: store.Store | None, array: F32, columns: dict[str, int], workers: int
    ) -> None:
        self.path = backing.path if backing else None
        self.num_threads = workers
        self._store = backing
        self._state = manifest.Manifest(array.shape[0], columns)
        self._turn = threading.RLock()  # step, commit, append and close take turns
        self._attach(array, columns)
        if backing is not None:
            self._finalizer = weakref.finalize(self, backing.abandon)

    def _attach(self, array: F32, columns: Mapping[str, int]) -> None:
        self._columns: dict[str, _core.Column] = {}
        at = 0
        for name, width in columns.items():
            self._columns[name] = _core.Column(array[:, at : at + width])
            at += width
        self._weight: _core.Column | None = self._columns["weight"]

    # --- making one ---------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        rows: int,
        dim: int,
        optimizer: str | None = None,
        columns: Mapping[str, int] | None = None,
        init: Initializer | None = None,
        seed: int = 0,
        *,
        num_threads: int | None = None,
    ) -> Table:
        """Make a table on disk, in fixed memory, and open it for writing.

        Parameters
        ----------
        path : path-like
            A folder that must not exist yet. It appears complete or not at all.
        rows, dim : int
            Shape of the weight: 0..2^40 rows, 1..65536 floats each.
        optimizer : {"sgd", "adagrad", "adam"}, optional
            Whose state the rows shall carry.
        columns : mapping of str to int, optional
            Columns of your own and their widths; they start as zero.
        init : Initializer, optional
            Fills the weight; zeros if not given. See `pyembed.init`.
        seed : int
            For a random `init`.
        num_threads : int, optional
            For this and all later calls on the table.

        Raises
        ------
        FileExistsError
        TableError
            If the disk has not enough space.
        ArgumentError
        """
        rows = require_count(rows, "rows", 0, manifest.MAX_ROWS)
        widths, workers = row_columns(dim, optimizer, columns), threads.resolve(num_threads)
        chunks = fresh_rows(widths, 0, rows, init or initialisers.zeros(), seed, workers)
        store.create(Path(path), widths, chunks, rows)
        return cls.open(path, num_threads=workers)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: str = "r+",
        *,
        live: bool = False,
        salvage: bool = False,
        num_threads: int | None = None,
    ) -> Table:
        """Open a table, or a bare .npy of float32 rows as one with the column ``weight``.

        Parameters
        ----------
        path : path-like
        mode : {"r+", "r", "c"}
            Read and write; read; write to a private copy that never reaches the file.
        live : bool
            With mode "r": read beside a writer, whose half-done changes will be seen.
        salvage : bool
            Open although the last writer ended without a commit; rows may be from any time since.

        Raises
        ------
        LockedError
            If a writer has it, or for "r+" anybody.
        DirtyError
            If the last writer ended without a commit.
        FormatError
            If the files are not what the manifest says.
        """
        if mode not in ("r", "r+", "c"):
            raise ArgumentError(f"mode = {mode!r}; allowed: 'r', 'r+', 'c'")
        if live and mode != "r":
            raise ArgumentError(f"live=True needs mode='r', not {mode!r}")
        workers = threads.resolve(num_threads)
        backing = store.Store(Path(path), mode, live, salvage)
        return cls(backing, backing.array, backing.manifest.columns, workers)

    @classmethod
    def memory(
        cls,
        rows: int,
        dim: int,
        optimizer: str | None = None,
        columns: Mapping[str, int] | None = None,
        init: Initializer | None = None,
        seed: int = 0,
        *,
        num_threads: int | None = None,
    ) -> Table:
        """Make a table in memory, as `create` does; an optimizer adds missing state by itself."""
        rows = require_count(rows, "rows", 0, manifest.MAX_ROWS)
        widths, workers = row_columns(dim, optimizer, columns), threads.resolve(num_threads)
        array = store.anonymous(rows, sum(widths.values()))
        if init is not None:
            init.fill(array[:, : widths["weight"]], seed, 0, workers)
        return cls(None, array, widths, workers)

    @classmethod
    def from_array(cls, array: F32, *, num_threads: int | None = None) -> Table:
        """A table over the caller's own rows, without a copy.

        Parameters
        ----------
        array : float32 array of shape (rows, dim)
            Rows may be strided (a slice of columns, an np.memmap); the floats of a row are
            contiguous. It stays the caller's: updates are seen in it at once.

        Raises
        ------
        DTypeError, ArgumentError
        """
        require_float32(array, "the array")
        if array.ndim != 2 or not 1 <= array.shape[1] <= manifest.MAX_DIM:
            allowed = f"(rows, dim) with dim in 1..{manifest.MAX_DIM}"
            raise ArgumentError(f"the array has shape {array.shape}; allowed: {allowed}")
        try:
            return cls(
                None,
                array.view(np.ndarray),
                {"weight": array.shape[1]},
                threads.resolve(num_threads),
            )
        except ValueError as error:
            raise ArgumentError(f"{error}; use np.ascontiguousarray(array)") from None

    # --- what it is ---------------------------------------------------------------------------

    @property
    def _open_weight(self) -> _core.Column:
        if self._weight is None:
            raise ClosedError(f"the table {self.path or 'in memory'} was closed; open it again")
        return self._weight

    @property
    def rows(self) -> int:
        return self._open_weight.rows

    @property
    def dim(self) -> int:
        return self._open_weight.dim

    @property
    def columns(self) -> dict[str, int]:
        return {name: column.dim for name, column in self._columns.items()}

    @property
    def nbytes(self) -> int:
        return 4 * self.rows * sum(self.columns.values())

    @property
    def weight(self) -> F32:
        return self.column("weight")

    @property
    def writable(self) -> bool:
        """Whether rows may be changed."""
        return self._open_weight.writable

    @property
    def _manifest(self) -> manifest.Manifest:
        return self._store.manifest if self._store else self._state

    @property
    def meta(self) -> dict[str, Any]:
        return dict(self._manifest.meta)

    @property
    def generation(self) -> int:
        return self._manifest.generation

    @property
    def state(self) -> str:
        """ "clean" right after a commit, "dirty" once rows have changed since."""
        return self._manifest.state

    def column(self, name: str) -> F32:
        """A read-only view of one column, shape (rows, its width).

        Raises
        ------
        ArgumentError
            If there is none of this name.
        """
        _ = self._open_weight
        if name not in self._columns:
            raise ArgumentError(f"no column {name!r}; this table has {', '.join(self._columns)}")
        view = self._columns[name].array.view()
        view.flags.writeable = False
        return view

    def __repr__(self) -> str:
        if self._weight is None:
            return f"<pyembed.Table {self.path or 'in memory'}: closed>"
        widths = ", ".join(f"{name} {width}" for name, width in self.columns.items())
        return f"<pyembed.Table {self.path or 'in memory'}: {self.rows:,} rows of {widths}>"

    # --- rows ---------------------------------------------------------------------------------

    def gather(self, ids: ArrayLike, out: F32 | None = None) -> F32:
        """Copy the rows that `ids` name.

        Parameters
        ----------
        ids : integers of any shape
            int64 and int32 are used as they are. Must not change during the call.
        out : float32 array of shape ids.shape + (dim,), optional
            Where to put them.

        Returns
        -------
        float32 array of shape ids.shape + (dim,)
            `out`, or a fresh array.

        Raises
        ------
        IdError
            If an id is outside ``0 .. rows-1``; `out` is then untouched.
        DTypeError, ArgumentError, ClosedError
        """
        weight = self._open_weight
        ids = as_ids(ids)
        if out is not None:
            out = as_output(out, (*ids.shape, weight.dim))
        return _core.gather(
            weight, ids, out, threads.for_work(ids.size * weight.dim, self.num_threads)
        )

    def scatter_add(
        self, ids: ArrayLike, values: ArrayLike, alpha: float = 1.0, deterministic: bool = False
    ) -> None:
        """Add ``alpha * values[i]`` to row ``ids[i]``, duplicates included.

        Any number of threads may call this at once; each row is added to under a lock, so no
        addition is lost. With duplicate ids the order of the additions may depend on threads,
        and so may the last bits; `deterministic` sums them in the order of the batch instead.

        Raises
        ------
        IdError, DTypeError, ArgumentError, ReadOnlyError
            Before anything is written.
        """
        weight = self._open_weight
        ids = as_ids(ids)
        values = as_values(values, (*ids.shape, weight.dim), "values")
        workers = threads.for_work(values.size, self.num_threads)
        if deterministic:
            groups = grouping.group(ids, weight.rows, self.num_threads)
            with self.changing() as (column,):
                _core.add_groups(column, *groups, values, alpha, -1, False, workers)
            return
        if ids.size:  # the check comes before the manifest is touched
            _core.check_ids(ids, weight.rows, workers)
        (column,) = self._begin_change(())
        _core.scatter_add(column, ids, values, alpha, workers)

    @contextmanager
    def writing(self, ids: ArrayLike) -> Iterator[F32]:
        """A writable view of the weight, for as long as the block lasts, to set rows by hand.

        `ids` are the rows that the block may change; it yields an array of shape (rows, dim).

        Examples
        --------
        >>> t = Table.memory(rows=3, dim=2)
        >>> with t.writing([2]) as weight:
        ...     weight[2] = 5
        >>> t.gather(2)
        array([5., 5.], dtype=float32)
        """
        ids = as_ids(ids)
        _core.check_ids(ids, self.rows, self.num_threads)
        with self.changing() as (column,):
            view = column.array.view()
            try:
                yield view
            finally:
                view.flags.writeable = False

    @contextmanager
    def changing(self, state: tuple[str, ...] = ()) -> Iterator[tuple[_core.Column, ...]]:
        """The weight and state columns, to be changed by a kernel, while nobody else may.

        Raises
        ------
        ReadOnlyError
        ArgumentError
            If a table on disk has no such column.
        """
        with self._turn:
            yield self._begin_change(state)

    def _begin_change(self, state: tuple[str, ...]) -> tuple[_core.Column, ...]:
        weight = self._open_weight
        if self._store is not None:
            self._store.mark_dirty()
        elif not weight.writable:
            raise ReadOnlyError("the array under this table is read-only; give a writable one")
        if not state:
            return (weight,)
        self.ensure_columns(state)
        return (weight, *(self._columns[name] for name in state))

    def ensure_columns(self, names: tuple[str, ...]) -> None:
        """State columns as wide as the weight: a table in memory adds those that are missing.

        Raises
        ------
        ArgumentError
            If a table on disk lacks one, or one has another width.
        """
        weight = self._open_weight
        for name in names:
            if name not in self._columns:
                if self._store is not None:
                    raise ArgumentError(
                        f"{self.path} has no column {name!r}, only {', '.join(self._columns)}; "
                        "name the optimizer when the table is made: "
                        f"Table.create(path, {weight.rows}, {weight.dim}, optimizer=...)"
                    )
                self._columns[name] = _core.Column(store.anonymous(weight.rows, weight.dim))
            if self._columns[name].dim != weight.dim:
                width = self._columns[name].dim
                raise ArgumentError(f"column {name!r} has width {width}; expected {weight.dim}")

    def append(self, n: int, init: Initializer | None = None, seed: int = 0) -> None:
        """Add `n` rows at the end.

        With the `init` and `seed` that the table was made with, the rows are those that a larger
        table would have had. Views taken earlier show the old rows; no other call may run.

        Raises
        ------
        TableError
            If the disk has not enough space; the table is then as it was.
        ReadOnlyError, ArgumentError
        """
        n = require_count(n, "n", 0, manifest.MAX_ROWS - self.rows)
        init = init or initialisers.zeros()
        with self._turn:
            chunks = fresh_rows(self.columns, self.rows, n, init, seed, self.num_threads)
            if self._store is not None:
                self._store.append(chunks, n)
                self._attach(self._store.array, self._store.manifest.columns)
                return
            # State columns that were added beside the weight come into the row here.
            widths, rows = self.columns, self.rows
            grown = store.anonymous(rows + n, sum(widths.values()))
            old = [column.array for column in self._columns.values()]
            np.concatenate(old, axis=1, out=grown[:rows])
            init.fill(grown[rows:, : self.dim], seed, rows, self.num_threads)
            self._attach(grown, widths)

    # --- the end ------------------------------------------------------------------------------

    def commit(self, meta: dict[str, Any] | None = None) -> None:
        """Make the rows durable, and with them `meta`, small JSON of your own.

        Raises
        ------
        ArgumentError
            If meta is no JSON; nothing is committed then.
        ReadOnlyError
        """
        with self._turn:
            _ = self._open_weight
            if self._store is not None:
                self._store.commit(meta)
            else:
                state, kept = self._state, self._state.meta if meta is None else meta
                self._state = state.with_changes(generation=state.generation + 1, meta=kept)

    def close(self) -> None:
        """Commit and let go of the files. Closing twice is allowed."""
        self._finish(commit=True)

    def _finish(self, commit: bool) -> None:
        with self._turn:
            if self._weight is None:
                return
            try:
                if commit and self._store is not None and self._store.mode == "r+":
                    self._store.commit(None)
            finally:
                self._weight = None
                self._columns = {}
                if self._store is not None:
                    self._finalizer.detach()
                    self._store.release()

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an exception the rows are not what the caller wanted: they are not committed.
        self._finish(commit=kind is None)
