"""Sparse optimizers, in order of increasing complexity. One step is one pass over the touched rows.

A step groups the batch by row, sums the gradients of equal ids in batch order, and updates each
row once ("exact" semantics). The rules are row kernels (`_kernels/rows.inc.h`, `reference.update`);
a class here is its hyper-parameters. The state lies in the row, beside the weight.

Same bits for any number of threads and any SIMD level.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyembed import _core, grouping, threads
from pyembed.arrays import F32, as_ids, as_values, require_apart, require_count, require_finite
from pyembed.bags import Bags, require_bags
from pyembed.embedding import Layer
from pyembed.embedding_bag import EmbeddingBag
from pyembed.errors import ArgumentError, DTypeError
from pyembed.grouping import SparseGrad
from pyembed.table import Table


class _Batch(NamedTuple):
    """Gradients grouped by row, as `_core.update` takes them."""

    rows: np.ndarray
    starts: np.ndarray | None
    order: np.ndarray | None
    values: F32
    bag_of: np.ndarray | None = None
    coef: F32 | None = None


class Optimizer:
    """What all rules share: the table, the step, the checks.

    Attributes
    ----------
    lr : float
        Learning rate; may be changed between steps.
    steps : int
        Steps taken. Set it when training goes on with a table from disk:
        ``table.commit(meta={"steps": o.steps})``, later ``o.steps = table.meta["steps"]``.
    """

    rule: ClassVar[str]

    def __init__(self, target: Layer | Table, lr: float, nonfinite: str = "raise") -> None:
        if not isinstance(target, (Layer, Table)):
            allowed = "an Embedding, an EmbeddingBag or a Table"
            raise DTypeError(f"{type(target).__name__}; allowed: {allowed}")
        self._layer = target if isinstance(target, Layer) else None
        self.table = target.table if isinstance(target, Layer) else target
        if nonfinite not in ("raise", "allow"):
            raise ArgumentError(f"nonfinite = {nonfinite!r}; allowed: 'raise', 'allow'")
        self.nonfinite = nonfinite
        self._steps = 0
        self.lr = lr
        self._refuse_frozen()
        self._state: tuple[str, ...] = _core.RULES[self.rule][1]
        self.table.ensure_columns(self._state)

    @property
    def steps(self) -> int:
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps = require_count(value, "steps", 0, 2**62)

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _in_range("lr", value, 0.0)

    def step(self, ids: ArrayLike | Bags | SparseGrad, grad: ArrayLike | None = None) -> None:
        """Update the rows of a batch.

        Parameters
        ----------
        ids : integers of any shape, Bags of `EmbeddingBag.bags`, or a SparseGrad
        grad : float32 array of shape ids.shape + (dim,), or (bags, dim)
            The gradient of what the layer returned; not given with a SparseGrad.

        Raises
        ------
        IdError, DTypeError, ArgumentError, NonFiniteError, ReadOnlyError
            Before anything is written.
        """
        self._refuse_frozen()
        batch = self._batch(ids, grad)
        table, layer = self.table, self._layer
        scale = layer is not None and layer.scale_grad_by_freq and batch.starts is not None
        workers = threads.for_work(
            batch.values.size if batch.order is None else batch.order.size * table.dim,
            table.num_threads,
        )
        if self.nonfinite == "raise":
            require_finite(batch.values, "grad", workers)
            if batch.coef is not None:
                require_finite(batch.coef, "per_sample_weights", workers)
        skip = -1 if layer is None or layer.padding_idx is None else layer.padding_idx
        for name in ("weight", *self._state):
            require_apart(batch.values, table.column(name), "grad")
        with table.changing(self._state, batch.rows) as columns:
            hyper = self._hyper(self.steps + 1)  # in turn, as another thread's step counts too
            _core.update(
                columns,
                batch.rows,
                batch.starts,
                batch.order,
                batch.values,
                self.rule,
                hyper,
                skip,
                scale,
                workers,
                batch.bag_of,
                batch.coef,
            )
            self.steps += 1

    def _batch(self, ids: ArrayLike | Bags | SparseGrad, grad: ArrayLike | None) -> _Batch:
        """What the caller gave, checked and grouped."""
        table = self.table
        if isinstance(ids, SparseGrad):
            if grad is not None:
                raise ArgumentError("step(sparse_grad): the gradient is given twice")
            return self._sparse_batch(ids)
        if grad is None:
            raise ArgumentError("step(ids, grad): grad is missing")
        if isinstance(self._layer, EmbeddingBag):
            bags = require_bags(ids)
            if self._layer.mode == "max":
                return self._sparse_batch(self._layer.sparse_gradient(bags, grad))
            values = self._layer.check_gradient(bags, grad)
            groups = grouping.group(bags.ids, table.rows, table.num_threads)
            return _Batch(*groups, values, bags.bag_of, self._layer.coefficients(bags))
        if isinstance(ids, Bags):
            raise DTypeError("Bags; allowed here: ids, since the target is no EmbeddingBag")
        ids = as_ids(ids)
        values = as_values(grad, (*ids.shape, table.dim), "grad")
        return _Batch(*grouping.group(ids, table.rows, table.num_threads), values)

    def _sparse_batch(self, sparse: SparseGrad) -> _Batch:
        rows = as_ids(sparse.ids).astype(np.int64, copy=False)
        values = as_values(sparse.values, (*rows.shape, self.table.dim), "values")
        if rows.ndim != 1 or (rows.size > 1 and (np.diff(rows) <= 0).any()):
            raise ArgumentError("a SparseGrad has unique ascending ids; use step(ids, grad)")
        _core.check_ids(rows, self.table.rows, 1)
        return _Batch(rows, None, None, values)

    def _refuse_frozen(self) -> None:
        if self._layer is not None and self._layer.frozen:
            raise ArgumentError("the layer is frozen; use from_pretrained(..., freeze=False)")

    def _hyper(self, step: int) -> tuple[float, float, float, float]:
        """(lr, eps, 1 - beta1, 1 - beta2) of this step, see `pe_hyper` in _kernels/kernels.h."""
        return self.lr, 0.0, 0.0, 0.0

    def _parameters(self) -> dict[str, Any]:
        return {"lr": self.lr}

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={value:g}" for name, value in self._parameters().items())
        return f"{type(self).__name__}({listed})"


class SGD(Optimizer):
    """Stochastic gradient descent: w -= lr * g.

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
    lr : float
    nonfinite : {"raise", "allow"}
        What to do with NaN and infinity in a gradient: refuse the batch, or let them through.

    Examples
    --------
    >>> t = Table.memory(rows=2, dim=2)
    >>> SGD(t, lr=0.5).step([1, 1], np.ones((2, 2), np.float32))
    >>> t.gather(1)
    array([-1., -1.], dtype=float32)
    """

    rule = "sgd"

    def __init__(
        self, target: Layer | Table, lr: float = 1e-3, *, nonfinite: str = "raise"
    ) -> None:
        super().__init__(target, lr, nonfinite)


class Adagrad(Optimizer):
    """Adagrad: sum += g^2; w -= lr * g / (sqrt(sum) + eps).

    State: ``sum``, as wide as the weight. (Duchi, Hazan, Singer: "Adaptive subgradient methods",
    JMLR 2011; eps and its place as in torch.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
    lr : float
    eps : float
    nonfinite : {"raise", "allow"}

    Examples
    --------
    >>> t = Table.memory(rows=2, dim=2)
    >>> Adagrad(t, lr=0.5).step([1], np.full((1, 2), 3, np.float32))
    >>> t.gather(1)
    array([-0.5, -0.5], dtype=float32)
    """

    rule = "adagrad"

    def __init__(
        self,
        target: Layer | Table,
        lr: float = 1e-2,
        eps: float = 1e-10,
        *,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(target, lr, nonfinite)
        self.eps = _in_range("eps", eps, 0.0)

    def _hyper(self, step: int) -> tuple[float, float, float, float]:
        return self.lr, self.eps, 0.0, 0.0

    def _parameters(self) -> dict[str, Any]:
        return {"lr": self.lr, "eps": self.eps}


class Adam(Optimizer):
    """Adam on the touched rows alone, by the formula of torch's SparseAdam.

    m += (g - m)(1 - b1); v += (g^2 - v)(1 - b2);
    w -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), where t counts all steps.

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (v), each as wide as the weight. Rows that are not in
    a batch do not decay. (Kingma, Ba: "Adam", ICLR 2015, the form before its section 2.1.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
    lr : float
    betas : pair of float
        Each in [0, 1).
    eps : float
        Above 0.
    nonfinite : {"raise", "allow"}

    Examples
    --------
    >>> t = Table.memory(rows=2, dim=2)
    >>> Adam(t, lr=0.5).step([1], np.full((1, 2), 3, np.float32))
    >>> t.gather(1).round(4)
    array([-0.5, -0.5], dtype=float32)
    """

    rule = "adam"

    def __init__(
        self,
        target: Layer | Table,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(target, lr, nonfinite)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ArgumentError(f"betas = {betas}; allowed: two numbers, each 0 <= beta < 1")
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = _in_range("eps", eps, float(np.finfo(np.float32).smallest_subnormal))

    def _hyper(self, step: int) -> tuple[float, float, float, float]:
        b1, b2 = self.betas
        lr = self.lr * math.sqrt(1 - b2**step) / (1 - b1**step)
        return lr, self.eps, 1 - b1, 1 - b2

    def _parameters(self) -> dict[str, Any]:
        return {"lr": self.lr, "beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps}


def _in_range(name: str, value: float, low: float) -> float:
    """A finite hyper-parameter of at least `low`."""
    with np.errstate(over="ignore"):
        used = float(np.float32(value))  # what the kernels compute with
    if not (math.isfinite(used) and used >= low):
        allowed = f"a number >= {low:g} that float32 holds"
        raise ArgumentError(f"{name} = {value}; allowed: {allowed}")
    return float(value)
