"""One step of many small tables: grouped in one parallel region, updated in another.

A step of a few thousand ids is too short to be shared by threads. The steps of many tables are not:
here the threads share the gradients of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from numpy.typing import ArrayLike

from pyembed import _core, grouping, threads
from pyembed.bags import Bags
from pyembed.errors import ArgumentError
from pyembed.grouping import SparseGrad
from pyembed.optimizer import Batch, Optimizer

Step = tuple[Optimizer, "ArrayLike | Bags | SparseGrad", "ArrayLike | None"]


def step_many(steps: Iterable[Step]) -> None:
    """Take a step with each of several optimizers, of different tables.

    The result is that of ``optimizer.step(ids, grad)`` for each, bit for bit.

    Parameters
    ----------
    steps : triples (optimizer, ids, grad)
        See `Optimizer.step`; grad is None with a SparseGrad.

    Raises
    ------
    ArgumentError
        If two optimizers are over one table.
    IdError, DTypeError, NonFiniteError, ReadOnlyError
        Before any of the tables is written.

    Examples
    --------
    >>> import numpy as np
    >>> from pyembed import Table, optim
    >>> tables = [Table.memory(rows=4, dim=1) for _ in range(2)]
    >>> makers = [optim.SGD(table, lr=1.0) for table in tables]
    >>> step_many([(o, [1], np.ones((1, 1), np.float32)) for o in makers])
    >>> [table.gather(1).tolist() for table in tables]
    [[-1.0], [-1.0]]
    """
    steps = list(steps)
    if not steps:
        return
    optimizers = [optimizer for optimizer, _, _ in steps]
    if len({id(o.table) for o in optimizers}) < len(optimizers):
        raise ArgumentError("two optimizers are over one table; take their steps one by one")
    batches = _batches(steps)
    workers = max(o.table.num_threads for o in optimizers)
    _require_usable(optimizers, batches, workers)
    clipped = [
        o.clip(batch, threads.for_work(batch.values.size, workers))
        for o, batch in zip(optimizers, batches, strict=True)
    ]
    with ExitStack() as stack:
        columns: dict[int, tuple[_core.Column, ...]] = {}
        turns = list(zip(optimizers, clipped, strict=True))
        # In one order, so that two callers do not wait for each other.
        for o, (batch, _) in sorted(turns, key=lambda turn: id(turn[0].table)):
            stack.enter_context(o.table.still())
            columns[id(o)] = o.table.begin_change(o.state, batch.rows)
        calls = [o.call(columns[id(o)], batch, scale) for o, (batch, scale) in turns]
        _take(optimizers, calls, workers)


def _batches(steps: list[Step]) -> list[Batch]:
    """The batch of each step, grouped."""
    given = [optimizer.read(ids, grad) for optimizer, ids, grad in steps]
    tables = [optimizer.table for optimizer, _, _ in steps]
    loose = [(g.ids, t.rows) for g, t in zip(given, tables, strict=True) if not g.unique]
    groups = iter(grouping.group_many(loose, max(table.num_threads for table in tables)))
    return [
        Batch(g.ids, None, None, g.values)
        if g.unique
        else Batch(*next(groups), g.values, g.bag_of, g.coef)
        for g in given
    ]


def _require_usable(optimizers: list[Optimizer], batches: list[Batch], workers: int) -> None:
    """All gradients at once; only where one is refused, the batches one by one, to say which."""
    pairs = list(zip(optimizers, batches, strict=True))
    arrays = [batch.values for o, batch in pairs if o.nonfinite == "raise"]
    arrays += [b.coef for o, b in pairs if o.nonfinite == "raise" and b.coef is not None]
    few = threads.for_work(sum(array.size for array in arrays), workers)
    finite = _core.are_finite(arrays, few)
    for o, batch in pairs:
        if finite:
            o.require_apart(batch)
        else:
            o.require_usable(batch, 1)


def _take(
    optimizers: list[Optimizer], calls: list[tuple[int, tuple[Any, ...]]], workers: int
) -> None:
    """The steps, those of cold tables one by one, as each asks for its own pages."""
    warm = []
    floats = 0
    for at, (step, call) in enumerate(calls):
        column, rows, values = call[0][0], call[1], call[4]
        if column.pages is not None and column.pages.cold:
            optimizers[at].take(step, call, threads.for_work(values.size, workers))
        else:
            warm.append(at)
            floats += max(values.size, rows.size * column.dim)
    skipped = _core.update_many([calls[at][1] for at in warm], threads.for_work(floats, workers))
    for at, count in zip(warm, skipped, strict=True):
        optimizers[at].took(calls[at][0], count)
