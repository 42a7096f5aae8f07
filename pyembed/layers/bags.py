"""Batches of bags: ids and the start of each bag, checked before a kernel sees them.

A bag is a run of consecutive ids.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed._checks import F32, IdArray, as_ids, as_values
from pyembed.errors import ArgumentError, DTypeError

I64 = NDArray[np.int64]


class Bags:
    """Ids in bags, for `EmbeddingBag` and the optimizers.

    Parameters
    ----------
    ids : ndarray of int64 or int32, shape (n,)
        The row numbers of all bags.
    starts : ndarray of int64, shape (bags + 1,)
        Bag b has ``ids[starts[b] : starts[b + 1]]``.
    weights : ndarray of float32, shape (n,), or None
        A factor for each row.
    """

    def __init__(self, ids: IdArray, starts: I64, weights: F32 | None) -> None:
        self.ids, self.starts, self.weights = ids, starts, weights

    def __len__(self) -> int:
        return self.starts.size - 1

    @cached_property
    def bag_of(self) -> I64:
        """The bag of each position, int64 of shape (n,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @classmethod
    def from_input(
        cls,
        input: ArrayLike,
        offsets: ArrayLike | None = None,
        per_sample_weights: ArrayLike | None = None,
        include_last_offset: bool = False,
    ) -> Bags:
        """Make bags by the conventions of torch.

        Parameters
        ----------
        input : array of integers, shape (n,) or (bags, length)
            Row numbers. A 2-D input has one bag in each row, and no offsets.
        offsets : array of integers, shape (bags,), or (bags + 1,) with `include_last_offset`
            The start of each bag: the first is 0, they never descend, and none exceeds n.
        per_sample_weights : array of float32, shape input.shape, optional
            A factor for each row.
        include_last_offset : bool
            Whether the last offset is n, the end of the last bag; ignored for a 2-D input.

        Returns
        -------
        Bags
            The checked batch.

        Raises
        ------
        ArgumentError, DTypeError
            If an array has another dtype or shape, or the offsets are not as above.

        Examples
        --------
        >>> bags = Bags.from_input([5, 6, 7], offsets=[0, 2, 2])
        >>> bags.starts
        array([0, 2, 2, 3])
        """
        ids = as_ids(input)
        if ids.ndim == 2:
            if offsets is not None:
                raise ArgumentError("a 2-D input is one bag a row; offsets must then be None")
            starts = np.arange(ids.shape[0] + 1) * ids.shape[1]
        elif ids.ndim == 1:
            starts = _starts(offsets, ids.size, include_last_offset)
        else:
            raise ArgumentError(f"the input has {ids.ndim} dimensions; allowed: 1 or 2")
        weights = None
        if per_sample_weights is not None:
            weights = as_values(per_sample_weights, ids.shape, "per_sample_weights").reshape(-1)
        return cls(ids.reshape(-1), starts, weights)


def _starts(offsets: ArrayLike | None, n: int, include_last: bool) -> I64:
    if offsets is None:
        raise ArgumentError("a 1-D input needs offsets: where each bag begins")
    array = as_ids(offsets)
    if array.ndim != 1:
        raise ArgumentError(f"offsets have {array.ndim} dimensions; allowed: 1")
    if include_last:
        if array.size == 0:
            raise ArgumentError(
                "offsets are empty; with include_last_offset at least one is needed"
            )
        if array[-1] != n:
            raise ArgumentError(
                f"offsets[{array.size - 1}] = {array[-1]}; with include_last_offset the last is "
                f"the number of ids, {n}"
            )
        starts = array.astype(np.int64)
    else:
        starts = np.empty(array.size + 1, np.int64)
        starts[:-1], starts[-1] = array, n
    if starts[0] != 0:
        what = "offsets[0]" if array.size else f"there are no bags for {n} ids; offsets[0]"
        raise ArgumentError(f"{what} = {starts[0]}; allowed: 0")
    descends = starts[1:] < starts[:-1]
    if descends.any():
        at = int(descends.argmax()) + 1
        if at == array.size:
            raise ArgumentError(f"offsets[{at - 1}] = {starts[at - 1]} is outside 0..{n}")
        raise ArgumentError(
            f"offsets[{at}] = {starts[at]} is below offsets[{at - 1}] = {starts[at - 1]}; "
            "allowed: never descending"
        )
    return starts


def require_mode(mode: str) -> str:
    """One of the three reductions.

    Raises
    ------
    ArgumentError
    """
    if mode not in ("sum", "mean", "max"):
        raise ArgumentError(f"mode = {mode!r}; allowed: 'sum', 'mean', 'max'")
    return mode


def require_bags(batch: object) -> Bags:
    """A batch that `EmbeddingBag.bags` made.

    Raises
    ------
    DTypeError
    """
    if not isinstance(batch, Bags):
        raise DTypeError(
            f"{type(batch).__name__}; allowed: Bags; use step(layer.bags(input, offsets), grad)"
        )
    return batch
