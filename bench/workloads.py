"""Id streams: the rows that batches ask for. Seeds are fixed; a stream is a list of int64 batches.

- ``uniform``: all rows are equally likely, the worst case for a cache.
- ``zipf 0.9``, ``zipf 1.05``: p(k) is proportional to k^-s over all ranks k = 1..rows, by exact
  inverse CDF (a cumulative sum and a binary search). ``np.random.zipf`` is undefined for s <= 1 and
  has no upper bound, so that a modulo would fold its tail onto the hot rows.
- ``production``: the reuse inside one batch of the 2021 Meta traces (``fbgemm_t856_bs65536``).

``packed`` leaves rank k on row k-1 (hot rows share pages); ``hashed`` scatters the ranks over the
table by a multiplication modulo rows with an odd constant that is coprime to rows, a bijection.

``python -m bench.workloads`` checks the streams. Uniform: the counts of 256 equal parts of the
table are within 6 sigma. Zipf: the counts of the 100 hottest rows, and the cumulative counts at
each power of two, are within 6 sigma of the formula. Hashed: the images of all rows are all rows.
Production: the share of accesses in every bucket is within 0.005 of the published share, 47 % (+-2)
of the unique rows are accessed once, and a unique row is accessed 6.4 to 7.6 times.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

# Share of the accesses whose row occurs (bound .. next bound - 1) times in a batch. The published
# buckets are 1, 2, 3-4, 5-8, ..., 16K-32K, > 32K. The last two are merged here: in a batch of 1 M
# ids, a single row with more than 32K accesses would exceed the published share.
REUSE_BOUNDS = (1, 2, 3, *(2**k + 1 for k in range(2, 16)))
REUSE_SHARES = (
    0.069, 0.044, 0.068, 0.101, 0.121, 0.104, 0.073, 0.058,
    0.052, 0.050, 0.049, 0.048, 0.048, 0.043, 0.031, 0.042,
)  # fmt: skip
REUSE_BATCH = 1 << 20  # ids of a batch of the traces: 468 to 887 M over 856 tables
REUSE_STABLE = 9  # rows met this often in a batch keep their place from batch to batch


@lru_cache(maxsize=2)
def _zipf_cdf(rows: int, s: float, q: float) -> NDArray[np.float64]:
    cdf: NDArray[np.float64] = np.cumsum((np.arange(1, rows + 1) + q) ** -s)
    cdf /= cdf[-1]
    return cdf


def zipf(rng: np.random.Generator, rows: int, count: int, s: float, q: float = 0.0) -> Ids:
    """Return ``count`` ranks 0..rows-1 with p(rank) proportional to (rank + 1 + q)^-s."""
    return np.searchsorted(_zipf_cdf(rows, s, q), rng.random(count), side="right")


def production(rng: np.random.Generator, rows: int, count: int) -> Ids:
    """Return ``count`` ids with the published reuse; a small batch is a sample of a full one.

    Frequent rows have the same low ranks in every batch. The others are drawn anew from the rest of
    the table; otherwise every batch would find its tail in the cache.
    """
    total = 1.02 * max(
        count, REUSE_BATCH
    )  # a little too many, since rounding loses some; cut below
    parts = []
    for low, high, share in zip(REUSE_BOUNDS[:-1], REUSE_BOUNDS[1:], REUSE_SHARES, strict=True):

        def spread(n: int, low: int = low, high: int = high) -> Ids:  # n counts, log-uniform
            return (low * (high / low) ** ((np.arange(n) + 0.5) / n)).astype(np.int64)

        parts.append(spread(round(share * total / float(spread(1000).mean()))))
    times = np.concatenate(parts)[::-1]
    stable = int(np.count_nonzero(times >= REUSE_STABLE))
    if len(times) > rows:
        raise ValueError(f"{rows} rows are too few for a batch of {len(times)} unique ids")
    fresh = np.array([], np.int64)
    while len(fresh) < len(times) - stable:  # distinct rows; a second turn is rare
        fresh = np.unique(np.append(fresh, rng.integers(stable, rows, len(times))))
    fresh = rng.permutation(fresh)[: len(times) - stable]
    ids = np.repeat(np.concatenate([np.arange(stable), fresh]), times)
    return rng.permutation(ids)[:count]


def scatter(ranks: Ids, rows: int) -> Ids:
    """Place ranks as ``hashed`` does: a bijection of 0..rows-1 that separates neighbours."""
    factor = 2_654_435_761 % rows | 1  # Knuth's multiplier
    while math.gcd(factor, rows) != 1:
        factor += 2
    return ranks * factor % rows


def batches(kind: str, rows: int, count: int, how_many: int, seed: int = 1) -> list[Ids]:
    """Return batches of a stream: ``uniform``, ``zipf 1.05 hashed``, ``production packed``, ..."""
    name, *rest = kind.split()
    rng = np.random.default_rng(seed)
    if name == "uniform":
        return [rng.integers(0, rows, count) for _ in range(how_many)]
    if name == "zipf":
        result = [zipf(rng, rows, count, float(rest[0])) for _ in range(how_many)]
    else:
        turns = max(1, REUSE_BATCH // count)  # small batches are cut from one of full size
        result = []
        while len(result) < how_many:
            result += np.split(production(rng, rows, turns * count), turns)
    result = result[:how_many]
    return [scatter(ids, rows) for ids in result] if rest[-1] == "hashed" else result


def _check() -> None:
    """Assert that the streams have the properties that the docstring of this file names."""
    rows, count = 100_000, 2_000_000
    (ids,) = batches("uniform", rows, count, 1)
    parts = np.bincount(ids * 256 // rows, minlength=256)
    assert np.all(abs(parts - count / 256) < 6 * math.sqrt(count / 256)), "uniform"
    for s in (0.9, 1.05):
        (ids,) = batches(f"zipf {s} packed", rows, count, 1)
        p = np.arange(1.0, rows + 1) ** -s
        p /= p.sum()
        seen = np.bincount(ids, minlength=rows)
        assert len(seen) == rows, s
        sigma = np.sqrt(count * p * (1 - p))
        assert np.all(abs(seen - count * p)[:100] < 6 * sigma[:100]), s
        at = 2 ** np.arange(16)
        c = np.cumsum(p)[at]
        assert np.all(abs(np.cumsum(seen)[at] - count * c) < 6 * np.sqrt(count * c * (1 - c))), s
    for size in (100_000, 4_000_000, 1_789_569):
        assert len(np.unique(scatter(np.arange(size), size))) == size, size
    (ids,) = batches("production hashed", 4_000_000, REUSE_BATCH, 1)
    times = np.unique(ids, return_counts=True)[1]
    shares = np.histogram(times, REUSE_BOUNDS, weights=times)[0] / len(ids)
    assert np.all(abs(shares - np.array(REUSE_SHARES)) < 0.005), shares
    assert 0.45 < np.mean(times == 1) < 0.49, np.mean(times == 1)
    assert 6.4 < len(ids) / len(times) < 7.6, len(ids) / len(times)
    print("the uniform, zipf, hashed and production streams are as described")


if __name__ == "__main__":
    _check()
