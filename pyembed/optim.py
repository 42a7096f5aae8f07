"""Sparse optimizers, in order of increasing complexity. One step is one pass over the touched rows.

A step groups the batch by row, sums the gradients of equal ids in batch order, and updates each
row once ("exact" semantics). The rules are row kernels (`_kernels/rows.inc.h`, `reference.update`);
a class here is its hyper-parameters. The state lies in the row, beside the weight.

Same bits for any number of threads and any SIMD level.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from pyembed import _core, grouping, threads
from pyembed.arrays import as_ids, as_values, require_finite
from pyembed.embedding import Embedding
from pyembed.errors import ArgumentError, DTypeError
from pyembed.grouping import SparseGrad
from pyembed.table import Table


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

    def __init__(self, target: Embedding | Table, lr: float, nonfinite: str = "raise") -> None:
        if not isinstance(target, (Embedding, Table)):
            raise DTypeError(f"{type(target).__name__}; allowed: an Embedding or a Table")
        self._layer = target if isinstance(target, Embedding) else None
        self.table = target.table if isinstance(target, Embedding) else target
        if nonfinite not in ("raise", "allow"):
            raise ArgumentError(f"nonfinite = {nonfinite!r}; allowed: 'raise', 'allow'")
        self.nonfinite = nonfinite
        self.steps = 0
        self.lr = lr
        self._refuse_frozen()
        self._state: tuple[str, ...] = _core.RULES[self.rule][1]
        self.table.ensure_columns(self._state)

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _in_range("lr", value, 0.0)

    def step(self, ids: ArrayLike | SparseGrad, grad: ArrayLike | None = None) -> None:
        """Update the rows of a batch.

        Parameters
        ----------
        ids : integers of any shape, or a SparseGrad
        grad : float32 array of shape ids.shape + (dim,)
            The gradient of the rows; not given with a SparseGrad.

        Raises
        ------
        IdError, DTypeError, ArgumentError, NonFiniteError, ReadOnlyError
            Before anything is written.
        """
        self._refuse_frozen()
        table, layer = self.table, self._layer
        if isinstance(ids, SparseGrad):
            rows, starts, order, values, scale = *self._from_sparse(ids, grad), False
        else:
            ids = as_ids(ids)
            if grad is None:
                raise ArgumentError("step(ids, grad): grad is missing")
            values = as_values(grad, (*ids.shape, table.dim), "grad")
            rows, starts, order = grouping.group(ids, table.rows, table.num_threads)
            scale = layer is not None and layer.scale_grad_by_freq
        workers = threads.for_work(values.size, table.num_threads)
        if self.nonfinite == "raise":
            require_finite(values, "grad", workers)
        skip = -1 if layer is None or layer.padding_idx is None else layer.padding_idx
        with table.changing(self._state) as columns:
            self.steps += 1
            _core.update(
                columns, rows, starts, order, values, self.rule, self._hyper(), skip, scale, workers
            )

    def _from_sparse(
        self, sparse: SparseGrad, grad: ArrayLike | None
    ) -> tuple[np.ndarray, None, None, np.ndarray]:
        if grad is not None:
            raise ArgumentError("step(sparse_grad): the gradient is given twice")
        rows = as_ids(sparse.ids)
        values = as_values(sparse.values, (*rows.shape, self.table.dim), "values")
        if rows.ndim != 1 or (rows.size > 1 and (np.diff(rows) <= 0).any()):
            raise ArgumentError("a SparseGrad has unique ascending ids; use step(ids, grad)")
        _core.check_ids(rows, self.table.rows, 1)
        return rows, None, None, values

    def _refuse_frozen(self) -> None:
        if self._layer is not None and self._layer.frozen:
            raise ArgumentError("the layer is frozen; use from_pretrained(..., freeze=False)")

    def _hyper(self) -> tuple[float, float, float, float]:
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
    target : Embedding or Table
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
        self, target: Embedding | Table, lr: float = 1e-3, *, nonfinite: str = "raise"
    ) -> None:
        super().__init__(target, lr, nonfinite)


class Adagrad(Optimizer):
    """Adagrad: sum += g^2; w -= lr * g / (sqrt(sum) + eps).

    State: ``sum``, as wide as the weight. (Duchi, Hazan, Singer: "Adaptive subgradient methods",
    JMLR 2011; eps and its place as in torch.)

    Parameters
    ----------
    target : Embedding or Table
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
        target: Embedding | Table,
        lr: float = 1e-2,
        eps: float = 1e-10,
        *,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(target, lr, nonfinite)
        self.eps = _in_range("eps", eps, 0.0)

    def _hyper(self) -> tuple[float, float, float, float]:
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
    target : Embedding or Table
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
        target: Embedding | Table,
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
        self.eps = _in_range("eps", eps, math.ulp(0.0))

    def _hyper(self) -> tuple[float, float, float, float]:
        b1, b2 = self.betas
        lr = self.lr * math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        return lr, self.eps, 1 - b1, 1 - b2

    def _parameters(self) -> dict[str, Any]:
        return {"lr": self.lr, "beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps}


def _in_range(name: str, value: float, low: float) -> float:
    """A finite hyper-parameter of at least `low`."""
    if not (math.isfinite(value) and value >= low):
        raise ArgumentError(f"{name} = {value}; allowed: a finite number >= {low:g}")
    return float(value)
