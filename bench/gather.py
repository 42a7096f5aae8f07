"""Gather: every library copies rows of the same table in memory into an array.

Each contender cycles through the same batches of ids. A cycle reads about 256 MB of rows, so that
no batch finds its rows in the cache from its previous use. N = 1 and 64 stay cached: they measure
the call. Rows that differ from ``weight[ids]`` in one bit stop the benchmark.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from bench import limit, peers, workloads
from bench.harness import THREADS, Array, Bar, Contender, Row, aligned, check, timed_row

QUESTION = "How fast is gather, compared with every peer and with the limit of the memory?"
TABLE = "gather"
DIMS = (16, 64, 100, 128, 256, 300)
SIZES = (1, 64, 4096, 65536, 1_000_000)
LARGE = (4096, 65536, 1_000_000)
STREAMS = ("uniform", "zipf 0.9 hashed", "zipf 1.05 hashed")
MORE_STREAMS = ("zipf 0.9 packed", "zipf 1.05 packed", "production hashed", "production packed")
OUT, FRESH, FULL = "pyembed out=", "pyembed fresh", "torch F.embedding"
BARS = (
    Bar(TABLE, {"N": LARGE}, OUT, "best peer", 1.0),
    Bar(TABLE, {"N": LARGE}, OUT, "limit", 0.9),
    Bar(TABLE, {"N": (1_000_000,), "dim": (64,)}, FRESH, FULL, 2.0),
    Bar(TABLE, {"N": (1,), "dim": (64,)}, FRESH, FULL, 2.0),
    Bar(TABLE, {"N": (1_000_000,), "dim": (64,), "ids": ("uniform",)}, OUT, 0.017, 1.0),
)


def _cases(quick: bool) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield (dim, [(N, stream)]): the cases that share a table."""
    if quick:
        yield 64, [*((n, "uniform") for n in SIZES), (65536, STREAMS[2])]
        yield 300, [(65536, "uniform")]
        return
    for dim in DIMS:
        cases = [(n, stream) for n in LARGE for stream in STREAMS]
        if dim == 64:
            cases = [(1, "uniform"), (64, "uniform"), *cases]
            cases += [(65536, stream) for stream in MORE_STREAMS]
        yield dim, cases


def _inference() -> AbstractContextManager[Any]:
    torch = peers.torch()
    return nullcontext() if isinstance(torch, str) else torch.no_grad()


def _contenders(table: Any, weight: Array, n: int, batches: list[Array]) -> list[Contender]:
    """Return all contenders, each checked on the first and the last batch."""
    out = aligned((n, weight.shape[1]))
    found = [
        Contender(OUT, partial(table.gather, out=out), batches),
        Contender(FRESH, table.gather, batches),
        *peers.gathers(weight, out, batches),
        limit.gather(out, weight, batches),
    ]
    for c in found:
        for i in {0, len(batches) - 1}:
            if c.call is None:
                continue
            out.fill(np.nan)
            result = c.call(c.inputs[i])
            check(c.name, np.array_equal(np.asarray(result), weight[batches[i]]))
    if not found[-1].absent and found[-1].run is not None:
        out.fill(np.nan)
        found[-1].run(1)
        check("limit", np.array_equal(out, weight[batches[-1]]))
    return found


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Measure every case and emit its row."""
    import pyembed

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    for dim, cases in _cases(quick):
        rows = min(4_000_000, (2 << 30) // (4 * dim))
        weight = aligned((rows, dim))
        np.random.default_rng(0).random(dtype=np.float32, out=weight)
        table = pyembed.Table.from_array(weight, num_threads=THREADS)
        for n, stream in cases:
            how_many = min(512, max(1, ((128 if quick else 256) << 20) // (n * dim * 4)))
            batches = workloads.batches(stream, rows, n, how_many)
            case = {"N": n, "dim": dim, "rows": f"{rows / 1e6:.3g} M", "ids": stream}
            with _inference():
                contenders = _contenders(table, weight, n, batches)
                emit(timed_row(TABLE, case, contenders, BARS, rounds=5 if quick else 7))
