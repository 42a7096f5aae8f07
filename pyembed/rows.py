"""Rows: what can be done with the rows that ids name, wherever they lie.

It checks arguments, decides on threads, and announces a change before it makes one. It knows
columns, and neither files nor optimizers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads, grouping
from pyembed._checks import F32, IdArray, as_ids, as_output, as_values, require_apart
from pyembed.errors import ArgumentError, ClosedError, ReadOnlyError
from pyembed.storage.columns import zeroed_rows

NO_STATE: Mapping[str, int] = {}


class Renormed(NamedTuple):
    """What `Rows.renorm` did: rows that were scaled, and rows with a NaN, which it left alone."""

    scaled: int
    with_nan: int


class _Turns:
    """Who may work on the rows: many additions at once, or one of everything else alone.

    It is itself the turn of one alone: a context manager of contextlib takes a microsecond more.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.RLock())
        self._adding = 0

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

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._adding += 1
        try:
            yield
        finally:
            with self._condition:
                self._adding -= 1
                self._condition.notify_all()


class Rows:
    """float32 rows cut into columns. `Table` adds where they come from and how they are kept."""

    path: Path | None = None

    def __init__(
        self,
        array: F32,
        columns: Mapping[str, int],
        num_threads: int,
        pages: _core.Pages | None = None,
    ) -> None:
        self.num_threads = num_threads
        self._pages = pages  # of a file: which rows are in memory
        self._turns = _Turns()
        self._open_blocks = 0  # of writing(), in which a commit would be half of one
        self._attach(array, columns)

    def _attach(self, array: F32, columns: Mapping[str, int]) -> None:
        self._columns: dict[str, _core.Column] = {}
        at = 0
        for name, width in columns.items():
            self._columns[name] = _core.Column(array[:, at : at + width], self._pages)
            at += width
        self._weight: _core.Column | None = self._columns["weight"]

    @property
    def weight_column(self) -> _core.Column:
        """The weight as the kernels take it."""
        if self._weight is None:
            raise ClosedError(f"the table {self.path or 'in memory'} was closed; open it again")
        return self._weight

    @property
    def rows(self) -> int:
        return self.weight_column.rows

    @property
    def dim(self) -> int:
        return self.weight_column.dim

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
        return self.weight_column.writable

    def column(self, name: str) -> F32:
        """A read-only view of one column, shape (rows, its width).

        Raises
        ------
        ArgumentError
            If there is none of this name.
        """
        _ = self.weight_column
        if name not in self._columns:
            raise ArgumentError(f"no column {name!r}; this table has {', '.join(self._columns)}")
        view = self._columns[name].array.view()
        view.flags.writeable = False
        return view

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
        weight = self.weight_column
        ids = as_ids(ids)
        if out is not None:
            out = as_output(out, (*ids.shape, weight.dim))
            if np.may_share_memory(out, ids):
                raise ArgumentError("out shares memory with the ids; give it memory of its own")
        return _core.gather(
            weight, ids, out, _threads.for_work(ids.size * weight.dim, self.num_threads)
        )

    def prefetch(self, ids: ArrayLike, wait: bool = False) -> None:
        """Ask for the pages of the rows that `ids` name; return when all were asked for.

        It changes no result. Nothing is asked for if a sample of the rows is all in memory.
        `pyembed.lookahead` does this for a loop, with `wait`.

        Parameters
        ----------
        ids : integers of any shape
        wait : bool
            Return when the pages are in memory and mapped, so that a lookup, and in a table that
            has changes a step, does not wait for the system either: for a thread of its own.
            With durability "power" the old content of these rows is also handed to a helper that
            records and syncs it, which such a step would have to do first.

        Raises
        ------
        IdError, DTypeError, ClosedError
        """
        weight, ids = self.weight_column, as_ids(ids)
        if _core.ask_pages(weight, ids) and wait:
            _core.map_pages(weight, ids, self._is_training())
        if wait and self._is_training():
            self._expect_change(ids)

    def _is_training(self) -> bool:
        """Whether rows that are looked up are likely to be changed."""
        return False

    def _expect_change(self, ids: IdArray) -> None:
        """Called when rows are likely to change soon; what can be done for that before, may be."""

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
        weight, alpha = self.weight_column, float(alpha)
        ids = as_ids(ids)
        values = as_values(values, (*ids.shape, weight.dim), "values")
        require_apart(values, (weight,), "values")
        batch = _core.Batch(ids, values, weight.rows, weight.dim)
        changed = self._read_change(batch, deterministic)
        threads = _threads.for_work(values.size, self.num_threads)
        if deterministic:
            with self.still():
                (column,) = self.begin_change(NO_STATE, changed)
                _core.add_groups(column, batch, alpha, threads)
            return
        with self._turns.shared():
            (column,) = self.begin_change(NO_STATE, changed)
            _core.scatter_add(column, batch, alpha, threads)

    def renorm(self, ids: ArrayLike, max_norm: float, norm_type: float = 2.0) -> Renormed:
        """Scale the rows that `ids` name, each once, down to a p-norm of at most `max_norm`.

        A row with a larger norm n is multiplied by ``max_norm / (n + 1e-7)``, torch's rule. The
        norm is summed in double, so that it does not overflow; rows with a NaN stay as they are.

        Parameters
        ----------
        ids : integers of any shape
        max_norm : float
            0 or more; inf changes nothing.
        norm_type : float
            p: 0 counts what is not zero, inf takes the largest.

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
        weight, ids = self.weight_column, as_ids(ids)
        batch = _core.Batch(ids, None, weight.rows, weight.dim)
        changed = self._read_change(batch, True)
        threads = _threads.for_work(ids.size * weight.dim, self.num_threads)
        with self.still():
            (column,) = self.begin_change(NO_STATE, changed)
            return Renormed(*_core.renorm(column, batch, max_norm, norm_type, threads))

    @contextmanager
    def writing(self, ids: ArrayLike | None = None) -> Iterator[F32]:
        """A writable view of the weight, for as long as the block lasts, to set rows by hand.

        Parameters
        ----------
        ids : integers of any shape, or None for all rows
            The rows that the block may change. What it does to others cannot be rolled back.

        Yields
        ------
        float32 array of shape (rows, dim)

        Examples
        --------
        >>> import pyembed
        >>> t = pyembed.Table.memory(rows=3, dim=2)
        >>> with t.writing([2]) as weight:
        ...     weight[2] = 5
        >>> t.gather(2)
        array([5., 5.], dtype=float32)
        """
        weight = self.weight_column
        if ids is None:
            changed = np.arange(weight.rows)
        else:
            batch = _core.Batch(as_ids(ids), None, weight.rows, weight.dim)
            changed = self._read_change(batch, False)
        with self.still():
            (column,) = self.begin_change(NO_STATE, changed)
            view = column.array.view()
            self._open_blocks += 1
            try:
                yield view
            finally:
                self._open_blocks -= 1
                view.flags.writeable = False

    def still(self) -> AbstractContextManager[None]:
        """Nobody else changes rows while the block lasts: who wants to, waits."""
        return self._turns

    def begin_change(
        self, state: Mapping[str, int], touched: NDArray[np.int64]
    ) -> tuple[_core.Column, ...]:
        """The weight and state columns, to be changed by a kernel in a block of `still`.

        `state`: names and widths, see `ensure_columns`. `touched` are the rows that will change,
        ascending and unique.

        Raises
        ------
        ReadOnlyError, TableError
        ArgumentError
            If a table on disk has no such column.
        """
        weight = self.weight_column
        self._announce_change(touched)
        if not state:
            return (weight,)
        if not state.keys() <= self._columns.keys():
            self.ensure_columns(state)
        return (weight, *[self._columns[name] for name in state])

    def columns_of(self, state: Mapping[str, int]) -> tuple[_core.Column, ...]:
        """The weight and these state columns, as the kernels take them, to be looked at."""
        return (self.weight_column, *[self._columns[name] for name in state])

    def _read_change(self, batch: _core.Batch, grouped: bool) -> NDArray[np.int64]:
        """Check the ids of rows that are about to change, before the manifest is written.

        Returns the rows, ascending and unique, if the batch is to be grouped or a journal needs
        them: the batch is sorted once for both.
        """
        if grouped or self._keeps_journal():
            grouping.group_batches([batch], self.num_threads)
            return batch.unique_rows
        _core.check(batch, _threads.for_work(batch.ids.size, self.num_threads))
        return np.zeros(0, np.int64)

    def _keeps_journal(self) -> bool:
        return False

    def ensure_columns(self, widths: Mapping[str, int]) -> None:
        """State columns of these names and widths: a table in memory adds those that are missing.

        Raises
        ------
        ArgumentError
            If a table on disk lacks one, or one has another width.
        """
        weight, columns = self.weight_column, self._columns
        for name, width in widths.items():
            if name not in columns:
                if not self._may_add_columns():
                    missing = [f"{n}:{w}" for n, w in widths.items() if n not in columns]
                    options = " ".join(f"--add {column}" for column in missing)
                    raise ArgumentError(
                        f"{self.path} has no column {name!r}, only {', '.join(columns)}; make a "
                        f"table that has it: pyembed convert {self.path} -o NEW {options}"
                    )
                columns[name] = _core.Column(zeroed_rows(weight.rows, width))
            if columns[name].dim != width:
                found = columns[name].dim
                raise ArgumentError(f"column {name!r} has width {found}; expected {width}")

    def _announce_change(self, touched: NDArray[np.int64]) -> None:
        """Called before rows change. A table on disk keeps what they were."""
        if not self.weight_column.writable:
            raise ReadOnlyError("the array under this table is read-only; give a writable one")

    def _may_add_columns(self) -> bool:
        """Whether a state column that is missing can be put beside the others."""
        return True
