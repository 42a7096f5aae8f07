"""Table: rows of float32 and the operations on them, the main class of the library.

A table checks arguments, chooses the number of threads, and passes the work to its store, which
knows where the rows are (memory, a file, an array of the caller), and to the kernels. It knows
columns, and neither optimizers (they ask the store for columns) nor bytes on disk.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads, grouping
from pyembed import init as initialisers
from pyembed._checks import (
    F32,
    IdArray,
    as_ids,
    as_output,
    as_values,
    require_apart,
    require_count,
    require_float32,
)
from pyembed._progress import slow_loop
from pyembed.errors import ArgumentError
from pyembed.init import Initializer
from pyembed.storage import create, manifest, page_cache
from pyembed.storage.columns import fresh_rows, row_columns, zeroed_rows
from pyembed.storage.file_store import open_store
from pyembed.storage.page_cache import Stats
from pyembed.storage.recovery import Frames
from pyembed.storage.store import NO_ROWS, NO_STATE, ArrayStore, MemoryStore, Store


class Renormed(NamedTuple):
    """The counts that `Table.renorm` returns.

    Attributes
    ----------
    scaled : int
        Rows that were scaled.
    with_nan : int
        Rows with a NaN, which stay as they are.
    """

    scaled: int
    with_nan: int


class Table:
    """Rows of float32: a weight, and the columns of optimizer state that go with it.

    Use `Table.create` and `Table.open` for a table on disk, `Table.memory` and `Table.from_array`
    for one in memory. A table is a context manager that closes it.

    A table on disk holds a lock: one writer, or any number of readers. However its writer dies, the
    next process that opens the table finds the last commit; `create` explains the levels of
    durability.

    Parameters
    ----------
    store : Store
        The rows. Optimizers and layers call the store, not the table.
    num_threads : int
        Number of threads for calls on the table.

    Attributes
    ----------
    rows, dim : int
        Shape of the weight.
    columns : dict of str to int
        All columns of a row and their widths; the first is ``weight``.
    path : pathlib.Path or None
        Where the table is, absolute; None in memory.
    weight : float32 array of shape (rows, dim)
        A read-only view; see `writing` for a writable one.
    nbytes : int
        Bytes of all columns.
    meta : dict
        A copy of what the last commit stored.
    generation : int
        Number of commits.
    optimizer : dict of str to dict
        The number of steps of each rule over this table: ``{"adam": {"steps": 9}}``. A copy; it
        is committed with the rows.
    id_map : int64 array of shape (rows,) or None
        ``id_map[id]`` is the row of an id, in a table that was built in the order of frequency; a
        read-only view of its file. None where ids are rows. See `rows_of`.

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

    def __init__(self, store: Store, num_threads: int) -> None:
        self.store, self.num_threads = store, num_threads
        self.path = store.path
        self._open_blocks = 0  # a commit inside a block of writing() would hold half a change
        self._finalizer = weakref.finalize(self, store.abandon)

    # --- constructors -------------------------------------------------------------------------

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
        durability: str = "process",
        num_threads: int | None = None,
    ) -> Table:
        """Make a table on disk, with a few megabytes of memory, and open it for writing.

        Parameters
        ----------
        path : path-like
            A folder that must not exist yet. It appears complete or not at all.
        rows, dim : int
            Shape of the weight: 0..2^40 rows, 1..65536 floats each.
        optimizer : str, optional
            Reserve columns for the state of this rule, see `pyembed.optim`: "adagrad", "adam", …
            Step options may need a column ``row_steps`` or ``last_step`` as well.
        columns : mapping of str to int, optional
            Your own columns and their widths; they start as zeros.
        init : Initializer, optional
            Fills the weight; zeros if not given. See `pyembed.init`.
        seed : int
            For a random `init`.
        durability : {"process", "power", "none"}
            What the last commit survives: the death of this process at any moment; also that of
            the machine; or neither.
        num_threads : int, optional
            For this and all later calls on the table.

        Returns
        -------
        Table

        Raises
        ------
        FileExistsError, ArgumentError
        TableError
            If the disk has not enough space.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "items.pyembed"
        >>> with Table.create(path, rows=4, dim=2, optimizer="adagrad") as t:
        ...     t.columns
        {'weight': 2, 'sum': 2}
        """
        rows = require_count(rows, "rows", 0, manifest.MAX_ROWS)
        widths, threads = row_columns(dim, optimizer, columns), _threads.resolve(num_threads)
        chunks = fresh_rows(widths, 0, rows, init or initialisers.zeros(), seed, threads)
        manifest.check_durability(durability)
        create.create(Path(path), widths, chunks, rows, durability=durability)
        return cls.open(path, num_threads=threads)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: str = "r+",
        *,
        live: bool = False,
        salvage: bool = False,
        memory_limit: int | float | None = None,
        durability: str | None = None,
        num_threads: int | None = None,
    ) -> Table:
        """Open a table, or a bare .npy of float32 rows as one with the column ``weight``.

        Parameters
        ----------
        path : path-like
            The folder of a table, or a .npy file.
        mode : {"r+", "r", "c"}
            Read and write; read; write to a private copy that never reaches the file.
        live : bool
            With mode "r": read while a writer has the table open, and see its uncommitted changes.
        salvage : bool
            Open although the last writer ended without a commit; rows may be from any time since.
        memory_limit : int or float, optional
            Bytes, or a share of the memory: pages above it are evicted. Needs Linux 6.5.
        durability : {"process", "power", "none"}, optional
            The table's durability from now on; unchanged by default.
        num_threads : int, optional
            For all calls on the table, see `create`.

        Returns
        -------
        Table
            The open table.

        Raises
        ------
        LockedError
            If a writer has it open, or for "r+" any reader.
        DirtyError, FormatError
            If the rows cannot be rolled back to the last commit, or do not match the manifest.

        Examples
        --------
        >>> import tempfile
        >>> np.save(path := tempfile.mkdtemp() + "/items.npy", np.ones((2, 3), np.float32))
        >>> Table.open(path, "r").dim
        3
        """
        if mode not in ("r", "r+", "c"):
            raise ArgumentError(f"mode = {mode!r}; allowed: 'r', 'r+', 'c'")
        if live and mode != "r":
            raise ArgumentError(f"live=True needs mode='r', not {mode!r}")
        threads = _threads.resolve(num_threads)
        limit = page_cache.limit_bytes(memory_limit)
        if durability is not None:
            manifest.check_durability(durability)
        how = (live, salvage, limit, durability, threads)
        return cls(open_store(Path(path), mode, *how, progress=_show_recovery), threads)

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
        """Make a table in memory; an optimizer adds missing state columns to it.

        Parameters
        ----------
        rows, dim : int
            The number of rows, and the floats of each row's weight.
        optimizer, columns, init, seed, num_threads : optional
            See `create`.

        Returns
        -------
        Table
            The new table.

        Raises
        ------
        ArgumentError, DTypeError
            If an argument is not allowed.
        TableError
            If memory does not suffice.

        Examples
        --------
        >>> Table.memory(rows=4, dim=2)
        <pyembed.Table in memory: 4 rows of weight 2>
        """
        rows = require_count(rows, "rows", 0, manifest.MAX_ROWS)
        widths, threads = row_columns(dim, optimizer, columns), _threads.resolve(num_threads)
        array = zeroed_rows(rows, sum(widths.values()))
        if init is not None:
            recipe = init.for_shape(rows, widths["weight"])
            recipe.fill(array[:, : widths["weight"]], seed, 0, threads)
        return cls(MemoryStore(array, widths), threads)

    @classmethod
    def from_array(cls, array: F32, *, num_threads: int | None = None) -> Table:
        """Make a table over an array of yours, without a copy.

        Parameters
        ----------
        array : float32 array of shape (rows, dim)
            Rows may be strided (a slice of columns, an np.memmap); the floats of a row are
            contiguous. It stays yours: you see each update in it at once.
        num_threads : int, optional
            For all calls on the table.

        Returns
        -------
        Table

        Raises
        ------
        DTypeError, ArgumentError

        Examples
        --------
        >>> array = np.zeros((2, 1), np.float32)
        >>> Table.from_array(array).scatter_add([1], np.full((1, 1), 5, np.float32))
        >>> array.tolist()
        [[0.0], [5.0]]
        """
        require_float32(array, "the array")
        if array.ndim != 2 or not 1 <= array.shape[1] <= manifest.MAX_DIM:
            allowed = f"(rows, dim) with dim in 1..{manifest.MAX_DIM}"
            raise ArgumentError(f"the array has shape {array.shape}; allowed: {allowed}")
        threads = _threads.resolve(num_threads)
        try:
            store = ArrayStore(array.view(np.ndarray))
        except ValueError as error:
            raise ArgumentError(f"{error}; use np.ascontiguousarray(array)") from None
        return cls(store, threads)

    # --- properties ---------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.store.weight_column.rows

    @property
    def dim(self) -> int:
        """Floats of a row of the weight."""
        return self.store.weight_column.dim

    @property
    def columns(self) -> dict[str, int]:
        """All columns of a row and their widths."""
        return {name: column.dim for name, column in self.store.columns.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return 4 * self.rows * sum(self.columns.values())

    @property
    def weight(self) -> F32:
        """A read-only view of the weight."""
        return self.column("weight")

    @property
    def writable(self) -> bool:
        """Whether rows may be changed."""
        return self.store.weight_column.writable

    @property
    def committed(self) -> manifest.Manifest:
        """The manifest: the last commit, and whether rows changed since."""
        return self.store.manifest

    @property
    def meta(self) -> dict[str, Any]:
        """A copy of what the last commit stored."""
        return dict(self.committed.meta)

    @property
    def durability(self) -> str:
        """The level of durability, see `create`."""
        return self.committed.durability

    @property
    def generation(self) -> int:
        """Number of commits."""
        return self.committed.generation

    @property
    def state(self) -> str:
        """ "clean" right after a commit, "dirty" once rows have changed since."""
        return self.committed.state

    @property
    def optimizer(self) -> dict[str, dict[str, int]]:
        """A copy of the number of steps of each rule."""
        return copy.deepcopy(self.store.steps)

    @property
    def id_map(self) -> NDArray[np.int64] | None:
        """The row of each id, or None where ids are rows."""
        _ = self.store.weight_column
        return self.store.id_map

    def __repr__(self) -> str:
        if self.store.is_closed:
            return f"<pyembed.Table {self.path or 'in memory'}: closed>"
        widths = ", ".join(f"{name} {width}" for name, width in self.columns.items())
        return f"<pyembed.Table {self.path or 'in memory'}: {self.rows:,} rows of {widths}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle of a table on disk has its path; one of a table in memory has its rows.
        location = self.store.location()
        if location is not None:
            return _reopen, (*location, self.num_threads)
        columns = {name: self.column(name) for name in self.columns}
        return _rebuild, (columns, self.num_threads, self.optimizer)

    def stats(self) -> Stats:
        """Return how much of the table is in memory, and how many rows its batches found there.

        Returns
        -------
        Stats
            The numbers of this moment.

        Examples
        --------
        >>> Table.memory(rows=4, dim=2).stats().resident_bytes
        32
        """
        _ = self.store.weight_column
        return self.store.stats()

    # --- rows ---------------------------------------------------------------------------------

    def column(self, name: str) -> F32:
        """Return a read-only view of one column.

        Parameters
        ----------
        name : str
            The name of the column.

        Returns
        -------
        ndarray of float32, shape (rows, width)
            A view that follows each change of the rows.

        Raises
        ------
        ArgumentError
            If there is no such column.

        Examples
        --------
        >>> Table.memory(rows=4, dim=2, columns={"bias": 1}).column("bias").shape
        (4, 1)
        """
        _ = self.store.weight_column
        if name not in self.store.columns:
            raise ArgumentError(f"no column {name!r}; this table has {', '.join(self.columns)}")
        view = self.store.columns[name].array.view()
        view.flags.writeable = False
        return view

    def gather(self, ids: ArrayLike, out: F32 | None = None) -> F32:
        """Copy the rows that `ids` name.

        Parameters
        ----------
        ids : integers of any shape
            int64 and int32 are used as they are. They must not change during the call.
        out : float32 array of shape ids.shape + (dim,), optional
            The array to copy to.

        Returns
        -------
        float32 array of shape ids.shape + (dim,)
            `out`, or a fresh array.

        Raises
        ------
        IdError
            If an id is outside ``0 .. rows-1``; `out` is then untouched.
        DTypeError, ArgumentError, ClosedError

        Examples
        --------
        >>> Table.memory(rows=4, dim=2).gather([3, 0]).shape
        (2, 2)
        """
        weight = self.store.weight_column
        ids = as_ids(ids)
        if out is not None:
            out = as_output(out, (*ids.shape, weight.dim))
            if np.may_share_memory(out, ids):
                raise ArgumentError("out shares memory with the ids; give it memory of its own")
        return _core.gather(
            weight, ids, out, _threads.for_work(ids.size * weight.dim, self.num_threads)
        )

    def rows_of(self, ids: ArrayLike) -> IdArray:
        """Translate ids to rows, for every call that takes rows: gather, step, a `padding_idx`.

        Where the table has no `id_map`, ids are rows: they come back as they are, without a copy.
        Translate the ids of a data set once, before training.

        Parameters
        ----------
        ids : array of integers, any shape
            The ids of the data set.

        Returns
        -------
        ndarray of int64, shape ids.shape
            Row numbers; the ids themselves if the table has no id map.

        Raises
        ------
        IdError
            If an id is outside ``0 .. rows-1``.
        DTypeError, ClosedError

        Examples
        --------
        >>> Table.memory(rows=4, dim=2).rows_of([3, 0])
        array([3, 0])
        """
        id_map, ids = self.id_map, as_ids(ids)
        _core.check_ids(ids, self.rows, _threads.for_work(ids.size, self.num_threads))
        return ids if id_map is None else np.asarray(id_map[ids])

    def prefetch(self, ids: ArrayLike, wait: bool = False) -> None:
        """Start readahead of the pages of the rows that `ids` name.

        It changes no result, and reads nothing if a sample of the rows is all in memory.
        `pyembed.lookahead` calls it for a loop, with `wait`.

        Parameters
        ----------
        ids : array of integers, any shape
            Row numbers.
        wait : bool
            Return once the pages are in memory and mapped, so that a later lookup, or a step on a
            table that has uncommitted changes, does not wait for the system. Use it on a thread of
            its own. With durability "power" a helper thread also records and syncs the old content
            of these rows, so that such a step does not have to.

        Raises
        ------
        IdError, DTypeError, ClosedError

        Examples
        --------
        >>> Table.memory(rows=4, dim=2).prefetch([3, 0])
        """
        store, ids = self.store, as_ids(ids)
        weight = store.weight_column
        training = store.is_training
        if _core.readahead(weight, ids) and wait:
            _core.map_pages(weight, ids, training)
        if wait and training:
            store.write_ahead(ids, self)

    def scatter_add(
        self, ids: ArrayLike, values: ArrayLike, alpha: float = 1.0, deterministic: bool = False
    ) -> None:
        """Add ``alpha * values[i]`` to row ``ids[i]``, duplicates included.

        Any number of threads may call it at once; each addition to a row takes a lock, so none is
        lost.

        Parameters
        ----------
        ids : array of integers, any shape
            Row numbers.
        values : array of float32, shape ids.shape + (dim,)
            The values to add to each row.
        alpha : float
            A factor for all values.
        deterministic : bool
            Sum the values of duplicate ids in the order of the batch. Otherwise the order, and so
            the last bits, may depend on threads.

        Raises
        ------
        IdError, DTypeError, ArgumentError, ReadOnlyError
            Before anything is written.

        Examples
        --------
        >>> t = Table.memory(rows=2, dim=1)
        >>> t.scatter_add([1, 1], np.array([[2], [3]], np.float32), alpha=0.5)
        >>> t.gather(1)
        array([2.5], dtype=float32)
        """
        store, alpha = self.store, float(alpha)
        weight = store.weight_column
        batch = _core.read_batch(ids, values, weight.rows, weight.dim, -1, False)
        if batch is None:
            ids = as_ids(ids)
            values = as_values(values, (*ids.shape, weight.dim), "values")
            batch = _core.Batch(ids, values, weight.rows, weight.dim)
        require_apart(batch.grad, (weight,), "values")
        rows = self._read_change(batch, deterministic)
        threads = _threads.for_work(batch.grad.size, self.num_threads)
        if deterministic:
            with store.still():
                (column,) = store.begin_change(NO_STATE, rows)
                _core.add_groups(column, batch, alpha, threads)
            return
        with store.shared():
            (column,) = store.begin_change(NO_STATE, rows)
            _core.scatter_add(column, batch, alpha, threads)

    def renorm(self, ids: ArrayLike, max_norm: float, norm_type: float = 2.0) -> Renormed:
        """Scale the rows that `ids` name, each once, down to a p-norm of at most `max_norm`.

        A row with a larger norm n is multiplied by ``max_norm / (n + 1e-7)``, the rule of
        torch.nn.functional.embedding. The norm is summed in double, so that it does not overflow;
        rows with a NaN stay as they are.

        Parameters
        ----------
        ids : array of integers, any shape
            Row numbers.
        max_norm : float
            0 or more; inf changes nothing.
        norm_type : float
            p: 0 counts the floats that are not zero, inf takes the largest.

        Returns
        -------
        Renormed
            The number of rows that were scaled, and of rows with a NaN.

        Raises
        ------
        IdError, DTypeError, ArgumentError, ReadOnlyError
            Before anything is written.

        Examples
        --------
        >>> import numpy as np, pyembed
        >>> t = pyembed.Table.from_array(np.array([[3, 4], [0, 1]], np.float32))
        >>> t.renorm([0, 1, 0], max_norm=1.0)
        Renormed(scaled=1, with_nan=0)
        >>> t.gather(0)
        array([0.6, 0.8], dtype=float32)
        """
        for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
            if not value >= 0:
                raise ArgumentError(f"{name} = {value}; allowed: 0 or more, inf included")
        store, ids = self.store, as_ids(ids)
        weight = store.weight_column
        batch = _core.Batch(ids, None, weight.rows, weight.dim)
        rows = self._read_change(batch, True)
        threads = _threads.for_work(ids.size * weight.dim, self.num_threads)
        with store.still():
            (column,) = store.begin_change(NO_STATE, rows)
            return Renormed(*_core.renorm(column, batch, max_norm, norm_type, threads))

    @contextmanager
    def writing(self, ids: ArrayLike | None = None) -> Iterator[F32]:
        """Give a writable view of the weight for the length of a block, to set rows by hand.

        Parameters
        ----------
        ids : integers of any shape, or None for all rows
            The rows that the block may change. Changes of other rows cannot be rolled back.

        Yields
        ------
        float32 array of shape (rows, dim)

        Raises
        ------
        IdError, DTypeError, ReadOnlyError, TableError

        Examples
        --------
        >>> import pyembed
        >>> t = pyembed.Table.memory(rows=3, dim=2)
        >>> with t.writing([2]) as weight:
        ...     weight[2] = 5
        >>> t.gather(2)
        array([5., 5.], dtype=float32)
        """
        store, weight = self.store, self.store.weight_column
        if ids is None:
            rows = np.arange(weight.rows) if store.keeps_journal else NO_ROWS
        else:
            batch = _core.Batch(as_ids(ids), None, weight.rows, weight.dim)
            rows = self._read_change(batch, False)
        with store.still():
            (column,) = store.begin_change(NO_STATE, rows)
            view = column.array.view()
            self._open_blocks += 1
            try:
                yield view
            finally:
                self._open_blocks -= 1
                view.flags.writeable = False

    def _read_change(self, batch: _core.Batch, grouped: bool) -> NDArray[np.int64]:
        """Check the ids of rows that are about to change, before the manifest is written.

        Return the rows, ascending and unique, if the batch is to be grouped or a journal needs
        them: the batch is sorted once for both.
        """
        if grouped or self.store.keeps_journal:
            grouping.group_batches([batch], self.num_threads)
            return batch.unique_rows
        _core.check(batch, _threads.for_work(batch.ids.size, self.num_threads))
        return NO_ROWS

    def lock_hot(self, n: int) -> int:
        """Read the first `n` rows, and keep them in memory until the table is closed.

        In a table built in the order of frequency these are the hot rows. Their pages are locked
        (mlock), so the system never evicts them. Leave memory for everything else: the system kills
        processes when it has none. A later call replaces an earlier one; 0 unlocks, and so does
        `append`.

        Parameters
        ----------
        n : int
            0..rows. All columns of these rows are locked.

        Returns
        -------
        int
            Number of locked rows. Fewer than `n` where the process may not lock so much
            (``ulimit -l``), with a `RuntimeWarning`.

        Raises
        ------
        ArgumentError, DTypeError, ClosedError

        Examples
        --------
        >>> Table.memory(rows=4, dim=2).lock_hot(0)
        0
        """
        return self.store.lock_rows(require_count(n, "n", 0, self.rows))

    def append(self, n: int, init: Initializer | None = None, seed: int = 0) -> None:
        """Add `n` rows at the end.

        With the `init` and `seed` that the table was made with, the rows are those that a larger
        table would have had. Views taken earlier show the old rows; no other call may run.

        Parameters
        ----------
        n : int
            The number of rows to add.
        init : Initializer, optional
            Fills the weight; zeros by default.
        seed : int
            For a random `init`.

        Raises
        ------
        TableError
            If the disk has not enough space; the table is then as it was.
        ReadOnlyError, ArgumentError

        Examples
        --------
        >>> t = Table.memory(rows=4, dim=2)
        >>> t.append(3)
        >>> t.rows
        7
        """
        n = require_count(n, "n", 0, manifest.MAX_ROWS - self.rows)
        if self.id_map is not None:
            raise ArgumentError(
                f"{self.path} has an id map, in which rows at the end would have no id; build a "
                "table with room for ids to come: give each a count of 0"
            )
        with self.store.still():
            self.store.append(n, init or initialisers.zeros(), seed, self.num_threads)

    # --- commit, rollback, close --------------------------------------------------------------

    def commit(self, meta: dict[str, Any] | None = None) -> None:
        """Make rows, optimizer state and steps durable, and with them a small state of yours.

        Parameters
        ----------
        meta : dict, optional
            Plain JSON, such as the position in the data. If not given, the last one is kept.

        Raises
        ------
        ArgumentError
            If meta is not JSON; nothing is committed then.
        ReadOnlyError, TableError

        Examples
        --------
        >>> t = Table.memory(rows=4, dim=2)
        >>> t.commit(meta={"epoch": 1})
        >>> t.meta, t.generation
        ({'epoch': 1}, 1)
        """
        with self.store.still():
            self._require_no_block("commit")
            self.store.commit(meta)

    def rollback(self) -> None:
        """Bring rows, their number, optimizer state, steps and `meta` back to the last commit.

        Views taken earlier show the old rows; no other call may run.

        Raises
        ------
        ArgumentError
            If there is no journal: in memory, or with durability "none".
        ReadOnlyError, TableError

        Examples
        --------
        >>> import pathlib, tempfile
        >>> with Table.create(pathlib.Path(tempfile.mkdtemp()) / "t", rows=1, dim=1) as t:
        ...     t.scatter_add([0], np.ones((1, 1), np.float32))
        ...     t.rollback()
        ...     t.gather(0)
        array([0.], dtype=float32)
        """
        with self.store.still():
            self._require_no_block("rollback")
            self.store.rollback()

    def _require_no_block(self, what: str) -> None:
        _ = self.store.weight_column
        if self._open_blocks:
            raise ArgumentError(f"{what} inside a writing() block; end the block first")

    def close(self) -> None:
        """Commit, and release files and memory. Closing twice is allowed.

        Raises
        ------
        TableError
            If the commit fails. The table is closed all the same.

        Examples
        --------
        >>> t = Table.memory(rows=4, dim=2)
        >>> t.close()
        >>> t
        <pyembed.Table in memory: closed>
        """
        self._finish(commit=True)

    def _finish(self, commit: bool) -> None:
        with self.store.still():
            if not self.store.is_closed:
                try:
                    self.store.close(commit)
                finally:
                    self._finalizer.detach()

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An exception may have left half of a change in the rows, so they are not committed.
        self._finish(commit=kind is None)


def _show_recovery(frames: Frames, what: str) -> Frames:
    return slow_loop(frames, what, "frame")


def _reopen(path: str, mode: str, num_threads: int) -> Table:
    # The process that pickled a writer may still have it open, so this one becomes a live reader.
    if mode == "r+":
        return Table.open(path, "r", live=True, num_threads=num_threads)
    return Table.open(path, mode, num_threads=num_threads)


def _rebuild(
    columns: dict[str, F32], num_threads: int, optimizer: dict[str, dict[str, int]]
) -> Table:
    widths = {name: array.shape[1] for name, array in columns.items()}
    rows = zeroed_rows(len(columns["weight"]), sum(widths.values()))
    np.concatenate(list(columns.values()), axis=1, out=rows)
    table = Table(MemoryStore(rows, widths), num_threads)
    table.store.steps.update(optimizer)
    return table
