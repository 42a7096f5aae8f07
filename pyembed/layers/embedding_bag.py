"""EmbeddingBag: sums, means or maxima of bags of rows, without copying each row.

The semantics are torch's, with the differences of docs/torch-compatibility.md: offsets are checked,
`scale_grad_by_freq` divides by the count of the row itself, and every mode has sparse gradients.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core, _threads, grouping
from pyembed._checks import F32, as_values
from pyembed.errors import ArgumentError
from pyembed.grouping import SparseGrad
from pyembed.layers.bags import Bags, require_bags, require_mode
from pyembed.layers.embedding import Layer
from pyembed.table import Table


class EmbeddingBag(Layer):
    """A lookup layer that reduces each bag of rows to one.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        The shape of the weight.
    max_norm, norm_type : float, optional
        See `Embedding`.
    scale_grad_by_freq : bool
        See `Embedding`; not with mode "max".
    mode : {"mean", "sum", "max"}
        "mean" divides by the number of rows in the bag; an empty bag gives zeros. "max" keeps the
        first of equal elements, and a NaN only if it comes first.
    sparse : bool
        Whether `backward` returns a `SparseGrad`.
    _weight : ndarray of float32, shape (num_embeddings, embedding_dim), optional
        Rows to use, without a copy.
    include_last_offset : bool
        Whether offsets end with the number of ids.
    padding_idx : int, optional
        A row that is left out of every sum, mean, count and maximum, and has no gradient.
    device, dtype, _freeze, table, seed, num_threads : optional
        See `Embedding`.

    Examples
    --------
    >>> import numpy as np
    >>> b = EmbeddingBag(3, 2, mode="sum", _weight=np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    >>> b([0, 1, 2], offsets=[0, 2])
    array([[4., 6.],
           [5., 6.]], dtype=float32)
    >>> b.backward([0, 1, 2], np.ones((2, 2), np.float32), offsets=[0, 2])
    array([[1., 1.],
           [1., 1.],
           [1., 1.]], dtype=float32)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: F32 | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: object = None,
        dtype: object = None,
        *,
        _freeze: bool = False,
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
        self.mode = require_mode(mode)
        self.include_last_offset = include_last_offset
        if self.mode == "max" and scale_grad_by_freq:
            raise ArgumentError("mode='max' has no gradient to scale by frequency")

    @classmethod
    def from_pretrained(
        cls,
        embeddings: F32 | str | os.PathLike[str] | Table,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        num_threads: int | None = None,
    ) -> EmbeddingBag:
        """Make a layer over existing rows, without a copy; see `Embedding.from_pretrained`.

        Parameters
        ----------
        embeddings : ndarray of float32, path-like or Table
            The rows; a path of a table or .npy file is opened for reading if `freeze` is True.
        freeze : bool
            Whether optimizers refuse the layer.
        max_norm, norm_type, scale_grad_by_freq, mode, sparse : optional
            See `EmbeddingBag`.
        include_last_offset, padding_idx, num_threads : optional
            See `EmbeddingBag`.

        Returns
        -------
        EmbeddingBag
            The layer.
        """
        table = cls._pretrained_table(embeddings, freeze, num_threads)
        return cls(
            table.rows,
            table.dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            None,
            include_last_offset,
            padding_idx,
            _freeze=freeze,
            table=table,
        )

    def bags(
        self,
        input: ArrayLike | Bags,
        offsets: ArrayLike | None = None,
        per_sample_weights: ArrayLike | None = None,
    ) -> Bags:
        """Check a batch once, for a lookup, `backward` and ``optimizer.step``.

        Parameters
        ----------
        input : array of integers, shape (n,) or (bags, length), or Bags
            Row numbers, or the result of `bags`.
        offsets : array of integers, optional
            The start of each bag, see `Bags.from_input`.
        per_sample_weights : array of float32, shape input.shape, optional
            A factor for each row, with mode "sum".

        Returns
        -------
        Bags
            The checked batch.

        Raises
        ------
        ArgumentError, DTypeError
            See `Bags.from_input`.
        """
        if isinstance(input, Bags):
            if offsets is not None or per_sample_weights is not None:
                raise ArgumentError("bags have their own offsets and weights")
            per_sample_weights = input.weights
        if per_sample_weights is not None and self.mode != "sum":
            raise ArgumentError(f"per_sample_weights need mode='sum', not {self.mode!r}")
        if isinstance(input, Bags):
            return input
        return Bags.from_input(input, offsets, per_sample_weights, self.include_last_offset)

    def __call__(
        self,
        input: ArrayLike | Bags,
        offsets: ArrayLike | None = None,
        per_sample_weights: ArrayLike | None = None,
    ) -> F32:
        """Reduce each bag.

        Parameters
        ----------
        input : array of integers, shape (n,) or (bags, length), or Bags
            Row numbers, or the result of `bags`.
        offsets : array of integers, optional
            The start of each bag, see `Bags.from_input`.
        per_sample_weights : array of float32, shape input.shape, optional
            A factor for each row, with mode "sum".

        Returns
        -------
        ndarray of float32, shape (bags, embedding_dim)
            One row for each bag.

        Raises
        ------
        IdError, ArgumentError, DTypeError
            If an id is outside the table, or see `Bags.from_input`.
        """
        bags = self.bags(input, offsets, per_sample_weights)
        self._renorm(bags.ids)
        return self._reduce(bags, None)

    def _reduce(self, bags: Bags, which: NDArray[np.int64] | None) -> F32:
        table = self.table
        out = np.empty((len(bags), table.dim), np.float32)
        threads = _threads.for_work(bags.ids.size * table.dim, table.num_threads)
        column = table.store.weight_column
        _core.reduce_bags(
            column, bags.ids, bags.starts, bags.weights, self.mode, self._skip, out, which, threads
        )
        return out

    def backward(
        self,
        input: ArrayLike | Bags,
        grad: ArrayLike,
        offsets: ArrayLike | None = None,
        per_sample_weights: ArrayLike | None = None,
    ) -> F32 | SparseGrad:
        """The gradient of the weight, from the gradient of the reduced rows.

        Parameters
        ----------
        input : array of integers, shape (n,) or (bags, length), or Bags
            Row numbers, or the result of `bags`.
        grad : array of float32, shape (bags, embedding_dim)
            The gradient of each reduced row.
        offsets : array of integers, optional
            The start of each bag, see `Bags.from_input`.
        per_sample_weights : array of float32, shape input.shape, optional
            A factor for each row, with mode "sum".

        Returns
        -------
        ndarray of float32, shape (num_embeddings, embedding_dim), or SparseGrad
            Zero at other rows; with ``sparse=True``, a SparseGrad of the rows of the batch.
        """
        bags = self.bags(input, offsets, per_sample_weights)
        sparse = self.sparse_gradient(bags, grad)
        return sparse if self.sparse else sparse.to_dense(self.table.rows)

    def sparse_gradient(self, bags: Bags, grad: ArrayLike) -> SparseGrad:
        """The gradient of the rows of the batch, without the padding row.

        Parameters
        ----------
        bags : Bags
            The batch.
        grad : array of float32, shape (bags, embedding_dim)
            The gradient of each reduced row.

        Returns
        -------
        SparseGrad
            The unique rows and their gradients.
        """
        if self.mode == "max":
            return self._max_gradient(bags, self._check_gradient(bags, grad))
        batch = self._read_bags(bags, grad)
        return self._without_padding(*grouping.sparse_gradient(batch, self.table.num_threads))

    def read_gradient(self, ids: Any, grad: ArrayLike | None) -> _core.Batch:
        """Read the gradient of the reduced rows, for an optimizer.

        Parameters
        ----------
        ids : Bags or SparseGrad
            The batch, or unique rows with their gradients.
        grad : array of float32, shape (bags, embedding_dim), or None
            The gradient of each reduced row; None with a SparseGrad.

        Returns
        -------
        _core.Batch
            The batch, not yet grouped, so its ids are not checked yet.

        Raises
        ------
        DTypeError, ArgumentError
            If an array has another dtype or shape.
        """
        if isinstance(ids, SparseGrad):
            return super().read_gradient(ids, grad)
        bags = require_bags(ids)
        if grad is None:
            raise ArgumentError("step(ids, grad): grad is missing")
        if self.mode == "max":
            return super().read_gradient(self.sparse_gradient(bags, grad), None)
        return self._read_bags(bags, grad)

    def _read_bags(self, bags: Bags, grad: ArrayLike) -> _core.Batch:
        return _core.Batch(
            bags.ids,
            self._check_gradient(bags, grad),
            self.table.rows,
            self.table.dim,
            self._skip,
            self.scale_grad_by_freq,
            bags.bag_of,
            self._coefficients(bags),
        )

    def _check_gradient(self, bags: Bags, grad: ArrayLike) -> F32:
        """The gradient for the kernels, of float32 and shape (bags, embedding_dim)."""
        return as_values(grad, (len(bags), self.table.dim), "grad")

    def _coefficients(self, bags: Bags) -> F32 | None:
        """The factor of a bag's gradient for each of its positions; None stands for ones."""
        if self.mode == "sum":
            return bags.weights
        counted = np.ones(bags.ids.size, np.int64) if self._skip < 0 else bags.ids != self._skip
        sizes = np.bincount(bags.bag_of, counted, len(bags)).astype(np.float32)
        inverse: F32 = np.reciprocal(sizes.clip(1), dtype=np.float32)
        return inverse[bags.bag_of]

    def _max_gradient(self, bags: Bags, grad: F32) -> SparseGrad:
        which = np.empty((len(bags), self.table.dim), np.int64)
        self._reduce(bags, which)
        won = np.flatnonzero(which >= 0)
        groups = grouping.group(which.reshape(-1)[won], self.table.rows, self.table.num_threads)
        values = np.zeros((groups.rows.size, self.table.dim), np.float32)
        threads = _threads.for_work(won.size, self.table.num_threads)
        _core.sum_elements(groups.starts, won[groups.order], grad, values, threads)
        return SparseGrad(groups.rows, values)

    def per_sample_weights_grad(
        self, input: ArrayLike | Bags, grad: ArrayLike, offsets: ArrayLike | None = None
    ) -> F32:
        """The gradient of `per_sample_weights`: each row times the gradient of its bag.

        Parameters
        ----------
        input : array of integers, shape (n,) or (bags, length), or Bags
            Row numbers, or the result of `bags`.
        grad : array of float32, shape (bags, embedding_dim)
            The gradient of each reduced row.
        offsets : array of integers, optional
            The start of each bag, see `Bags.from_input`.

        Returns
        -------
        ndarray of float32, shape (n,)
            One number for each id; zero at the padding row.
        """
        if self.mode != "sum":
            raise ArgumentError(f"per_sample_weights need mode='sum', not {self.mode!r}")
        bags = self.bags(input, offsets)
        values = self._check_gradient(bags, grad)
        out = np.empty(bags.ids.size, np.float32)
        threads = _threads.for_work(bags.ids.size * self.table.dim, self.table.num_threads)
        ids = bags.ids.astype(np.int64, copy=False)
        _core.bag_dots(
            self.table.store.weight_column, ids, bags.bag_of, values, self._skip, out, threads
        )
        return out

    def _settings(self) -> list[str]:
        last = [] if self.padding_idx is None else [f"padding_idx={self.padding_idx}"]
        return [*super()._settings(), f"mode={self.mode!r}", *last]
