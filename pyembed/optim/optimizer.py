"""What all optimizers share: the batch, the step, and what a step does beside its rule.

A step groups the batch by row, sums the gradients of equal ids in batch order, and updates each
row once ("exact" semantics), in one pass over the touched rows. The rules are row kernels
(`_kernels/rules.inc.h`, `reference_rules`); `optim` has a class for each. The state lies in the
row, beside the weight; the number of steps lies with the table too.

Same bits for any number of threads and any SIMD level.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyembed import _core, _threads, grouping
from pyembed._checks import (
    F32,
    IdArray,
    as_ids,
    as_values,
    in_range,
    require_apart,
    require_count,
    require_finite,
)
from pyembed.errors import ArgumentError, DTypeError
from pyembed.grouping import SparseGrad
from pyembed.layers.bags import Bags, require_bags
from pyembed.layers.embedding import Layer
from pyembed.layers.embedding_bag import EmbeddingBag
from pyembed.optim.options import Options, checked
from pyembed.optim.schedules import Schedule
from pyembed.storage.columns import state_widths
from pyembed.table import Table

# A lazy optimizer keeps the last step of each row in a float32, which holds integers up to here.
MAX_LAZY_STEPS = 2**24
CATCH_UP_ROWS = 1 << 18  # that catch up together: what is known of them stays small


class Batch(NamedTuple):
    """Gradients grouped by row, as `_core.update` takes them."""

    rows: np.ndarray
    starts: np.ndarray | None
    order: np.ndarray | None
    values: F32
    bag_of: np.ndarray | None = None
    coef: F32 | None = None


class Given(NamedTuple):
    """A caller's batch, checked: gradients of ids, or of rows that are unique and ascending."""

    ids: IdArray
    values: F32
    unique: bool = False
    bag_of: np.ndarray | None = None
    coef: F32 | None = None


def scale_to(most: float, norm: float) -> float:
    """What brings gradients of this norm to at most `most`, as torch's clip_grad_norm_ does."""
    share = most / (norm + 1e-6)
    return 1.0 if share >= 1 else share  # NaN, if nonfinite="allow" lets one through


