"""The kernels in plain numpy: slow, obvious, and the specification of `_core`.

Every function has the name and the meaning of its twin, and gives the same bits: each arithmetic
step is one float32 operation of numpy, in the order in which the kernel does it. Tests compare
for equality. Nothing in the library calls this file.

Legend: n ids, u unique rows, d floats of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference import rules as rules

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

BLOCK = 64  # floats of one block of random numbers
LANES = 16

# The options of a step that has none.
NO_OPTIONS: dict[str, Any] = {
    "skip_nonfinite": False,
    "lazy": False,
    "frequency_power": 0.0,
    "clip_value": np.inf,
    "l2": 0.0,
    "max_norm": np.inf,
    "norm_type": 2.0,
    "step": 1,
    "keep": 1.0,
    "missed_momentum": 0.0,
    "missed_lr": 0.0,
    "clip_scale": 1.0,
}


def gather(column: F32, ids: NDArray[np.integer]) -> F32:
    """out[i] = column[ids[i]]"""
    return (
        np.stack([column[i] for i in ids.ravel()]).reshape(*ids.shape, -1)
        if ids.size
        else (np.empty((*ids.shape, column.shape[1]), np.float32))
    )


def scatter_add(column: F32, ids: NDArray[np.integer], values: F32, alpha: float) -> None:
    """column[ids[i]] += alpha * values[i], one after the other"""
    for i, value in zip(ids.ravel(), values.reshape(-1, column.shape[1]), strict=True):
        column[i] += np.float32(alpha) * value


def group(ids: NDArray[np.integer], rows: int) -> tuple[I64, I64, I64]:
    """Unique rows ascending, where each group starts, positions in batch order within a group."""
    del rows
    flat = ids.ravel().astype(np.int64)
    order = np.argsort(flat, kind="stable").astype(np.int64)
    unique, starts = np.unique(flat[order], return_index=True)
    return unique, np.append(starts, flat.size).astype(np.int64), order


def sum_groups(
    rows: I64,
    starts: I64,
    order: I64,
    grad: F32,
    scale_by_count: bool = False,
    bag_of: I64 | None = None,
    coef: F32 | None = None,
) -> F32:
    """out[u] = sum of grad[p] for p in group u, in position order; times 1 / count if scaled.

    With bags, position p has the gradient ``coef[p] * grad[bag_of[p]]``.
    """
    if bag_of is not None:
        grad = grad[bag_of] if coef is None else coef[:, None] * grad[bag_of]
    out = np.empty((rows.size, grad.shape[-1]), np.float32)
    for u in range(rows.size):
        positions = order[starts[u] : starts[u + 1]]
        out[u] = grad[positions[0]]
        for p in positions[1:]:
            out[u] += grad[p]
        if scale_by_count and positions.size > 1:
            out[u] *= np.float32(1) / np.float32(positions.size)
    return out


def add_groups(
    column: F32, rows: I64, sums: F32, alpha: float | np.float32, skip_row: int = -1
) -> None:
    """column[rows[u]] += alpha * sums[u]"""
    for row, total in zip(rows, sums, strict=True):
        if row != skip_row:
            column[row] += np.float32(alpha) * total


def update(
    columns: tuple[F32, ...],
    rows: I64,
    sums: F32,
    name: str,
    hyper: Mapping[str, float],
    skip_row: int = -1,
    options: Mapping[str, Any] | None = None,
) -> int:
    """One optimizer step on the unique rows, given the sum of each row's gradients.

    Returns how many rows were left alone for a gradient that is not finite.
    """
    keep = rows != skip_row
    skipped = 0
    if options is not None and options["skip_nonfinite"]:
        finite = np.isfinite(sums).all(axis=1)
        skipped, keep = int((keep & ~finite).sum()), keep & finite
    r, g = rows[keep], sums[keep]
    with np.errstate(all="ignore"):
        if options is not None:
            columns, g = _before(columns, r, g, options)
            columns, hyper = _counted(columns, r, hyper, options["frequency_power"])
        values = rules.RULES[name](tuple(c[r] for c in columns), g, rules.Hyper(hyper))
        for column, value in zip(columns, values, strict=True):
            column[r] = value
    if options is not None and options["max_norm"] < np.inf:
        renorm(columns[0], r, options["max_norm"], options["norm_type"])
    return skipped


def _before(
    columns: tuple[F32, ...], rows: I64, grad: F32, options: Mapping[str, float]
) -> tuple[tuple[F32, ...], F32]:
    """The part of a step before its rule; returns the rule's columns and its gradient."""
    if options["lazy"]:
        for row in rows:
            _catch_up_row(columns, row, options, True)
        columns = columns[:-1]
    elif options["keep"] != 1:
        columns[0][rows] *= np.float32(options["keep"])
    if options["clip_value"] < np.inf:
        grad = np.clip(grad, -np.float32(options["clip_value"]), np.float32(options["clip_value"]))
    if options["clip_scale"] != 1:
        grad = grad * np.float32(options["clip_scale"])
    if options["l2"]:
        grad = grad + np.float32(options["l2"]) * columns[0][rows]
    return columns, grad


