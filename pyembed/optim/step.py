"""One step of many small tables: grouped in one parallel region, updated in another.

A step of a few thousand ids is too short to be shared by threads. The steps of many tables are not:
here the threads share the gradients of all of them. It is one step in two other ways: all tables
change or none, and their gradients can have one norm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from numpy.typing import ArrayLike

from pyembed import _core, _threads, grouping
from pyembed._checks import in_range
from pyembed.errors import ArgumentError
from pyembed.grouping import SparseGrad
from pyembed.layers.bags import Bags
from pyembed.optim.optimizer import Batch, Optimizer, scale_to
from pyembed.table import Table

Step = tuple[Optimizer, "ArrayLike | Bags | SparseGrad | None", "ArrayLike | None"]


def step_many(steps: Iterable[Step], clip_norm: float | None = None) -> None:
    """Take a step with each of several optimizers: all of them, or none.

    The result is that of ``optimizer.step(ids, grad)`` for each, bit for bit. Optimizers over one
    table step in the order given, after the gradients of all were read.

    Parameters
    ----------
    steps : triples (optimizer, ids, grad)
        See `Optimizer.step`; grad is None with a SparseGrad. (optimizer, None, None) is a step with
        what was accumulated, which is then gone.
    clip_norm : float, optional
        The summed gradients of all rows of all tables are scaled so that their 2-norm, taken as one
        vector, is at most this (torch's clip_grad_norm_ of all parameters). Rows that a step leaves
        alone do not count: padding, and what ``nonfinite="skip_row"`` skips.

    Raises
    ------
    ArgumentError
        If an optimizer is given twice, or beside `clip_norm` has one of its own.
    IdError, DTypeError, NonFiniteError, ClosedError, ReadOnlyError, TableError
        Like all errors here before a row of any table is written; what was accumulated is kept.

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
    optimizers = [optimizer for optimizer, _, _ in steps]
    most = require_clip_norm(clip_norm, optimizers)
    if not steps:
        return
    if len(set(optimizers)) < len(optimizers):
        raise ArgumentError("an optimizer is given twice; accumulate its gradients, or join them")
    workers = max(o.table.num_threads for o in optimizers)
    batches = _batches(steps)
    _require_usable(optimizers, batches, workers)
    clipped = _clip(optimizers, batches, most, workers)
    with ExitStack() as stack:
        calls = _calls(stack, list(zip(optimizers, clipped, strict=True)))
        _take(optimizers, calls, workers)
    for o, ids, _ in steps:
        if ids is None:
            o.discard()


def require_clip_norm(clip_norm: float | None, optimizers: Iterable[Optimizer]) -> float | None:
    """One norm for all of these optimizers, of which then none has its own.

    Raises
    ------
    ArgumentError
    """
    if clip_norm is None:
        return None
    most = in_range("clip_norm", clip_norm, 0.0)
    for o in optimizers:
        if o.clip_norm is not None:
            raise ArgumentError(
                f"clip_norm = {most} for all tables, and {o!r} has clip_norm = {o.clip_norm} of "
                "its own; allowed: one of them, as two norms of one gradient have no order"
            )
    return most


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


def _clip(
    optimizers: list[Optimizer], batches: list[Batch], most: float | None, workers: int
) -> list[tuple[Batch, float]]:
    """The batches, and what to scale each with: by a norm of its own, or all by that of all."""
    pairs = [
        (o, batch, _threads.for_work(batch.values.size, workers))
        for o, batch in zip(optimizers, batches, strict=True)
    ]
    if most is None:
        return [o.clip(batch, few) for o, batch, few in pairs]
    normed = [o.norm(batch, few) for o, batch, few in pairs]
    total = 0.0
    for _, norm in normed:  # sum() would add other bits from Python 3.12 on
        total += norm * norm
    scale = scale_to(most, math.sqrt(total))
    return [(batch, scale) for batch, _ in normed]


def _require_usable(optimizers: list[Optimizer], batches: list[Batch], workers: int) -> None:
    """All gradients at once; only where one is refused, the batches one by one, to say which."""
    pairs = list(zip(optimizers, batches, strict=True))
    arrays = [batch.values for o, batch in pairs if o.nonfinite == "raise"]
    arrays += [b.coef for o, b in pairs if o.nonfinite == "raise" and b.coef is not None]
    few = _threads.for_work(sum(array.size for array in arrays), workers)
    finite = _core.are_finite(arrays, few)
    for o, batch in pairs:
        if finite:
            o.require_apart(batch)
        else:
            o.require_usable(batch, 1)


def _calls(
    stack: ExitStack, turns: list[tuple[Optimizer, tuple[Batch, float]]]
) -> list[tuple[int, tuple[Any, ...]]]:
    """The number of each step and its arguments, with nobody else at the tables."""
    columns: dict[Optimizer, tuple[_core.Column, ...]] = {}
    # In one order, so that two callers do not wait for each other. Tables that can only be read are
    # first: they are refused before another one is called dirty.
    batches = {o: batch for o, (batch, _) in turns}
    for o in sorted(batches, key=lambda o: (o.table.writable, id(o.table))):
        stack.enter_context(o.table.still())
        columns[o] = o.table.begin_change(o.state, batches[o].rows)
    taken: Counter[tuple[Table, str]] = Counter()  # by the time of this step, of its rule
    calls = []
    for o, (batch, scale) in turns:
        taken[o.table, o.rule] += 1
        step = o.steps + taken[o.table, o.rule]
        calls.append((step, o.call(step, columns[o], batch, scale)))
    return calls


def _take(
    optimizers: list[Optimizer], calls: list[tuple[int, tuple[Any, ...]]], workers: int
) -> None:
    """The steps: alone those of cold tables, which ask for their own pages, and second ones.

    So the steps of one table keep their order.
    """
    shared, alone, seen = [], [], set()
    floats = 0
    for at, (_, call) in enumerate(calls):
        column, rows, values = call[0][0], call[1], call[4]
        table = optimizers[at].table
        if table in seen or (column.pages is not None and column.pages.cold):
            alone.append(at)
        else:
            shared.append(at)
            floats += max(values.size, rows.size * column.dim)
        seen.add(table)
    few = _threads.for_work(floats, workers)
    skipped = _core.update_many([calls[at][1] for at in shared], few)
    for at, count in zip(shared, skipped, strict=True):
        optimizers[at].took(calls[at][0], count)
    for at in alone:
        step, call = calls[at]
        optimizers[at].take(step, call, _threads.for_work(call[4].size, workers))
