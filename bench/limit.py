"""The measured limit: how fast the memory or the disk lets any library be.

This module compiles ``limit.c`` into a temporary folder with the machine's own compiler and calls
it through ctypes, so that the limit runs in the same process and minute, with the same threads and
memory as the contenders. It tries each variant (prefetch distance, plain or streaming stores) on
the case itself and keeps the fastest. Without a compiler there is no limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np

from bench.harness import THREADS, Array, Contender

PREFETCH_ROWS = (0, 8, 16, 32, 64, 128)  # 128 wins for rows of one cache line, 32 for long ones
SMALL = 4096  # ids: fewer cost more for the call than for memory; for this many, try one thread too
BLOCK = 16 << 20  # bytes of a disk write: larger ones were not faster


@cache
def _library() -> ctypes.CDLL | str:
    """Return the compiled loops, or the reason why there are none."""
    source = Path(__file__).with_name("limit.c")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/limit.so"
        command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-fopenmp", "-shared"]
        command += ["-fPIC", str(source), "-o", target]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            return "no C compiler"
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"limit.c does not compile:\n{error.stderr}") from error
        library = ctypes.CDLL(target)
    p, i = c_void_p, c_int64
    library.limit_gather.argtypes = [p, p, i, p, i, i, i, c_int, i, c_int, i]
    library.limit_fill.argtypes = [p, i, c_int, c_int, i]
    library.limit_update.argtypes = [p, i, i, p, p, p, p, i, i, i, p, c_int, i, *[c_float] * 2, i]
    return library


def _pointers(arrays: Sequence[Array]) -> ctypes.Array[c_void_p]:
    return (c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])


def _fastest(variants: Sequence[Callable[[int], None]]) -> Callable[[int], None]:
    """Return the variant with the shortest of three passes, after one that warms up."""

    def shortest(run: Callable[[int], None]) -> int:
        times = []
        for _ in range(3):
            start = time.perf_counter_ns()
            run(1)
            times.append(time.perf_counter_ns() - start)
        return min(times)

    variants[0](1)
    return min(variants, key=shortest)


def gather(out: Array, weight: Array, batches: Sequence[Array]) -> Contender:
    """Return a contender that copies ``weight[ids]`` into ``out`` for each int64 batch of ids."""
    n, dim = out.shape
    library = _library() if n >= SMALL else "the call"
    if isinstance(library, str):
        return Contender("limit", absent=library)
    streams = (0, 1) if dim % 4 == 0 and out.ctypes.data % 16 == 0 else (0,)
    memory = (out.ctypes.data, weight.ctypes.data, weight.strides[0] // 4)
    case = (*memory, _pointers(batches), len(batches), n, dim)
    teams = {1, THREADS} if n <= SMALL else {THREADS}
    variants = [
        partial(library.limit_gather, *case, *v) for v in product(teams, PREFETCH_ROWS, streams)
    ]
    return Contender("limit", inputs=batches, run=_fastest(variants))


def fill(array: Array) -> Contender:
    """Return a contender that stores 1.0 into every float of ``array``, made by ``aligned``."""
    library = _library()
    if isinstance(library, str):
        return Contender("limit", absent=library)
    case = (array.ctypes.data, array.size, THREADS)
    variants = [partial(library.limit_fill, *case, stream) for stream in (0, 1)]
    return Contender("limit", inputs=(array,), run=_fastest(variants))


def update(weight: Array, columns: int, batches: Sequence[Array], grad: Array) -> Contender:
    """Return a contender that reads ``grad`` and rewrites ``columns * dim`` floats of each row.

    The columns follow the weight in the row. The ids are grouped in advance, at no cost to the
    limit. Rows keep their values.
    """
    library = _library() if len(grad) >= SMALL else "the call"
    if isinstance(library, str):
        return Contender("limit", absent=library)
    groups = []
    for ids in batches:
        rows, counts = np.unique(ids, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        groups.append((rows, starts, np.argsort(ids, kind="stable")))
    memory = (weight.ctypes.data, weight.strides[0] // 4, columns)
    pointers = [_pointers(arrays) for arrays in zip(*groups, strict=True)]
    sizes = (c_int64 * len(groups))(*[len(rows) for rows, _, _ in groups])
    values = grad.ctypes.data_as(c_void_p)  # keeps the array alive
    case = (*memory, *pointers, sizes, len(batches), len(grad), grad.shape[1], values)
    teams = {1, THREADS} if len(grad) <= SMALL else {THREADS}
    variants = [
        partial(library.limit_update, *case, team, ahead, 1.0, 0.0)
        for team, ahead in product(teams, PREFETCH_ROWS)
    ]
    return Contender("limit", inputs=groups, run=_fastest(variants))


def disk_write_rate(folder: Path, size: int, writers: int) -> float:
    """Return the bytes/s of sequential O_DIRECT writes into a new file, with a final fdatasync."""
    path = folder / "disk-limit.tmp"
    block = mmap.mmap(-1, BLOCK)  # page-aligned, as O_DIRECT requires
    block.write(np.random.default_rng(0).bytes(BLOCK))  # random: some disks store zeros for free
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError as error:
        raise SystemExit(
            f"{folder} supports no O_DIRECT writes ({error.strerror}): set TMPDIR to a folder on "
            "the disk to measure"
        ) from error
    try:
        os.posix_fallocate(fd, 0, size)
        start = time.perf_counter()
        with ThreadPoolExecutor(writers) as pool:
            written = sum(pool.map(lambda at: os.pwrite(fd, block, at), range(0, size, BLOCK)))
        os.fdatasync(fd)
        return written / (time.perf_counter() - start)
    finally:
        os.close(fd)
        path.unlink()