def _counted(
    columns: tuple[F32, ...], rows: I64, hyper: Mapping[str, Any], power: float
) -> tuple[tuple[F32, ...], Mapping[str, Any]]:
    """Count the step of these rows: the rule's columns, and with each row's own learning rate."""
    if not power:
        return columns, hyper
    *others, count = columns
    count[rows] += np.float32(1)
    rates = np.array([rules.rate(float(count[row, 0]), power) for row in rows]).reshape(-1, 1)
    return tuple(others), {**hyper, "lr": float(np.float32(hyper["lr"])) * rates}


def _catch_up_row(
    columns: tuple[F32, ...], row: int, options: Mapping[str, float], stepping: bool
) -> None:
    weight, last, now = columns[0][row], columns[-1][row], options["step"]
    power = options["frequency_power"]
    rate = rules.rate(float(columns[-2][row, 0]), power) if power else 1.0
    n = int(now - 1 - last[0]) if 0 < last[0] < now - 1 else 0
    kept, left, moved = rules.miss(options["keep"], options["missed_momentum"], n)
    keep = options["keep"] if stepping else 1.0
    if stepping or last[0] > 0:
        last[0] = now if stepping else now - 1
    if kept * keep != 1:
        weight *= np.float32(kept * keep)
    if options["missed_momentum"] and moved * keep:
        buffer = columns[1][row]
        weight += np.float32(-options["missed_lr"] * rate * (moved * keep)) * buffer
        buffer *= np.float32(left)


def catch_up(columns: tuple[F32, ...], options: Mapping[str, Any]) -> None:
    """Give all rows what they missed in the steps before options["step"]."""
    for row in range(len(columns[0])):
        _catch_up_row(columns, row, options, False)


def global_norm(rows: I64, grad: F32, skip_row: int = -1, skip_nonfinite: bool = False) -> float:
    """The 2-norm of the gradients of unique rows as one vector."""
    total = 0.0
    for row, g in zip(rows, grad, strict=True):
        squares = float(rules.lane_sum(g.astype(np.float64) ** 2))
        if row != skip_row and (np.isfinite(squares) or not skip_nonfinite):
            total += squares
    return float(np.sqrt(total))


def norm(row: F32, p: float) -> float:
    """The p-norm in double; NaN if a NaN is among the elements."""
    x = np.abs(row.astype(np.float64))
    if np.isnan(x).any():
        return float("nan")
    if p == 2:
        return float(np.sqrt(rules.lane_sum(x * x)))
    if p == 1:
        return float(rules.lane_sum(x))
    if p == 0:
        return float(np.count_nonzero(x))
    largest = float(x.max(initial=0))
    if p == np.inf or largest in (0, np.inf):
        return largest
    return largest * float(rules.lane_sum((x / largest) ** p) ** (1 / p))


def renorm(column: F32, ids: NDArray[np.integer], max_norm: float, p: float) -> tuple[int, int]:
    """Rows with a larger norm n times float32(max_norm / (n + 1e-7)); (scaled, with NaN)."""
    rows = np.unique(ids)
    norms = [norm(column[row], p) for row in rows]
    for row, n in zip(rows, norms, strict=True):
        if n > max_norm:
            column[row] *= np.float32(max_norm / (n + 1e-7))
    return sum(n > max_norm for n in norms), sum(n != n for n in norms)


def reduce_bags(
    column: F32,
    ids: NDArray[np.integer],
    starts: I64,
    weights: F32 | None,
    mode: str,
    skip_row: int,
) -> tuple[F32, I64]:
    """Sum, mean or maximum of each bag without skip_row; and which id gave each maximum, or -1."""
    d = column.shape[1]
    out = np.zeros((starts.size - 1, d), np.float32)
    which = np.full((starts.size - 1, d), -1, np.int64)
    for b in range(starts.size - 1):
        taken = [p for p in range(starts[b], starts[b + 1]) if ids[p] != skip_row]
        for first, p in enumerate(taken):
            row = column[ids[p]]
            if mode == "max":
                wins = np.ones(d, bool) if first == 0 else row > out[b]
                out[b][wins], which[b][wins] = row[wins], ids[p]
            else:
                out[b] += row if weights is None else weights[p] * row
        if mode == "mean" and len(taken) > 1:
            out[b] /= np.float32(len(taken))
    return out, which


