"""The base class of all optimizers: reading a batch, accumulating, counting steps, step options.

A step groups the batch by row, sums the gradients of equal ids in batch order, and updates each
row once ("exact" semantics), in one pass over the rows of the batch. The rules are row kernels
(`_kernels/rules.inc.h`); `rules` has a class for each, and `step` has the path that all steps take.
State columns are in the row, next to the weight, and the table also keeps the count of steps.

The result has the same bits for any number of threads and any SIMD level.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads, grouping
from pyembed._checks import IdArray, in_range, require_apart, require_count
from pyembed.errors import ArgumentError, DTypeError
from pyembed.grouping import SparseGrad
from pyembed.optim.options import Options, checked
from pyembed.optim.schedules import Schedule
from pyembed.optim.step import Part, refuse, steps_taken, take
from pyembed.storage.columns import state_widths
from pyembed.table import Table

# A lazy optimizer keeps the last step of each row in a float32, which holds integers up to here.
MAX_LAZY_STEPS = 2**24
CATCH_UP_ROWS = 1 << 18  # rows per call of the core, which bounds its memory


class Bags(Protocol):
    """A batch of bags, as `EmbeddingBag.bags` returns it."""

    ids: IdArray
    starts: NDArray[np.int64]


@runtime_checkable
class Layer(Protocol):
    """The part of a layer that an optimizer uses: its table, and how its gradient is read."""

    table: Table
    frozen: bool

    def read_gradient(self, ids: Any, grad: ArrayLike | None) -> _core.Batch:
        """Read the gradient of the array that the layer returned for `ids`."""


Target = Layer | Table
Step = tuple["Optimizer", "ArrayLike | Bags | SparseGrad | None", "ArrayLike | None"]


class _BareTable:
    """A table without a layer: every row takes its gradient."""

    frozen = False

    def __init__(self, table: Table) -> None:
        self.table = table

    def read_gradient(self, ids: Any, grad: ArrayLike | None) -> _core.Batch:
        weight = self.table.store.weight_column
        return grouping.read_gradient(ids, grad, weight.rows, weight.dim)


class Optimizer:
    """The base of all optimizers: the table, the step and the checks.

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    options : Options
        The step options.
    lazy_momentum : bool
        Whether rows catch up with the momentum of the steps that they missed.

    Attributes
    ----------
    table : Table
        The rows that it updates.
    lr : float
        Learning rate of the next step; may be set between steps, to a number or to a schedule.
    steps : int
        Steps taken. The table keeps the count, one for each rule: it is committed with the rows,
        and an optimizer that is made for a table from disk continues from there.
    skipped : int
        Rows that ``nonfinite="skip_row"`` has left alone so far.
    pending : bool
        Whether gradients were accumulated that no step has applied.
    nonfinite, weight_decay, decay_mode, clip_norm, frequency_power
        See `Options`.
    """

    rule: str = ""
    decay_modes: ClassVar[tuple[str, ...]] = ("l2", "decoupled", "lazy")  # the first if not given
    default_decay: ClassVar[float] = 0.0

    def __init__(
        self,
        target: Target,
        lr: float | Schedule,
        options: Options,
        lazy_momentum: bool = False,
    ) -> None:
        if not isinstance(target, (Table, Layer)):
            allowed = "an Embedding, an EmbeddingBag or a Table"
            raise DTypeError(f"{type(target).__name__}; allowed: {allowed}")
        self._target = _BareTable(target) if isinstance(target, Table) else target
        self._pending: list[_core.Batch] = []
        self.lr = lr
        asked = checked(self.decay_modes, self.default_decay, **options)
        self.nonfinite, self.clip_norm = asked.nonfinite, asked.clip_norm
        self._weight_decay, self.decay_mode = asked.weight_decay, asked.decay_mode
        self._rule = _core.Rule(
            self.rule,
            skip_nonfinite=asked.nonfinite == "skip_row",
            refuse_nonfinite=asked.nonfinite == "raise",
            lazy=asked.decay_mode == "lazy" or lazy_momentum,
            frequency_power=asked.frequency_power,
            clip_value=asked.clip_value,
            l2=asked.weight_decay if asked.decay_mode == "l2" else 0.0,
            max_norm=asked.max_norm,
            norm_type=asked.norm_type,
        )
        self._refuse_frozen()
        self.state = state_widths(self.rule, self.table.dim)
        self.state |= {"row_steps": 1} if self.frequency_power else {}
        self.state |= {"last_step": 1} if self._rule.lazy else {}
        self.table.store.ensure_columns(self.state)

    @property
    def table(self) -> Table:
        """The rows that it updates."""
        return self._target.table

    @property
    def weight_decay(self) -> float:
        """The weight decay, see `Options`."""
        return self._weight_decay

    @property
    def frequency_power(self) -> float:
        """The frequency power, see `Options`."""
        return self._rule.frequency_power

    @property
    def skipped(self) -> int:
        """The number of rows that ``nonfinite="skip_row"`` has left alone so far."""
        return self._rule.skipped

    @property
    def pending(self) -> bool:
        """Whether gradients were accumulated that no step has applied."""
        return bool(self._pending)

    @property
    def steps(self) -> int:
        """The number of steps taken, which the table keeps; may be set."""
        return steps_taken(self.table, self.rule)

    @steps.setter
    def steps(self, value: int) -> None:
        limit = MAX_LAZY_STEPS if self._rule.lazy else 2**62
        self.table.store.steps[self.rule] = {"steps": require_count(value, "steps", 0, limit)}

    @property
    def lr(self) -> float:
        """The learning rate of the next step; may be set to a number or a schedule."""
        return self._lr_of(self.steps + 1)

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        self._schedule = value if callable(value) else None
        self._lr = 0.0 if callable(value) else in_range("lr", value, self._least_lr)

    @property
    def schedule(self) -> Schedule | None:
        """The schedule of the learning rate; None if it is a number."""
        return self._schedule

    _least_lr: ClassVar[float] = 0.0

    def _lr_of(self, step: int) -> float:
        """The learning rate of step number `step`, the first being 1."""
        if self._schedule is None:
            return self._lr
        return in_range(f"lr({step - 1})", self._schedule(step - 1), self._least_lr)

    # --- steps --------------------------------------------------------------------------------

    def step(
        self, ids: ArrayLike | Bags | SparseGrad | None = None, grad: ArrayLike | None = None
    ) -> None:
        """Update the rows of a batch, or the rows of the accumulated gradients.

        Parameters
        ----------
        ids : integers of any shape, Bags of `EmbeddingBag.bags`, or a SparseGrad
            Not given after `accumulate`.
        grad : float32 array of shape ids.shape + (dim,), or (bags, dim)
            The gradient of the array that the layer returned; not given with a SparseGrad.

        Raises
        ------
        IdError, DTypeError, ArgumentError, NonFiniteError, ReadOnlyError
            Before anything is written.

        Examples
        --------
        >>> from pyembed import Table, optim
        >>> t = Table.memory(rows=3, dim=1)
        >>> optim.SGD(t, lr=0.5).step([1, 2], np.ones((2, 1), np.float32))
        >>> t.gather([0, 1, 2]).tolist()
        [[0.0], [-0.5], [-0.5]]
        """
        take((self._part(ids, grad),))

    def accumulate(self, ids: ArrayLike | Bags | SparseGrad, grad: ArrayLike | None = None) -> None:
        """Keep the gradient of a micro-batch; `step` without arguments applies the sum of all.

        Only the summed gradients of the rows are kept. `scale_grad_by_freq` counts within each
        micro-batch, as the backward of a layer does.

        Parameters
        ----------
        ids : array of integers, Bags or SparseGrad
            The ids of the micro-batch, see `step`.
        grad : array of float32, optional
            The gradient of the array that the layer returned, see `step`.

        Raises
        ------
        IdError, DTypeError, ArgumentError, NonFiniteError
            The gradients that were accumulated before are kept.

        Examples
        --------
        >>> from pyembed import Table, optim
        >>> t = Table.memory(rows=3, dim=1)
        >>> o = optim.SGD(t, lr=1.0)
        >>> o.accumulate([0, 1], np.ones((2, 1), np.float32))
        >>> o.accumulate([1], np.ones((1, 1), np.float32))
        >>> o.step()
        >>> t.gather([0, 1, 2]).tolist()
        [[-1.0], [-2.0], [0.0]]
        """
        self._refuse_frozen()
        batch, table = self._target.read_gradient(ids, grad), self.table
        grouping.group_batches([batch], table.num_threads)
        threads = _threads.for_work(batch.ids.size * batch.dim, table.num_threads)
        require_apart(batch.grad, table.store.columns_of(self.state), "grad")
        sums = _core.sum_groups(batch, threads)
        if self._rule.refuse_nonfinite and not _core.all_finite(sums, threads):
            refuse(batch, threads)
        sparse = SparseGrad(batch.unique_rows.copy(), sums.copy() if batch.unique else sums)
        kept = [
            *self._pending,
            grouping.unique_batch(sparse, batch.num_rows, batch.dim, batch.skip_row),
        ]
        if sum(part.ids.size for part in kept) > 2 * kept[0].ids.size:
            kept = self._merged(kept)
        self._pending = kept

    def discard(self) -> None:
        """Drop the accumulated gradients. A copy of an optimizer starts without them."""
        self._pending.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": []}

    def _merged(self, kept: list[_core.Batch]) -> list[_core.Batch]:
        """Sum accumulated gradients row by row, in their order: a list of one."""
        if len(kept) == 1:
            return kept
        rows, dim, num_threads = self.table.rows, self.table.dim, self.table.num_threads
        ids, grad = (
            np.concatenate(parts) for parts in zip(*((b.ids, b.grad) for b in kept), strict=True)
        )
        joined = _core.Batch(ids, grad, rows, dim, kept[0].skip_row)
        grouping.group_batches([joined], num_threads)
        sums = grouping.summed(joined, num_threads)
        if self._rule.refuse_nonfinite and not _core.all_finite(sums.grad, num_threads):
            refuse(joined, num_threads)
        return [sums]

    def _part(self, ids: ArrayLike | Bags | SparseGrad | None, grad: ArrayLike | None) -> Part:
        """The part of this optimizer in a step with these arguments, or with pending gradients."""
        self._refuse_frozen()
        if ids is None:
            if grad is not None or not self._pending:
                raise ArgumentError("step(ids, grad): ids are missing, and nothing was accumulated")
            self._pending = self._merged(self._pending)
            return self._part_of(self._pending[0], self._pending)
        if self._pending:
            raise ArgumentError(
                "gradients were accumulated; apply them with step(), or drop them: discard()"
            )
        return self._part_of(self._target.read_gradient(ids, grad))

    def _part_of(self, batch: _core.Batch, pending: list[_core.Batch] | None = None) -> Part:
        table, rule = self._target.table, self._rule
        return Part(table, self.state, rule, self._prepare, self.clip_norm, batch, pending)

    def _prepare(self, number: int, clip_scale: float) -> None:
        """Set the rule for step `number`, the first being 1."""
        rule = self._rule
        if rule.lazy and number > MAX_LAZY_STEPS:
            raise ArgumentError(
                f"step {number}: a lazy optimizer keeps the last step of each row in a float32, "
                f"exact up to {MAX_LAZY_STEPS}; call catch_up(), and continue with one that is not"
            )
        lr = self._lr_of(number)
        rule.step, rule.clip_scale = number, clip_scale
        if self.decay_mode in ("decoupled", "lazy"):
            rule.keep = 1 - lr * self._weight_decay
        self._set_hyper(rule, number, lr)

    def catch_up(self, ids: ArrayLike | None = None) -> None:
        """Apply to rows the decay and momentum of the steps that did not update them, up to now.

        For an optimizer with ``decay_mode="lazy"`` or ``lazy_momentum=True``; others have nothing
        to catch up with. A row catches up by itself in the next step that updates it; call this
        before rows are read that must be up to date, and before a table is used without its
        optimizer.

        Parameters
        ----------
        ids : integers of any shape, optional
            All rows if not given.

        Raises
        ------
        IdError, DTypeError, ReadOnlyError

        Examples
        --------
        >>> from pyembed import Table, optim
        >>> t = Table.memory(rows=2, dim=1)
        >>> o = optim.SGD(t, lr=1.0, momentum=0.5, lazy_momentum=True)
        >>> for row in (0, 1):
        ...     o.step([row], np.ones((1, 1), np.float32))
        >>> o.catch_up()
        >>> t.gather([0, 1]).tolist()
        [[-1.5], [-1.0]]
        """
        table = self.table
        rows = None
        if ids is not None:
            rows = grouping.group(ids, table.rows, table.num_threads).rows
        if not self._rule.lazy:
            return
        count = table.rows if rows is None else rows.size
        for first in range(0, count, CATCH_UP_ROWS):
            last = min(first + CATCH_UP_ROWS, count)
            self._catch_up(np.arange(first, last) if rows is None else rows[first:last])

    def _catch_up(self, rows: NDArray[np.int64]) -> None:
        table = self.table
        batch = _core.Batch(rows, None, table.rows, table.dim, unique=True)
        grouping.group_batches([batch], 1)
        with table.store.still():
            columns = table.store.begin_change(self.state, rows)
            self._prepare(self.steps + 1, 1.0)
            threads = _threads.for_work(rows.size * table.dim, table.num_threads)
            _core.catch_up(_core.Step(self._rule, batch, columns), threads)

    def _refuse_frozen(self) -> None:
        if self._target.frozen:
            raise ArgumentError("the layer is frozen; use from_pretrained(..., freeze=False)")

    # --- overridden by the rules --------------------------------------------------------------

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        """Set the fields of `pe_hyper` (_kernels/kernels.h) that the rule reads in this step."""
        rule.set_hyper(lr)

    def _parameters(self) -> dict[str, Any]:
        """The hyper-parameters that `repr` shows in addition to lr and weight decay."""
        return {}

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"lr": self._schedule or self._lr, **self._parameters()}
        if self.weight_decay:
            shown |= {"weight_decay": self.weight_decay, "decay_mode": self.decay_mode}
        if self.frequency_power:
            shown |= {"frequency_power": self.frequency_power}
        listed = ", ".join(
            f"{name}={value:g}" if type(value) is float else f"{name}={value!r}"
            for name, value in shown.items()
        )
        return f"{type(self).__name__}({listed})"


def step_many(steps: Iterable[Step], clip_norm: float | None = None) -> None:
    """Take a step with each of several optimizers: all of them, or none.

    The result is that of ``optimizer.step(ids, grad)`` for each, bit for bit. Optimizers over one
    table step in the order given, after the gradients of all were read.

    Parameters
    ----------
    steps : iterable of triples (optimizer, ids, grad)
        See `Optimizer.step`; grad is None with a SparseGrad. (optimizer, None, None) is a step with
        the accumulated gradients, which are dropped afterwards.
    clip_norm : float, optional
        The summed gradients of all rows of all tables are scaled so that their 2-norm, taken as one
        vector, is at most this (torch's clip_grad_norm_ of all parameters). Rows that a step does
        not update do not count: padding rows, and rows that ``nonfinite="skip_row"`` skips.

    Raises
    ------
    ArgumentError
        If an optimizer is given twice, or has a norm of its own in addition to `clip_norm`.
    IdError, DTypeError, NonFiniteError, ClosedError, ReadOnlyError, TableError
        All errors are raised before a row of any table is written, and the accumulated gradients
        are kept.

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
    limit = require_clip_norm(clip_norm, optimizers)
    if len(set(optimizers)) < len(optimizers):
        raise ArgumentError("an optimizer is given twice; accumulate its gradients, or join them")
    if steps:
        take([optimizer._part(ids, grad) for optimizer, ids, grad in steps], limit)


def require_clip_norm(clip_norm: float | None, optimizers: Iterable[Optimizer]) -> float | None:
    """Check a norm that all of these optimizers share; none of them may have a norm of its own.

    Raises
    ------
    ArgumentError
    """
    if clip_norm is None:
        return None
    limit = in_range("clip_norm", clip_norm, 0.0)
    for o in optimizers:
        if o.clip_norm is not None:
            raise ArgumentError(
                f"clip_norm = {limit} for all tables, and {o!r} has clip_norm = {o.clip_norm} of "
                "its own; allowed: one of them, as two norms of one gradient have no order"
            )
    return limit
