"""Table: where rows come from, how they grow, and how they are kept: memory, a file, an array.

What can be done with the rows is in `rows`. This file says in the manifest that they are about to
change. It knows neither optimizers (they ask for columns) nor bytes on disk (`store` does).
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads
from pyembed import init as initialisers
from pyembed._checks import F32, IdArray, as_ids, require_count, require_float32
from pyembed.errors import ArgumentError
from pyembed.init import Initializer
from pyembed.rows import Rows
from pyembed.storage import create, manifest, memory_lock, page_cache, store
from pyembed.storage.columns import fresh_rows, row_columns, zeroed_rows
from pyembed.storage.page_cache import Stats


class Table(Rows):
    """Rows of float32: a weight, and the columns of state that go with it.

    Made by `Table.create` and `Table.open` (a file), `Table.memory` and `Table.from_array`.

    A table on disk holds one lock: one writer, or any number of readers. Whatever its writer dies
    of, the next to open it finds the last commit; see `create` for the levels of durability.

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
    optimizer : dict of str to dict
        How far the optimizers over this table have come, by the name of the rule: their own
        ``{"steps": n}``. Committed with the rows.
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

    def __init__(
        self, backing: store.Store | None, array: F32, columns: dict[str, int], workers: int
    ) -> None:
        keeper = backing.keeper if backing else None
        super().__init__(array, columns, workers, keeper.pages if keeper else None)
        self._keeper = keeper
        self.path = backing.path if backing else None
        self._store = backing
        self._state = manifest.Manifest(array.shape[0], columns)
        self.optimizer: dict[str, dict[str, int]] = backing.optimizer if backing else {}
        self._borrowed = False  # the rows are the caller's own array
        self._has_locked = False  # pages, by lock_hot
        if backing is not None:
            self._finalizer = weakref.finalize(self, backing.abandon)

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
        durability: str = "process",
        num_threads: int | None = None,
    ) -> Table:
        """Make a table on disk, in fixed memory, and open it for writing.

        Parameters
        ----------
        path : path-like
            A folder that must not exist yet. It appears complete or not at all.
        rows, dim : int
            Shape of the weight: 0..2^40 rows, 1..65536 floats each.
        optimizer : str, optional
            Whose state the rows shall carry, by the name of its rule: "adagrad", "adam", "adamw",
            "ftrl", "lamb", "lars", "momentum", "nesterov", "rmsprop", "rowwise_adagrad",
            "rowwise_adam", "sgd". Options may need a column ``row_steps`` or ``last_step`` too.
        columns : mapping of str to int, optional
            Columns of your own and their widths; they start as zero.
        init : Initializer, optional
            Fills the weight; zeros if not given. See `pyembed.init`.
        seed : int
            For a random `init`.
        durability : {"process", "power", "none"}
            What the last commit survives: the death of this process at any moment, also that of
            the machine, or neither.
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
        widths, workers = row_columns(dim, optimizer, columns), _threads.resolve(num_threads)
        chunks = fresh_rows(widths, 0, rows, init or initialisers.zeros(), seed, workers)
        manifest.check_durability(durability)
        create.create(Path(path), widths, chunks, rows, durability=durability)
        return cls.open(path, num_threads=workers)

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
        mode : {"r+", "r", "c"}
            Read and write; read; write to a private copy that never reaches the file.
        live : bool
            With mode "r": read beside a writer, whose half-done changes will be seen.
        salvage : bool
            Open although the last writer ended without a commit; rows may be from any time since.
        memory_limit : int or float, optional
            Bytes, or a share of the memory, that the table's pages may take: above it they are
            given back, so that the rest of the machine stays usable. Needs Linux 6.5.
        durability : {"process", "power", "none"}, optional
            From now on, instead of what the table was made with.

        Raises
        ------
        LockedError
            If a writer has it, or for "r+" anybody.
        DirtyError
            If the last writer ended without a commit, and the rows cannot be brought back to it.
        FormatError
            If the files are not what the manifest says.
        """
        if mode not in ("r", "r+", "c"):
            raise ArgumentError(f"mode = {mode!r}; allowed: 'r', 'r+', 'c'")
        if live and mode != "r":
            raise ArgumentError(f"live=True needs mode='r', not {mode!r}")
        workers = _threads.resolve(num_threads)
        limit = page_cache.limit_bytes(memory_limit)
        if durability is not None:
            manifest.check_durability(durability)
        backing = store.Store(Path(path), mode, live, salvage, limit, durability, workers)
        try:
            return cls(backing, backing.array, backing.manifest.columns, workers)
        except BaseException:
            backing.release()
            raise

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
        widths, workers = row_columns(dim, optimizer, columns), _threads.resolve(num_threads)
        array = zeroed_rows(rows, sum(widths.values()))
        if init is not None:
            recipe = init.for_shape(rows, widths["weight"])
            recipe.fill(array[:, : widths["weight"]], seed, 0, workers)
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
        columns, workers = {"weight": array.shape[1]}, _threads.resolve(num_threads)
        try:
            table = cls(None, array.view(np.ndarray), columns, workers)
        except ValueError as error:
            raise ArgumentError(f"{error}; use np.ascontiguousarray(array)") from None
        table._borrowed = True
        return table

    # --- while it is open ---------------------------------------------------------------------

    def _announce_change(self, touched: NDArray[np.int64]) -> None:
        if self._store is None:
            super()._announce_change(touched)
        else:
            self._store.protect(touched)
            if self._keeper is not None:
                self._keeper.changing()

    def _is_training(self) -> bool:
        return self.writable and self.state == "dirty"

    def _expect_change(self, ids: IdArray) -> None:
        if self._store is not None:
            self._store.write_ahead(ids, self)

    def _keeps_journal(self) -> bool:
        return self._store is not None and self._store.keeps_journal

    def _may_add_columns(self) -> bool:
        return self._store is None

    def __reduce__(self) -> tuple[Any, ...]:
        # A file is opened again by its path; memory travels with its bytes.
        if self._store is not None:
            return _reopen, (str(self.path), self._store.mode, self.num_threads)
        columns = {name: self.column(name) for name in self.columns}
        return _rebuild, (columns, self.num_threads, self.optimizer)

    @property
    def committed(self) -> manifest.Manifest:
        """All that the manifest says of the last commit, and whether rows changed since."""
        return self._store.manifest if self._store else self._state

    @property
    def meta(self) -> dict[str, Any]:
        return dict(self.committed.meta)

    @property
    def durability(self) -> str:
        """What the last commit survives, see `create`."""
        return self.committed.durability

    @property
    def generation(self) -> int:
        return self.committed.generation

    @property
    def state(self) -> str:
        """ "clean" right after a commit, "dirty" once rows have changed since."""
        return self.committed.state

    @property
    def id_map(self) -> NDArray[np.int64] | None:
        _ = self.weight_column
        return self._store.id_map if self._store else None

    def rows_of(self, ids: ArrayLike) -> IdArray:
        """The rows of these ids, for every call that takes rows: gather, step, a `padding_idx`.

        Where the table has no `id_map`, ids are rows: they come back as they are, without a copy.
        The ids of a data set are best translated once, before it is trained on.

        Parameters
        ----------
        ids : integers of any shape

        Returns
        -------
        int64 array of the shape of ids
            Or the ids themselves.

        Raises
        ------
        IdError
            If an id is outside ``0 .. rows-1``.
        DTypeError, ClosedError
        """
        id_map, ids = self.id_map, as_ids(ids)
        _core.check_ids(ids, self.rows, _threads.for_work(ids.size, self.num_threads))
        return ids if id_map is None else np.asarray(id_map[ids])

    def stats(self) -> Stats:
        """How much of the table is in memory, and what its batches found there.

        Examples
        --------
        >>> Table.memory(rows=4, dim=2).stats().resident_bytes
        32
        """
        _ = self.weight_column
        return page_cache.in_memory(self.nbytes) if self._keeper is None else self._keeper.stats()

    def lock_hot(self, n: int) -> int:
        """Read the first `n` rows, and keep them in memory until the table is closed.

        In a table built in the order of frequency these are the hot ones. Their pages are locked
        (mlock), so the system never gives them back: leave room for everything else, as a process
        without any is killed. A later call replaces an earlier one; 0 unlocks, and so does
        `append`.

        Parameters
        ----------
        n : int
            0..rows. All columns of these rows are locked.

        Returns
        -------
        int
            How many rows are locked. Fewer than `n` where the process may not lock so much
            (``ulimit -l``), with a `RuntimeWarning`.

        Raises
        ------
        ArgumentError, DTypeError, ClosedError
        """
        n = require_count(n, "n", 0, self.rows)
        columns = [column.array for column in self._columns.values()]
        if self._has_locked:
            memory_lock.unlock_rows(columns)
        self._has_locked = n > 0
        return memory_lock.lock_rows(columns, n)

    def __repr__(self) -> str:
        if self._weight is None:
            return f"<pyembed.Table {self.path or 'in memory'}: closed>"
        widths = ", ".join(f"{name} {width}" for name, width in self.columns.items())
        return f"<pyembed.Table {self.path or 'in memory'}: {self.rows:,} rows of {widths}>"

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
        if self._borrowed:
            raise ArgumentError("the rows are an array of yours; append to it, and wrap the result")
        if self.id_map is not None:
            raise ArgumentError(
                f"{self.path} has an id map, in which rows at the end would have no id; build a "
                "table with room for ids to come: give each a count of 0"
            )
        init = init or initialisers.zeros()
        with self._turns:
            chunks = fresh_rows(self.columns, self.rows, n, init, seed, self.num_threads)
            if self._store is not None:
                self._store.append(chunks, n)
                self._attach(self._store.array, self._store.manifest.columns)
                return
            # State columns that were added beside the weight come into the row here.
            widths, rows = self.columns, self.rows
            grown = zeroed_rows(rows + n, sum(widths.values()))
            old = [column.array for column in self._columns.values()]
            np.concatenate(old, axis=1, out=grown[:rows])
            recipe = init.for_shape(rows + n, self.dim)
            recipe.fill(grown[rows:, : self.dim], seed, rows, self.num_threads)
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
        with self._turns:
            _ = self.weight_column
            if self._open_blocks:
                raise ArgumentError("commit inside a writing() block; end the block first")
            if self._store is not None:
                self._store.commit(meta)
                return
            state, kept = self._state, self._state.meta if meta is None else meta
            done = {"generation": state.generation + 1, "optimizer": self.optimizer}
            state = state.with_changes(**done, meta=kept)
            self._state = manifest.decode(manifest.encode(state), "meta")

    def rollback(self) -> None:
        """Bring rows, their state and number, `meta` and `optimizer` back to the last commit.

        Views taken earlier show the old rows; no other call may run.

        Raises
        ------
        ArgumentError
            If there is no journal: in memory, or with durability "none".
        ReadOnlyError
        """
        with self._turns:
            _ = self.weight_column
            if self._open_blocks:
                raise ArgumentError("rollback inside a writing() block; end the block first")
            if self._store is None:
                raise ArgumentError("a table in memory keeps no journal; use Table.create")
            self._store.rollback()
            self._attach(self._store.array, self._store.manifest.columns)

    def close(self) -> None:
        """Commit and let go of the files. Closing twice is allowed."""
        self._finish(commit=True)

    def _finish(self, commit: bool) -> None:
        with self._turns:
            if self._weight is None:
                return
            try:
                if self._store is not None and self._store.mode == "r+":
                    if commit:
                        self._store.commit(None)
                    elif self._store.keeps_journal:
                        with contextlib.suppress(OSError):  # then the next to open it does it
                            self._store.rollback()
            finally:
                if self._has_locked:  # the mapping may live on in the caller's views
                    memory_lock.unlock_rows([column.array for column in self._columns.values()])
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


def _reopen(path: str, mode: str, num_threads: int) -> Table:
    return Table.open(path, mode, num_threads=num_threads)


def _rebuild(
    columns: dict[str, F32], num_threads: int, optimizer: dict[str, dict[str, int]]
) -> Table:
    widths = {name: array.shape[1] for name, array in columns.items()}
    rows = zeroed_rows(len(columns["weight"]), sum(widths.values()))
    np.concatenate(list(columns.values()), axis=1, out=rows)
    table = Table(None, rows, widths, num_threads)
    table.optimizer |= optimizer
    return table
