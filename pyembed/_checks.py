"""Checks of the arguments of public calls, all made before a kernel reads or writes anything.

Ids are integers of any width and any shape; values are float32 of exactly the expected shape.
Nothing is rounded, wrapped or broadcast.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed import _core
from pyembed.errors import ArgumentError, DTypeError, IdError, NonFiniteError

INT64 = np.dtype(np.int64)
INT32 = np.dtype(np.int32)
FLOAT32 = np.dtype(np.float32)

IdArray = NDArray[np.int64] | NDArray[np.int32]
F32 = NDArray[np.float32]


def as_ids(ids: ArrayLike) -> IdArray:
    """Ids as a C-contiguous int64 or int32 array, copied only if they are not one already.

    Raises
    ------
    DTypeError
        If they are not integers; bool is not an integer here.
    IdError
        If an unsigned id does not fit into int64.
    """
    if type(ids) is np.ndarray and (ids.dtype is INT64 or ids.dtype is INT32):
        return _plain(ids)
    try:
        array = np.asarray(ids)
    except ValueError:
        raise DTypeError(
            "ids are lists of several lengths; allowed: a rectangular array; join them and use "
            "EmbeddingBag with offsets, or pad them and give padding_idx"
        ) from None
    if array.dtype.kind not in "iu":
        if array.size or isinstance(ids, np.ndarray):
            raise DTypeError(
                f"ids are {array.dtype}; allowed: integers of any width; use ids.astype(np.int64)"
            )
        array = array.astype(np.int64)  # numpy makes an empty list float64
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        where = tuple(int(i) for i in np.argwhere(array > np.iinfo(np.int64).max)[0])
        raise IdError(f"ids[{', '.join(map(str, where))}] = {array[where]} is beyond any table")
    return _plain(array if array.dtype == INT32 else array.astype(np.int64, copy=False))


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous and aligned array, copied only if it is not one already."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.array(array, order="C")


def as_values(values: ArrayLike, shape: tuple[int, ...], name: str) -> F32:
    """Values as a C-contiguous float32 array of exactly `shape`.

    Raises
    ------
    DTypeError
        If they are not float32.
    ArgumentError
        If they have another shape.
    """
    array = np.asarray(values)
    if array.dtype != FLOAT32:
        raise DTypeError(
            f"{name} is {array.dtype}; allowed: float32; use {name}.astype(np.float32)"
        )
    if array.shape != shape:
        raise ArgumentError(f"{name} has shape {array.shape}; expected {shape}")
    return _plain(array)


def as_output(out: Any, shape: tuple[int, ...]) -> F32:
    """The caller's `out`: a writable C-contiguous float32 array of exactly `shape`.

    Raises
    ------
    DTypeError, ArgumentError
        If it is anything else; filling a copy would not fill the caller's array.
    """
    require_float32(out, "out")
    if out.shape != shape:
        raise ArgumentError(f"out has shape {out.shape}; expected {shape}: ids.shape + (dim,)")
    if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise ArgumentError("out must be C-contiguous, aligned and writable")
    checked: F32 = out
    return checked


def require_apart(values: F32, columns: tuple[_core.Column, ...], name: str) -> None:
    """Refuse values that share memory with the rows, as they would change during the loop.

    Raises
    ------
    ArgumentError
        If they share memory.
    """
    if _core.overlaps(columns, values):
        raise ArgumentError(f"{name} shares memory with the table; use {name}.copy()")


def require_float32(array: Any, name: str) -> None:
    """Refuse anything but a float32 ndarray, where a copy would lose what is written to it.

    Raises
    ------
    DTypeError
        If it is anything else.
    """
    if not isinstance(array, np.ndarray) or array.dtype != FLOAT32:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise DTypeError(f"{name} is {kind}; allowed: a float32 ndarray")


def require_finite(values: F32, name: str, num_threads: int) -> None:
    """Refuse NaN and infinity.

    Raises
    ------
    NonFiniteError
        If there is one; the message names the first.
    """
    if not _core.all_finite(values, num_threads):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise NonFiniteError(
            f"{name}[{', '.join(map(str, where))}] = {values[where]}; allowed: finite numbers; "
            "nothing was written; nonfinite='allow' on the optimizer lets them through"
        )


def require_count(value: Any, name: str, low: int, high: int) -> int:
    """An integer argument in low..high.

    Raises
    ------
    ArgumentError
        If it is out of range.
    DTypeError
        If it is not an integer.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise DTypeError(f"{name} = {value!r} is a {type(value).__name__}; allowed: an integer")
    if not low <= value <= high:
        raise ArgumentError(f"{name} = {value}; allowed: {low}..{high}")
    return int(value)


def in_range(name: str, value: float, low: float, below: float = math.inf) -> float:
    """A finite hyper-parameter of at least `low` and less than `below`.

    Raises
    ------
    ArgumentError
        If it is anything else, or float32 cannot hold it.
    """
    used = math.nan
    if isinstance(value, numbers.Real):
        with np.errstate(over="ignore"):
            used = float(np.float32(value))  # the kernels compute with this
    if not (math.isfinite(used) and used >= low and value < below):
        limit = "" if below == math.inf else f" and < {below:g}"
        raise ArgumentError(
            f"{name} = {value!r}; allowed: a number >= {low:g}{limit} that float32 holds"
        )
    return float(value)
