"""The update rules of `_kernels/rules.inc.h` in plain numpy: part of `reference`, which says more.

A rule takes the columns of the touched rows, the weight first, and their summed gradients, and
returns the new columns. Arrays are (u, d), state of one number a row is (u, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Columns = tuple[F32, ...]


class Hyper:
    """Hyper-parameters by name, each rounded to float32; lr may be one number a row, (u, 1)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return np.float32(self._values[name])


def lane_sum(terms: NDArray[Any]) -> Any:
    """Lane i mod 16 sums every sixteenth term, then the lanes are summed in halves."""
    lanes: NDArray[np.floating] = np.zeros(16, terms.dtype)
    for at in range(0, terms.size, 16):
        part = terms[at : at + 16]
        lanes[: part.size] += part
    for half in (8, 4, 2, 1):
        lanes[:half] += lanes[half : 2 * half]
    return lanes[0]


def squares(rows: F32) -> NDArray[np.float64]:
    """The sum of squares of each row, in double, shape (u, 1)."""
    sums = [lane_sum(row.astype(np.float64) ** 2) for row in rows]
    return np.array(sums, np.float64).reshape(-1, 1)


def mean_square(rows: F32) -> F32:
    """The mean of squares of each row, shape (u, 1)."""
    mean: F32 = (squares(rows) / rows.shape[1]).astype(np.float32)
    return mean


def ratio(over: NDArray[np.float64], under: NDArray[np.float64], one: NDArray[np.bool_]) -> F32:
    """over / under, and 1 where `one`."""
    rounded: F32 = np.where(one, 1.0, over / under).astype(np.float32)
    return rounded


def sgd(columns: Columns, g: F32, h: Hyper) -> Columns:
    (w,) = columns
    return (w - h.lr * g,)


def momentum(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, m = columns
    m = h.momentum * m + h.one_minus_b1 * g
    return w - h.lr * m, m


def nesterov(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, m = columns
    m = h.momentum * m + h.one_minus_b1 * g
    return w - h.lr * (g + h.momentum * m), m


def adagrad(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, s = columns
    s = s + g * g
    return w - h.lr * (g / (np.sqrt(s) + h.eps)), s


def rowwise_adagrad(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, s = columns
    s = s + mean_square(g)
    return w - h.lr / (np.sqrt(s) + h.eps) * g, s


def rmsprop(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, v = columns
    v = v + (g * g - v) * h.one_minus_b2
    return w - h.lr * (g / (np.sqrt(v) + h.eps)), v


def adam(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, m, v = columns
    m = m + (g - m) * h.one_minus_b1
    v = v + (g * g - v) * h.one_minus_b2
    return w - h.lr * (m / (np.sqrt(v) + h.eps)), m, v


def rowwise_adam(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, m, v = columns
    m = m + (g - m) * h.one_minus_b1
    v = v + (mean_square(g) - v) * h.one_minus_b2
    return w - h.lr / (np.sqrt(v) + h.eps) * m, m, v


def lamb(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, m, v = columns
    m = m + (g - m) * h.one_minus_b1
    v = v + (g * g - v) * h.one_minus_b2
    r = h.correction * (m / (np.sqrt(v) + h.eps)) + h.decay * w
    w_norm, r_norm = np.sqrt(squares(w)), np.sqrt(squares(r))
    step = h.lr * ratio(w_norm, r_norm, (w_norm == 0) | (r_norm == 0))
    return w - step * r, m, v


def lars(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, m = columns
    w_norm, g_norm = np.sqrt(squares(w)), np.sqrt(squares(g))
    over, under = float(h.correction) * w_norm, g_norm + float(h.decay) * w_norm
    step = h.lr * ratio(over, under, (w_norm == 0) | (g_norm == 0))
    m = h.momentum * m + step * (g + h.decay * w)
    return w - m, m


def ftrl(columns: Columns, g: F32, h: Hyper) -> Columns:
    w, z, n = columns
    total = n + g * g
    root = np.sqrt(total)
    z = z + (g - (root - np.sqrt(n)) / h.lr * w)
    w = -(z - np.copysign(h.l1, z)) / ((h.beta + root) / h.lr + h.l2)
    return np.where(np.abs(z) <= h.l1, np.float32(0), w), z, total


RULES: dict[str, Callable[[Columns, F32, Hyper], Columns]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "rowwise_adagrad": rowwise_adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adam,
    "rowwise_adam": rowwise_adam,
    "lamb": lamb,
    "lars": lars,
    "ftrl": ftrl,
}


def miss(keep: float, momentum: float, n: int) -> tuple[float, float, float]:
    """(kept, left, moved) after n steps without a gradient, see pe_miss in kernels.h."""
    kept, left, moved = 1.0, 1.0, 0.0
    for bit in bin(n)[2:] if n else "":
        moved *= kept + left
        kept *= kept
        left *= left
        if bit == "1":
            left *= momentum
            moved = keep * moved + left
            kept *= keep
    return kept, left, moved


def rate(count: float, power: float) -> float:
    """The factor of the learning rate of a row with this count, by libm's pow."""
    return math.pow(count, -power) if count > 1 else 1.0
