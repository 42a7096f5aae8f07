"""Embedding: the lookup layer of torch, over a table of any size.

Forward copies rows; backward sums the gradients of equal ids, in the order of the batch. Nothing
of the table's size is made, except by a dense backward, which says so.
"""

from __future__ import annotations

import os
import secrets

import numpy as np
from numpy.typing import ArrayLike

from pyembed import _core, grouping, init, threads
from pyembed.arrays import F32, as_ids, as_values, require_count
from pyembed.errors import ArgumentError
from pyembed.grouping import SparseGrad
from pyembed.manifest import MAX_DIM, MAX_ROWS
from pyembed.table import Table


class Embedding:
    """A lookup layer: ids in, rows out.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the weight.
    padding_idx : int, optional
        A row that takes no gradient; it starts as zeros. Negative counts from the end.
    scale_grad_by_freq : bool
        Divide a row's gradient by how often the row occurs in the batch.
    sparse : bool
        `backward` gives a `SparseGrad` instead of an array of the weight's shape.
    _weight : float32 array of shape (num_embeddings, embedding_dim), optional
        Rows to use, without a copy; they are not initialised.
    _freeze : bool
        Optimizers refuse the layer.
    table : Table, optional
        Rows to use, in memory or on disk; they are not initialised.
    seed : int, optional
        Of the normal distribution N(0, 1) that a fresh weight is drawn from; None draws a seed.
    num_threads : int, optional

    Examples
    --------
    >>> import numpy as np
    >>> e = Embedding(10, 3, padding_idx=0, seed=1)
    >>> e([[1, 2], [3, 0]]).shape
    (2, 2, 3)
    >>> grad = np.ones((3, 3), np.float32)
    >>> e.backward([0, 4, 4], grad)[[0, 4]]
    array([[0., 0., 0.],
           [2., 2., 2.]], dtype=float32)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: F32 | None = None,
        _freeze: bool = False,
        table: Table | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        rows = require_count(num_embeddings, "num_embeddings", 0, MAX_ROWS)
        dim = require_count(embedding_dim, "embedding_dim", 1, MAX_DIM)
        if table is not None and _weight is not None:
            raise ArgumentError("both table and _weight are given; give one")
        fresh = table is None and _weight is None
        if _weight is not None:
            table = Table.from_array(_weight, num_threads=num_threads)
        elif table is None:
            seed = secrets.randbits(64) if seed is None else seed
            table = Table.memory(rows, dim, init=init.normal(), seed=seed, num_threads=num_threads)
        if (table.rows, table.dim) != (rows, dim):
            have = f"({table.rows}, {table.dim})"
            raise ArgumentError(f"the weight has shape {have}; expected ({rows}, {dim})")
        self.table = table
        self.padding_idx = _wrapped(padding_idx, rows)
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.frozen = _freeze
        if fresh and self.padding_idx is not None:
            with table.writing([self.padding_idx]) as weight:
                weight[self.padding_idx] = 0

    @classmethod
    def from_pretrained(
        cls,
        embeddings: F32 | str | os.PathLike[str] | Table,
        freeze: bool = True,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        num_threads: int | None = None,
    ) -> Embedding:
        """A layer over rows that exist, without a copy.

        Parameters
        ----------
        embeddings : array, path or Table
            A float32 array; or a table's folder or .npy file, opened for reading if `freeze`.
        freeze : bool
            Optimizers refuse the layer.

        Examples
        --------
        >>> import numpy as np
        >>> e = Embedding.from_pretrained(np.eye(3, dtype=np.float32))
        >>> e([2])
        array([[0., 0., 1.]], dtype=float32)
        """
        if isinstance(embeddings, Table):
            table = embeddings
        elif isinstance(embeddings, np.ndarray):
            table = Table.from_array(embeddings, num_threads=num_threads)
        else:
            table = Table.open(embeddings, "r" if freeze else "r+", num_threads=num_threads)
        return cls(
            table.rows,
            table.dim,
            padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _freeze=freeze,
            table=table,
        )

    @property
    def num_embeddings(self) -> int:
        return self.table.rows

    @property
    def embedding_dim(self) -> int:
        return self.table.dim

    @property
    def weight(self) -> F32:
        """Read-only view of the rows; see `Table.writing` for a writable one."""
        return self.table.weight

    def __call__(self, ids: ArrayLike) -> F32:
        """Look rows up: a fresh float32 array of shape ids.shape + (embedding_dim,).

        Raises
        ------
        IdError
            If an id is negative or too large.
        """
        return self.table.gather(ids)

    def backward(self, ids: ArrayLike, grad: ArrayLike) -> F32 | SparseGrad:
        """The gradient of the weight, given that of the rows which ``self(ids)`` returned.

        Parameters
        ----------
        ids : integers of any shape
        grad : float32 array of shape ids.shape + (embedding_dim,)

        Returns
        -------
        float32 array of shape (num_embeddings, embedding_dim)
            Zero at rows that are not in the batch, and at the padding row.
        SparseGrad
            With ``sparse=True``: the rows of the batch alone, without the padding row.
        """
        if not self.sparse:
            return self._dense(as_ids(ids), grad)
        rows, values = grouping.sum_duplicates(
            ids,
            grad,
            self.table.rows,
            self.table.dim,
            self.scale_grad_by_freq,
            self.table.num_threads,
        )
        if self.padding_idx is not None:
            at = int(np.searchsorted(rows, self.padding_idx))
            if at < rows.size and rows[at] == self.padding_idx:
                rows, values = np.delete(rows, at), np.delete(values, at, axis=0)
        return SparseGrad(rows, values)

    def _dense(self, ids: np.ndarray, grad: ArrayLike) -> F32:
        table = self.table
        values = as_values(grad, (*ids.shape, table.dim), "grad")
        groups = grouping.group(ids, table.rows, table.num_threads)
        dense = np.zeros((table.rows, table.dim), np.float32)
        workers = threads.for_work(values.size, table.num_threads)
        skip = -1 if self.padding_idx is None else self.padding_idx
        _core.add_groups(
            _core.Column(dense), *groups, values, 1.0, skip, self.scale_grad_by_freq, workers
        )
        return dense

    def __repr__(self) -> str:
        parts = [str(self.num_embeddings), str(self.embedding_dim)]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        parts += [
            f"{name}=True" for name in ("scale_grad_by_freq", "sparse") if getattr(self, name)
        ]
        return f"Embedding({', '.join(parts)})"


def _wrapped(padding_idx: int | None, rows: int) -> int | None:
    """Torch's rule: -rows..rows-1, where negative counts from the end."""
    if padding_idx is None:
        return None
    if not rows:
        raise ArgumentError(f"padding_idx = {padding_idx}; allowed: None, the table has no rows")
    return require_count(padding_idx, "padding_idx", -rows, rows - 1) % rows
