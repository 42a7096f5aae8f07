"""The path of a step: from gradients that were read to rows that have changed.

A step of one table and a step of many tables take the same path. A step of a few thousand ids is
too short to share between threads, but the steps of many tables together are not: they are grouped
in one parallel region and updated in another. Every error is raised before the first row changes.
Then one call of the core changes the rows, counts the step and drops the gradients that were
accumulated for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from pyembed import _core, _threads, grouping
from pyembed._checks import require_finite
from pyembed.errors import NonFiniteError
from pyembed.table import Table


@dataclass(slots=True)
class Part:
    """The part of one optimizer in a step.

    Attributes
    ----------
    table : Table
    state : dict of str to int
        The state columns of the optimizer and their widths.
    rule : _core.Rule
    prepare : callable
        ``prepare(number, clip_scale)`` sets `rule` for step `number`, the first being 1.
    clip_norm : float or None
        The 2-norm of the gradients is at most this.
    batch : _core.Batch
        The gradients.
    pending : list or None
        Emptied by the step: what was accumulated for it.
    """

    table: Table
    state: dict[str, int]
    rule: _core.Rule
    prepare: Callable[[int, float], None]
    clip_norm: float | None
    batch: _core.Batch
    pending: list[_core.Batch] | None = None


Clipped = list[tuple[_core.Batch, float]]


def take(parts: Sequence[Part], clip_norm: float | None = None) -> None:
    """Take a step with each part: all of them, or none.

    Parameters
    ----------
    parts : sequence of Part
        Not empty; no optimizer twice. Parts over one table step in the order given.
    clip_norm : float, optional
        The 2-norm of the gradients of all parts, taken as one vector, is at most this.
    """
    batches = [part.batch for part in parts]
    ids = floats = num_threads = 0
    for part in parts:
        batch, threads = part.batch, part.table.num_threads
        size = batch.ids.size
        ids, floats = ids + size, floats + size * batch.dim
        if threads > num_threads:
            num_threads = threads
    threads = _threads.for_work(floats, num_threads)
    _core.group(batches, _threads.for_work(4 * ids, num_threads))
    tables = _tables(parts)
    with _still(tables):
        steps = _steps(parts, _clipped(parts, clip_norm, threads))
        at = _core.first_refused(steps, threads)
        if at >= 0:
            refuse(parts[at].batch, threads)
        _announce(tables, parts)
        _core.update(steps, threads)


def steps_taken(table: Table, rule: str) -> int:
    """The number of steps that the optimizers of this rule have taken on a table."""
    return table.store.steps.get(rule, {}).get("steps", 0)


def refuse(batch: _core.Batch, num_threads: int) -> NoReturn:
    """Name the first gradient that is not finite, else the row with the largest sum."""
    require_finite(batch.grad, "grad", num_threads)
    if batch.coefficients is not None:
        require_finite(batch.coefficients, "per_sample_weights", num_threads)
    largest = np.abs(grouping.summed(batch, num_threads).grad).max(axis=1)
    at = int(largest.argmax())  # the first NaN, if there is one
    raise NonFiniteError(
        f"the gradients of row {batch.unique_rows[at]} add up to {largest[at]:g}, and float32 "
        "cannot hold that or its square; allowed: smaller gradients; nothing was written; "
        "clip_value clamps finite sums, and nonfinite='allow' on the optimizer lets all through"
    )


def _clipped(parts: Sequence[Part], clip_norm: float | None, num_threads: int) -> Clipped:
    """The batch of each part and the factor of its gradients: by its own norm, or by that of all.

    A batch whose norm is needed has one gradient a row.
    """
    clipped: Clipped = []
    total = 0.0
    for part in parts:
        batch, scale = part.batch, 1.0
        if clip_norm is not None or part.clip_norm is not None:
            batch = grouping.summed(batch, num_threads)
            norm = _core.global_norm(batch, part.rule.skip_nonfinite, num_threads)
            total += norm * norm  # sum() would give other bits from Python 3.12 on
            scale = 1.0 if part.clip_norm is None else _scale_to(part.clip_norm, norm)
        clipped.append((batch, scale))
    if clip_norm is not None:
        scale = _scale_to(clip_norm, math.sqrt(total))
        return [(batch, scale) for batch, _ in clipped]
    return clipped


def _scale_to(limit: float, norm: float) -> float:
    """The factor that brings gradients of this norm to at most `limit`: torch's clip_grad_norm_."""
    scale = limit / (norm + 1e-6)
    return 1.0 if scale >= 1 else scale  # NaN stays one: nonfinite="allow" lets it through


# --- calls of the table ---------------------------------------------------------------------------


def _tables(parts: Sequence[Part]) -> list[Table]:
    """The tables of a step, in the order in which every step takes their turns.

    One order for all steps means that two steps cannot wait for each other. Tables that cannot be
    written come first: they are refused before another table is marked dirty.
    """
    if len(parts) == 1:
        return [parts[0].table]
    return sorted({part.table for part in parts}, key=lambda table: (table.writable, id(table)))


def _still(tables: list[Table]) -> AbstractContextManager[object]:
    """Take the turns of these tables, so that no other thread changes their rows."""
    if len(tables) == 1:
        return tables[0].store.still()
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(table.store.still())
        return stack.pop_all()


def _steps(parts: Sequence[Part], clipped: Clipped) -> list[_core.Step]:
    """Prepare the rules, whose step numbers are only known in the turn, and check the columns."""
    taken: Counter[tuple[Table, str]] | None = Counter() if len(parts) > 1 else None
    steps = []
    for part, (batch, scale) in zip(parts, clipped, strict=True):
        store, rule = part.table.store, part.rule
        number = steps_taken(part.table, rule.name) + 1
        if taken is not None:  # parts of one rule share the count of their table
            number += taken[part.table, rule.name]
            taken[part.table, rule.name] += 1
        part.prepare(number, scale)
        columns = store.columns_of(part.state)
        steps.append(_core.Step(rule, batch, columns, store.steps, part.pending))
    return steps


def _announce(tables: list[Table], parts: Sequence[Part]) -> None:
    """Announce the rows that are about to change; a table on disk records their old content."""
    if len(parts) == 1:
        tables[0].store.begin_change({}, parts[0].batch.unique_rows)
        return
    for table in tables:
        for part in parts:
            if part.table is table:
                table.store.begin_change({}, part.batch.unique_rows)