class Optimizer:
    """What all rules share: the table, the step, the checks.

    Attributes
    ----------
    lr : float
        Learning rate of the next step; may be set between steps, to a number or to a schedule.
    steps : int
        Steps taken. The table keeps the count, one for each rule: it is committed with the rows,
        and an optimizer that is made for a table from disk goes on from there.
    skipped : int
        Rows that ``nonfinite="skip_row"`` has left alone so far.
    """

    rule: str = ""
    decay_modes: ClassVar[tuple[str, ...]] = ("l2", "decoupled", "lazy")  # the first if not given
    default_decay: ClassVar[float] = 0.0

    def __init__(
        self,
        target: Layer | Table,
        lr: float | Schedule,
        options: Options,
        lazy_momentum: bool = False,
    ) -> None:
        if not isinstance(target, (Layer, Table)):
            allowed = "an Embedding, an EmbeddingBag or a Table"
            raise DTypeError(f"{type(target).__name__}; allowed: {allowed}")
        self._layer = target if isinstance(target, Layer) else None
        self.table = target.table if isinstance(target, Layer) else target
        self.skipped = 0
        self._pending: list[SparseGrad] = []
        self._merged_rows = 0  # of the first one pending, a sum of earlier ones
        self.lr = lr
        asked = checked(self.decay_modes, self.default_decay, **options)
        self.nonfinite, self._weight_decay, self.decay_mode, self.clip_norm, self._extras = asked
        self._lazy = self.decay_mode == "lazy" or lazy_momentum
        self._refuse_frozen()
        self.state = state_widths(self.rule, self.table.dim)
        if self.frequency_power:
            self.state["row_steps"] = 1
        if self._lazy:
            self.state["last_step"] = 1
            self._extras = self._extras or dict(_core.EXTRAS)
        self.table.ensure_columns(self.state)

    @property
    def weight_decay(self) -> float:
        """As the optimizer was made with."""
        return self._weight_decay

    @property
    def frequency_power(self) -> float:
        """As the optimizer was made with."""
        return self._extras["frequency_power"] if self._extras else 0.0

    @property
    def steps(self) -> int:
        return self.table.optimizer.get(self.rule, {}).get("steps", 0)

    @steps.setter
    def steps(self, value: int) -> None:
        most = MAX_LAZY_STEPS if self._lazy else 2**62
        self.table.optimizer[self.rule] = {"steps": require_count(value, "steps", 0, most)}

    @property
    def lr(self) -> float:
        return self._lr_of(self.steps + 1)

    @lr.setter
    def lr(self, value: float | Schedule) -> None:
        self._schedule = value if callable(value) else None
        self._lr = 0.0 if callable(value) else in_range("lr", value, self._least_lr)

    _least_lr: ClassVar[float] = 0.0

    def _lr_of(self, step: int) -> float:
        """The learning rate of step number `step`, the first being 1."""
        if self._schedule is None:
            return self._lr
        return in_range(f"lr({step - 1})", self._schedule(step - 1), self._least_lr)

    # --- a step -------------------------------------------------------------------------------

    def step(
        self, ids: ArrayLike | Bags | SparseGrad | None = None, grad: ArrayLike | None = None
    ) -> None:
        """Update the rows of a batch, or of what was accumulated.

        Parameters
        ----------
        ids : integers of any shape, Bags of `EmbeddingBag.bags`, or a SparseGrad
            Not given after `accumulate`.
        grad : float32 array of shape ids.shape + (dim,), or (bags, dim)
            The gradient of what the layer returned; not given with a SparseGrad.

        Raises
        ------
        IdError, DTypeError, ArgumentError, NonFiniteError, ReadOnlyError
            Before anything is written.
        """
        self._update(self._batch(self.read(ids, grad)))
        if ids is None:
            self.discard()

    def accumulate(self, ids: ArrayLike | Bags | SparseGrad, grad: ArrayLike | None = None) -> None:
        """Keep the gradient of a micro-batch; `step` without arguments applies the sum of all.

        What is kept are the summed gradients of the touched rows. `scale_grad_by_freq` counts
        within each micro-batch, as a layer's own backward does.

        Parameters and errors are those of `step`.

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
        batch = self._batch(self._given(ids, grad))
        workers = self._workers(batch)
        self.require_usable(batch, workers)
        values = self._sums(batch, workers)
        kept = values.copy() if values is batch.values else values
        self._pending.append(SparseGrad(batch.rows.copy(), kept))
        if sum(sparse.ids.size for sparse in self._pending) > 2 * self._merged_rows:
            self._merge()

    def discard(self) -> None:
        """Drop what was accumulated; a copy of the optimizer begins without."""
        self._pending, self._merged_rows = [], 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": [], "_merged_rows": 0}

    def _merge(self) -> None:
        """One sum for each row of all that is pending, in the order in which it came."""
        if len(self._pending) > 1:
            rows = np.concatenate([sparse.ids for sparse in self._pending])
            values = np.concatenate([sparse.values for sparse in self._pending])
            table = self.table
            merged = grouping.sum_duplicates(
                rows, values, table.rows, table.dim, num_threads=table.num_threads
            )
            self._pending = [merged]
        self._merged_rows = self._pending[0].ids.size

    def _update(self, batch: Batch) -> None:
        workers = self._workers(batch)
        self.require_usable(batch, workers)
        batch, scale = self.clip(batch, workers)
        with self.table.still():
            columns = self.table.begin_change(self.state, batch.rows)
            step = self.steps + 1  # in turn, as another thread's step counts too
            self.take(step, self.call(step, columns, batch, scale), workers)

    # --- a step in parts, for step_many too ---------------------------------------------------

    def read(self, ids: ArrayLike | Bags | SparseGrad | None, grad: ArrayLike | None) -> Given:
        """What `step` is called with, or without: checked but for ranges of ids and numbers."""
        self._refuse_frozen()
        if ids is None:
            if grad is not None or not self._pending:
                raise ArgumentError("step(ids, grad): ids are missing, and nothing was accumulated")
            self._merge()
            return Given(*self._pending[0], True)
        if self._pending:
            raise ArgumentError(
                "gradients were accumulated; apply them with step(), or drop them: discard()"
            )
        return self._given(ids, grad)

    def _given(self, ids: ArrayLike | Bags | SparseGrad, grad: ArrayLike | None) -> Given:
        dim = self.table.dim
        if isinstance(ids, SparseGrad):
            if grad is not None:
                raise ArgumentError("step(sparse_grad): the gradient is given twice")
            return self._read_sparse(ids)
        if grad is None:
            raise ArgumentError("step(ids, grad): grad is missing")
        if isinstance(self._layer, EmbeddingBag):
            bags = require_bags(ids)
            if self._layer.mode == "max":
                return self._read_sparse(self._layer.sparse_gradient(bags, grad))
            values = self._layer.check_gradient(bags, grad)
            return Given(bags.ids, values, False, bags.bag_of, self._layer.coefficients(bags))
        if isinstance(ids, Bags):
            raise DTypeError("Bags; allowed here: ids, since the target is no EmbeddingBag")
        ids = as_ids(ids)
        return Given(ids, as_values(grad, (*ids.shape, dim), "grad"))

    def _read_sparse(self, sparse: SparseGrad) -> Given:
        rows = as_ids(sparse.ids).astype(np.int64, copy=False)
        values = as_values(sparse.values, (*rows.shape, self.table.dim), "values")
        if rows.ndim != 1 or (rows.size > 1 and (np.diff(rows) <= 0).any()):
            raise ArgumentError("a SparseGrad has unique ascending ids; use step(ids, grad)")
        _core.check_ids(rows, self.table.rows, 1)
        return Given(rows, values, True)

    def require_usable(self, batch: Batch, workers: int) -> None:
        """Refuse gradients that are not finite or that the step would change while reading them."""
        if self.nonfinite == "raise":
            require_finite(batch.values, "grad", workers)
            if batch.coef is not None:
                require_finite(batch.coef, "per_sample_weights", workers)
        self.require_apart(batch)

    def require_apart(self, batch: Batch) -> None:
        """Refuse gradients that the step would change while reading them."""
        require_apart(batch.values, self.table.columns_of(self.state), "grad")

    def clip(self, batch: Batch, workers: int) -> tuple[Batch, float]:
        """With clip_norm the batch, summed, and what to scale it with."""
        if self.clip_norm is None:
            return batch, 1.0
        batch, norm = self.norm(batch, workers)
        return batch, scale_to(self.clip_norm, norm)

    def norm(self, batch: Batch, workers: int) -> tuple[Batch, float]:
        """The batch, summed, and its 2-norm: of the rows that the step will not leave alone."""
        batch = Batch(batch.rows, None, None, self._sums(batch, workers))
        skip = self.nonfinite == "skip_row"
        return batch, _core.global_norm(batch.rows, batch.values, self._skip_row, skip, workers)

    def call(
        self, step: int, columns: tuple[_core.Column, ...], batch: Batch, clip_scale: float
    ) -> tuple[Any, ...]:
        """What `_core.update` takes for step number `step`."""
        rows, starts, order, values, bag_of, coef = batch
        if self._lazy and step > MAX_LAZY_STEPS:
            raise ArgumentError(
                f"step {step}: a lazy optimizer keeps the last step of each row in a float32, "
                f"exact up to {MAX_LAZY_STEPS}; call catch_up(), and go on with one that is not"
            )
        hyper, extras = self._step_values(step, clip_scale)
        scale = self._scales and starts is not None
        most = (columns, rows, starts, order, values, self.rule, hyper, self._skip_row, scale)
        return (*most, bag_of, coef, extras)

    def take(self, step: int, call: tuple[Any, ...], workers: int) -> None:
        """The step, as `call` gave it."""
        self.took(step, _core.update(call, workers))

    def took(self, step: int, skipped: int) -> None:
        """This step was taken; so many rows were left alone."""
        self.table.optimizer[self.rule] = {"steps": step}
        self.skipped += skipped

    def catch_up(self, ids: ArrayLike | None = None) -> None:
        """Give rows the decay and momentum of the steps that did not touch them, up to now.

        For an optimizer with ``decay_mode="lazy"`` or ``lazy_momentum=True``; others have nothing
        to catch up with. A row catches up by itself when it is touched next; call this before rows
        are read that must be up to date, and before a table is used without its optimizer.

        Parameters
        ----------
        ids : integers of any shape, optional
            All rows if not given.

        Raises
        ------
        IdError, DTypeError, ReadOnlyError
        """
        table = self.table
        touched = None if ids is None else grouping.group(ids, table.rows, table.num_threads).rows
        if not self._lazy:
            return
        count = table.rows if touched is None else touched.size
        for first in range(0, count, CATCH_UP_ROWS):
            last = min(first + CATCH_UP_ROWS, count)
            rows = np.arange(first, last) if touched is None else touched[first:last]
            workers = _threads.for_work(rows.size * table.dim, table.num_threads)
            with table.still():
                columns = table.begin_change(self.state, rows)
                hyper, extras = self._step_values(self.steps + 1, 1.0)
                assert extras is not None
                _core.catch_up(columns, rows, self.rule, hyper, extras, workers)

    # --- its parts ----------------------------------------------------------------------------

    @property
    def _skip_row(self) -> int:
        padding = None if self._layer is None else self._layer.padding_idx
        return -1 if padding is None else padding

    @property
    def _scales(self) -> bool:
        return self._layer is not None and self._layer.scale_grad_by_freq

    def _workers(self, batch: Batch) -> int:
        floats = batch.values.size if batch.order is None else batch.order.size * self.table.dim
        return _threads.for_work(floats, self.table.num_threads)

    def _step_values(
        self, step: int, clip_scale: float
    ) -> tuple[dict[str, float], dict[str, float] | None]:
        """The hyper-parameters of a step, and its extras, as `_core.update` takes them."""
        lr = self._lr_of(step)
        hyper = _core.HYPER | self._hyper(step, lr)
        if self._extras is None and clip_scale == 1:
            return hyper, None
        extras = (self._extras or _core.EXTRAS) | {"clip_scale": clip_scale}
        if self.decay_mode in ("decoupled", "lazy"):
            extras["keep"] = 1 - lr * self.weight_decay
        if self._lazy:
            extras |= {"step": float(step)} | self._missed(lr)
        return hyper, extras

    def _sums(self, batch: Batch, workers: int) -> F32:
        """One gradient for each row of the batch."""
        if batch.starts is None:
            return batch.values
        sums = np.empty((batch.rows.size, self.table.dim), np.float32)
        rows, starts, order, values, bag_of, coef = batch
        _core.sum_groups(rows, starts, order, values, sums, self._scales, workers, bag_of, coef)
        return sums

    def _batch(self, given: Given) -> Batch:
        if given.unique:
            return Batch(given.ids, None, None, given.values)
        groups = grouping.group_checked(given.ids, self.table.rows, self.table.num_threads)
        return Batch(*groups, given.values, given.bag_of, given.coef)

    def _refuse_frozen(self) -> None:
        if self._layer is not None and self._layer.frozen:
            raise ArgumentError("the layer is frozen; use from_pretrained(..., freeze=False)")

    # --- what a rule says ---------------------------------------------------------------------

    def _hyper(self, step: int, lr: float) -> dict[str, float]:
        """What the rule reads of `pe_hyper` (_kernels/kernels.h) in this step, from 1."""
        return {"lr": lr}

    def _missed(self, lr: float) -> dict[str, float]:
        """Momentum that rows caught up with, see `Extras` in _core_parts/rules.pxi."""
        return {}

    def _parameters(self) -> dict[str, Any]:
        """What the text shows beside lr and weight decay."""
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
