"""Embedding: torch's lookup layer over a table of any size, and its base, shared with EmbeddingBag.

A lookup copies rows; `backward` sums the gradients of equal ids, in the order of the batch. Only a
dense `backward` allocates an array of the table's size.
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
    """The base of `Embedding` and `EmbeddingBag`: a table, and torch's settings.

    Attributes
    ----------
    table : Table
        The rows.
    padding_idx : int or None
        Counted from the front, even if the argument was negative.
    max_norm, norm_type, scale_grad_by_freq, sparse
        As given; may be changed.
    frozen : bool
        Whether optimizers refuse the layer.
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
        """The number of rows."""
        return self.table.rows

    @property
    def embedding_dim(self) -> int:
        """The floats of a row's weight."""
        return self.table.dim

    @property
    def weight(self) -> F32:
        """A read-only view of the rows; see `Table.writing` for a writable one."""
        return self.table.weight

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the weight anew from N(0, 1), and set the padding row to zero.

        Parameters
        ----------
        seed : int, optional
            The seed; by default it is random.
        """
        seed = secrets.randbits(64) if seed is None else seed
        with self.table.writing() as weight:
            init.normal().fill(weight, seed, 0, self.table.num_threads)
            if self.padding_idx is not None:
                weight[self.padding_idx] = 0

    def state_dict(self) -> dict[str, F32]:
        """The state of the layer in torch's form, without a copy.

        Returns
        -------
        dict of str to ndarray
            ``{"weight": view}``.
        """
        return {"weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy ``state["weight"]`` into the rows, the padding row included.

        Parameters
        ----------
        state : mapping of str to array of float32
            It has the key "weight" alone, with shape (num_embeddings, embedding_dim).

        Raises
        ------
        ArgumentError, DTypeError
            If the state is anything else; nothing is copied then.
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
        """The row number of the padding row for the kernels; -1 for none."""
        return -1 if self.padding_idx is None else self.padding_idx

    def read_gradient(self, ids: Any, grad: ArrayLike | None) -> _core.Batch:
        """Read the gradient of looked-up rows, for an optimizer.

        Parameters
        ----------
        ids : array of integers, any shape, or SparseGrad
            The ids of the lookup, or unique rows with their gradients.
        grad : array of float32, shape ids.shape + (embedding_dim,), or None
            The gradient of each looked-up row; None with a SparseGrad.

        Returns
        -------
        _core.Batch
            The batch, not yet grouped, so its ids are not checked yet.

        Raises
        ------
        DTypeError, ArgumentError
            If an array has another dtype or shape.
        """
        weight = self.table.store.weight_column
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
        """The settings that `repr` shows after the shape."""
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
        The shape of the weight.
    padding_idx : int, optional
        A row without gradient; it starts as zeros. Negative numbers count from the end.
    max_norm : float, optional
        Rows of the batch with a larger norm are scaled down to it, in the table, before every
        lookup.
    norm_type : float
        The p of that p-norm, from 0 (the number of nonzero elements) to inf (the largest).
    scale_grad_by_freq : bool
        Whether the gradient of a row is divided by the number of its positions in the batch.
    sparse : bool
        Whether `backward` returns a `SparseGrad`, instead of an array of the weight's shape.
    _weight : ndarray of float32, shape (num_embeddings, embedding_dim), optional
        Rows to use, without a copy; they are not initialised.
    _freeze : bool
        Whether optimizers refuse the layer.
    device : str or device of torch, optional
        The CPU.
    dtype : dtype of numpy or torch, optional
        float32.
    table : Table, optional
        Rows to use, in memory or on disk; they are not initialised.
    seed : int, optional
        The seed of the normal distribution N(0, 1) of a fresh weight; random by default.
    num_threads : int, optional
        See `Table.create`.

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
        """Make a layer over existing rows, without a copy.

        Parameters
        ----------
        embeddings : ndarray of float32, path-like or Table
            The rows; a path of a table or .npy file is opened for reading if `freeze` is True.
        freeze : bool
            Whether optimizers refuse the layer.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, num_threads : optional
            See `Embedding`.

        Returns
        -------
        Embedding
            The layer.

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
        """Look rows up.

        Parameters
        ----------
        ids : array of integers, any shape
            Row numbers.

        Returns
        -------
        ndarray of float32, shape ids.shape + (embedding_dim,)
            A copy of the rows.

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
        """The gradient of the weight, from the gradient of the rows that a lookup returned.

        Parameters
        ----------
        ids : array of integers, any shape
            The ids of the lookup.
        grad : array of float32, shape ids.shape + (embedding_dim,)
            The gradient of each row that the lookup returned.

        Returns
        -------
        ndarray of float32, shape (num_embeddings, embedding_dim), or SparseGrad
            Zero at rows that are not in the batch, and at the padding row. With ``sparse=True``,
            a SparseGrad of the rows of the batch, without the padding row.
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
    """List the settings that the repr of a layer shows after its shape."""
    return layer._settings()


def _require_cpu_float32(device: object, dtype: object) -> None:
    """Refuse another device or dtype; the names of numpy's and torch's float32 end in float32."""
    if device is not None and str(device) != "cpu":
        raise ArgumentError(f"device = {device}; allowed: 'cpu', or None")
    name = getattr(dtype, "__name__", str(dtype)).split(".")[-1]
    if dtype is not None and name not in ("float32", "<f4"):
        raise ArgumentError(f"dtype = {dtype}; allowed: float32, or None")


def _norm(name: str, value: float) -> float:
    """A number from 0 to infinity."""
    if not value >= 0 or math.isnan(value):
        raise ArgumentError(f"{name} = {value}; allowed: 0 or more, inf included")
    return float(value)


def _wrapped(padding_idx: int | None, rows: int) -> int | None:
    """The padding row by torch's rule: in -rows..rows-1, where negative counts from the end."""
    if padding_idx is None:
        return None
    if not rows:
        raise ArgumentError(f"padding_idx = {padding_idx}; allowed: None, the table has no rows")
    return require_count(padding_idx, "padding_idx", -rows, rows - 1) % rows
