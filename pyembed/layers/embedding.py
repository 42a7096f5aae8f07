"""Embedding: the lookup layer of torch, over a table of any size; and what it shares with bags.

Forward copies rows; backward sums the gradients of equal ids, in the order of the batch. Nothing
of the table's size is made, except by a dense backward, which says so.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyembed import _core, grouping, init
from pyembed._checks import F32, as_ids, as_values, require_count
from pyembed.errors import ArgumentError
from pyembed.grouping import SparseGrad
from pyembed.storage.manifest import MAX_DIM, MAX_ROWS
from pyembed.table import Table


class Layer:
    """What `Embedding` and `EmbeddingBag` share: a table, and torch's settings.

    Attributes
    ----------
    table : Table
    padding_idx : int or None
        From the front, whatever was given.
    max_norm, norm_type, scale_grad_by_freq, sparse
        As given; may be changed.
    frozen : bool
        Optimizers refuse the layer.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        sparse: bool,
        _weight: F32 | None,
        _freeze: bool,
        device: object,
        dtype: object,
        table: Table | None,
        seed: int | None,
        num_threads: int | None,
    ) -> None:
        _require_cpu_float32(device, dtype)
        rows = require_count(num_embeddings, "num_embeddings", 0, MAX_ROWS)
        dim = require_count(embedding_dim, "embedding_dim", 1, MAX_DIM)
        self.padding_idx = _wrapped(padding_idx, rows)
        self.max_norm = None if max_norm is None else _norm("max_norm", max_norm)
        self.norm_type = _norm("norm_type", norm_type)
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.frozen = _freeze
        if table is not None and _weight is not None:
            raise ArgumentError("both table and _weight are given; give one")
        if seed is not None and (table is not None or _weight is not None):
            raise ArgumentError(
                "seed is for a fresh weight; the rows that are given stay as they are"
            )
        if _weight is not None:
            self.table = Table.from_array(_weight, num_threads=num_threads)
        else:
            self.table = table or Table.memory(rows, dim, num_threads=num_threads)
        if (self.table.rows, self.table.dim) != (rows, dim):
            have = f"({self.table.rows}, {self.table.dim})"
            raise ArgumentError(f"the weight has shape {have}; expected ({rows}, {dim})")
        if table is None and _weight is None:
            self.reset_parameters(seed)

    @staticmethod
    def _pretrained_table(
        embeddings: F32 | str | os.PathLike[str] | Table, freeze: bool, num_threads: int | None
    ) -> Table:
        if isinstance(embeddings, Table):
            return embeddings
        if isinstance(embeddings, np.ndarray):
            return Table.from_array(embeddings, num_threads=num_threads)
        return Table.open(embeddings, "r" if freeze else "r+", num_threads=num_threads)

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

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the weight anew from N(0, 1), and set the padding row to zero.

        Parameters
        ----------
        seed : int, optional
            None draws a seed.
        """
        seed = secrets.randbits(64) if seed is None else seed
        with self.table.writing() as weight:
            init.normal().fill(weight, seed, 0, self.table.num_threads)
            if self.padding_idx is not None:
                weight[self.padding_idx] = 0

    def state_dict(self) -> dict[str, F32]:
        """``{"weight": view}``: torch's shape of a layer's state, without a copy."""
        return {"weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state["weight"]`` into the rows, the padding row included.

        Raises
        ------
        ArgumentError
            If another key is there, or the shape is another; nothing is copied then.
        """
        if set(state) != {"weight"}:
            raise ArgumentError(f"the keys are {sorted(state)}; allowed: 'weight' alone")
        values = np.asarray(state["weight"])
        if values.shape != (self.table.rows, self.table.dim):
            expected = (self.table.rows, self.table.dim)
            raise ArgumentError(f"weight has shape {values.shape}; expected {expected}")
        checked = as_values(values, values.shape, "weight")
        with self.table.writing() as weight:
            weight[...] = checked

    @property
    def _skip(self) -> int:
        """The padding row as the kernels take it."""
        return -1 if self.padding_idx is None else self.padding_idx

    def read_gradient(self, ids: Any, grad: ArrayLike | None) -> _core.Batch:
        """Read the gradient of what the layer returned, for an optimizer.

        Parameters
        ----------
        ids : integers of any shape, or a SparseGrad
        grad : float32 array of shape ids.shape + (embedding_dim,)
            None with a SparseGrad.

        Returns
        -------
        _core.Batch
            Not yet grouped, so ids may still be outside the table.

        Raises
        ------
        DTypeError, ArgumentError
        """
        weight = self.table.weight_column
        return grouping.read_gradient(
            ids, grad, weight.rows, weight.dim, self._skip, self.scale_grad_by_freq
        )

    def _renorm(self, ids: ArrayLike) -> None:
        if self.max_norm is not None:
            self.table.renorm(ids, self.max_norm, self.norm_type)

    def _without_padding(self, rows: np.ndarray, values: F32) -> SparseGrad:
        at = int(np.searchsorted(rows, self._skip))
        if self._skip >= 0 and at < rows.size and rows[at] == self._skip:
            rows, values = np.delete(rows, at), np.delete(values, at, axis=0)
        return SparseGrad(rows, values)

    def _settings(self) -> list[str]:
        """What `repr` lists after the shape."""
        parts = [] if self.max_norm is None else [f"max_norm={self.max_norm}"]
        parts += [] if self.norm_type == 2 else [f"norm_type={self.norm_type}"]
        parts += ["scale_grad_by_freq=True"] if self.scale_grad_by_freq else []
        return parts

    def __repr__(self) -> str:
        shape = [str(self.num_embeddings), str(self.embedding_dim)]
        return f"{type(self).__name__}({', '.join([*shape, *self._settings()])})"