def bag_dots(column: F32, ids: I64, bag_of: I64, grad: F32, skip_row: int) -> F32:
    """out[p] = grad[bag_of[p]] . column[ids[p]], 0 for skip_row"""
    dots = [
        rules.lane_sum(grad[b] * column[i]) if i != skip_row else 0
        for i, b in zip(ids, bag_of, strict=True)
    ]
    return np.array(dots, np.float32)


def sum_elements(starts: I64, positions: I64, grad: F32, out: F32) -> None:
    """out[u, p % d] += grad.flat[p] for the positions p of group u"""
    d = out.shape[1]
    for u in range(out.shape[0]):
        for p in positions[starts[u] : starts[u + 1]]:
            out[u, p % d] += grad.flat[p]


ROTATIONS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))


def threefry(seed: int, block: int) -> NDArray[np.uint32]:
    """Threefry4x32, 13 rounds: the 4 words of 16 lanes, shape (4, 16)."""
    u32 = np.uint32
    key = [seed & 0xFFFFFFFF, seed >> 32, 0, 0]
    key.append(0x1BD11BDA ^ key[0] ^ key[1])
    counter = [block & 0xFFFFFFFF, block >> 32, np.arange(LANES), 0]
    x = [np.full(LANES, c, u32) + u32(k) for c, k in zip(counter, key, strict=False)]
    for r in range(13):
        if r and r % 4 == 0:
            s = r // 4
            x = [word + u32(key[(s + i) % 5]) for i, word in enumerate(x)]
            x[3] = x[3] + u32(s)
        for (a, b), k in zip(
            ((0, 1), (2, 3)) if r % 2 == 0 else ((0, 3), (2, 1)), ROTATIONS[r % 8], strict=True
        ):
            x[a] = x[a] + x[b]
            x[b] = ((x[b] << u32(k)) | (x[b] >> u32(32 - k))) ^ x[a]
    return np.stack(x)


def uniform_block(seed: int, block: int, low: float, width: float) -> F32:
    """low + width * k / 2^24"""
    unit = (threefry(seed, block).ravel() >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
    values: F32 = np.float32(low) + np.float32(width) * unit
    return values


def log_unit(u: F32) -> F32:
    """Natural logarithm for u in (0, 1] (polynomial of the Cephes library)."""
    f32 = np.float32
    bits = u.view(np.int32)
    e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (bits - (e << np.int32(23))).view(np.float32) - f32(1)
    f2 = f * f
    p = np.full_like(f, 7.0376836292e-2)
    for c in (
        -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    ):  # fmt: skip
        p = p * f + f32(c)
    log: F32 = (p * f * f2 - f32(0.5) * f2 + f) + e.astype(np.float32) * f32(0.693147180559945)
    return log


def normal_block(seed: int, block: int, mean: float, std: float) -> F32:
    """Box-Muller: words 0 and 2 give radii, words 1 and 3 give angles."""
    f32 = np.float32
    word = threefry(seed, block)
    radius_word, angle = word[0::2], word[1::2]
    u = (radius_word >> np.uint32(1)).astype(np.float32) * f32(2**-31) + f32(2**-32)
    radius = np.sqrt(f32(-2) * log_unit(u)) * f32(std)
    quadrant = (angle + np.uint32(0x20000000)) >> np.uint32(30)
    t = (angle - (quadrant << np.uint32(30))).view(np.int32).astype(np.float32)
    t = t * f32(1.4629180792671596e-9)
    t2 = t * t
    s = ((f32(-1.9515295891e-4) * t2 + f32(8.3321608736e-3)) * t2 - f32(1.6666654611e-1)) * t2 * t
    s = s + t
    c = (f32(2.443315711809948e-5) * t2 - f32(1.388731625493765e-3)) * t2 + f32(
        4.166664568298827e-2
    )
    c = c * t2 * t2 - f32(0.5) * t2 + f32(1)
    odd = (quadrant & np.uint32(1)) == 1
    cosine, sine = np.where(odd, s, c), np.where(odd, c, s)
    cosine = np.where(((quadrant + np.uint32(1)) & np.uint32(2)) != 0, -cosine, cosine)
    sine = np.where((quadrant & np.uint32(2)) != 0, -sine, sine)
    out = np.empty((4, LANES), np.float32)
    out[0::2] = radius * cosine + f32(mean)
    out[1::2] = radius * sine + f32(mean)
    return out.ravel()


def fill(shape: tuple[int, int], kind: str, seed: int, first_row: int, a: float, b: float) -> F32:
    """Rows first_row .. of the stream: element (r, c) is value r * dim + c."""
    rows, dim = shape
    start = first_row * dim
    end = start + rows * dim
    block = {"uniform": uniform_block, "normal": normal_block}[kind]
    first, last = start // BLOCK, -(-end // BLOCK)
    if first == last:
        return np.empty(shape, np.float32)
    values = np.concatenate([block(seed, i, a, b) for i in range(first, last)])
    return values[start - first * BLOCK : end - first * BLOCK].reshape(shape)
