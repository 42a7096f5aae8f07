"""The kernels in plain numpy: slow, obvious, and the specification of `_core`.

Every function has the name and the meaning of its twin, and gives the same bits: each arithmetic
step is one float32 operation of numpy, in the order in which the kernel does it. Tests compare
for equality. Nothing in the library calls this file.

Legend: n ids, u unique rows, d floats of a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

BLOCK = 64  # floats of one block of random numbers
LANES = 16


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


def sum_groups(rows: I64, starts: I64, order: I64, grad: F32, scale_by_count: bool = False) -> F32:
    """out[u] = sum of grad[p] for p in group u, in position order; times 1 / count if scaled."""
    out = np.empty((rows.size, grad.shape[-1]), np.float32)
    for u in range(rows.size):
        positions = order[starts[u] : starts[u + 1]]
        out[u] = grad[positions[0]]
        for p in positions[1:]:
            out[u] += grad[p]
        if scale_by_count and positions.size > 1:
            out[u] *= np.float32(1) / np.float32(positions.size)
    return out


def add_groups(column: F32, rows: I64, sums: F32, alpha: float, skip_row: int = -1) -> None:
    """column[rows[u]] += alpha * sums[u]"""
    for row, total in zip(rows, sums, strict=True):
        if row != skip_row:
            column[row] += np.float32(alpha) * total


def update(
    columns: tuple[F32, ...],
    rows: I64,
    sums: F32,
    name: str,
    hyper: tuple[float, float, float, float],
    skip_row: int = -1,
) -> None:
    """One optimizer step on the unique rows, given the sum of each row's gradients."""
    lr, eps, one_minus_b1, one_minus_b2 = map(np.float32, hyper)
    keep = rows != skip_row
    r, g = rows[keep], sums[keep]
    if name == "sgd":
        (w,) = columns
        w[r] -= lr * g
    elif name == "adagrad":
        w, s = columns
        s[r] += g * g
        w[r] -= lr * (g / (np.sqrt(s[r]) + eps))
    elif name == "adam":
        w, m, v = columns
        m[r] += (g - m[r]) * one_minus_b1
        v[r] += (g * g - v[r]) * one_minus_b2
        w[r] -= lr * (m[r] / (np.sqrt(v[r]) + eps))
    else:
        raise ValueError(name)


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