class Embedding(Layer):
    """A lookup layer: ids in, rows out.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the weight.
    padding_idx : int, optional
        A row that takes no gradient; it starts as zeros. Negative counts from the end.
    max_norm : float, optional
        Rows of the batch with a larger norm are scaled down to it, in the table, before every
        lookup.
    norm_type : float
        The p of that norm: any number from 0 (counts what is not zero) to inf (the largest).
    scale_grad_by_freq : bool
        Divide a row's gradient by how often the row occurs in the batch.
    sparse : bool
        `backward` gives a `SparseGrad` instead of an array of the weight's shape.
    _weight : float32 array of shape (num_embeddings, embedding_dim), optional
        Rows to use, without a copy; they are not initialised.
    _freeze : bool
        Optimizers refuse the layer.
    device, dtype
        "cpu" and float32, or None.
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
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: F32 | None = None,
        _freeze: bool = False,
        device: object = None,
        dtype: object = None,
        *,
        table: Table | None = None,
        seed: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
            table,
            seed,
            num_threads,
        )

    @classmethod
    def from_pretrained(
        cls,
        embeddings: F32 | str | os.PathLike[str] | Table,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
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
        table = cls._pretrained_table(embeddings, freeze, num_threads)
        return cls(
            table.rows,
            table.dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            None,
            freeze,
            table=table,
        )

    def __call__(self, ids: ArrayLike) -> F32:
        """Look rows up: a fresh float32 array of shape ids.shape + (embedding_dim,).

        Raises
        ------
        IdError
            If an id is negative or too large; no row is scaled then.
        """
        if self.max_norm is not None:
            ids = as_ids(ids)
            self._renorm(ids)
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
        table, scale = self.table, self.scale_grad_by_freq
        if self.sparse:
            found = grouping.sum_duplicates(
                ids, grad, table.rows, table.dim, scale, table.num_threads
            )
            return self._without_padding(*found)
        return grouping.dense_gradient(
            ids, grad, table.rows, table.dim, self._skip, scale, table.num_threads
        )

    def _settings(self) -> list[str]:
        first = [] if self.padding_idx is None else [f"padding_idx={self.padding_idx}"]
        return [*first, *super()._settings(), *(["sparse=True"] if self.sparse else [])]


def settings_of(layer: Layer) -> list[str]:
    """List the settings that the repr of a layer has after its shape."""
    return layer._settings()


def _require_cpu_float32(device: object, dtype: object) -> None:
    """What torch's arguments may say: numpy's and torch's float32 both end in that word."""
    if device is not None and str(device) != "cpu":
        raise ArgumentError(f"device = {device}; allowed: 'cpu', or None")
    name = getattr(dtype, "__name__", str(dtype)).split(".")[-1]
    if dtype is not None and name not in ("float32", "<f4"):
        raise ArgumentError(f"dtype = {dtype}; allowed: float32, or None")


def _norm(name: str, value: float) -> float:
    """A number from 0 to infinity; what torch does with others has no use."""
    if not value >= 0 or math.isnan(value):
        raise ArgumentError(f"{name} = {value}; allowed: 0 or more, inf included")
    return float(value)


def _wrapped(padding_idx: int | None, rows: int) -> int | None:
    """Torch's rule: -rows..rows-1, where negative counts from the end."""
    if padding_idx is None:
        return None
    if not rows:
        raise ArgumentError(f"padding_idx = {padding_idx}; allowed: None, the table has no rows")
    return require_count(padding_idx, "padding_idx", -rows, rows - 1) % rows
