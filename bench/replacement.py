"""Replacement: the reads that a policy of eviction saves if the ids of coming batches are known.

The reads are simulated, so they are the same on every machine. The table has 1 GiB in pages of 4
KiB and batches have 4096 ids: a sixteenth of a table of 16 GiB with batches of 65536. For uniform
ids the scale does not matter; a Zipf distribution over more rows has a somewhat longer tail. All
pages of a batch are in memory together, because a step writes the rows that the gather read. A
policy gives every page a number; pages outside the batch leave memory in falling order of it:

- ``LRU``: batches since the last use. Lookahead over the page cache comes close to it.
- ``hot set``: the rarity of past uses. The hottest pages stay, as if locked.
- ``h ahead``: Belady's rule, the farthest next use, if the next h batches are known. Pages without
  a known use leave first, the least recently used ones first; in ``h + hot``, the rarest ones.
- ``all known``: the next 512 batches, 8 ids for each page of the table. ``enough`` is the number of
  known batches that suffices; above 512, still more would help.
- ``grouped 64``: each page once in 64 batches, as if their ids were sorted by page.

Each policy starts in its steady state. A cell is the share of a batch's distinct pages that are
read.

The cost of a hint about one page is measured, and compared with the cost of reading it. The file is
in the temporary folder (``TMPDIR``), which must be on the disk in question.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench import workloads
from bench.harness import Row, check

QUESTION = (
    "How many pages does a batch read if known ids choose the pages to evict, compared with the "
    "least recently used; and what does a hint cost?"
)
Ints = NDArray[np.int64]
Policy = Callable[[Ints, Ints, Ints], Ints]  # arguments: age, batches to the next use, past uses

PAGE = 4096
PAGES = 1 << 18
BATCH = 4096
PAST = 512  # batches that only set the start
WARM = 32  # batches that are simulated but not reported
SHOWN = 96
FUTURE = 512  # batches that are known but not simulated
FAR = 1 << 20  # batches: no known use
KINDS = ("uniform", "zipf 0.9 hashed", "zipf 0.9 packed", "zipf 1.05 hashed", "zipf 1.05 packed")
ROW_BYTES = {256: "256 B", 768: "768 B"}  # 64 floats; 64 floats with the two states of Adam
RATIOS = (2, 4, 8, 16)

HINTED = 8192  # pages of a measurement: a tenth of a second of reading
WILLNEED, COLD, PAGEOUT = 3, 20, 21  # of Linux's mman.h
RANGES = 64  # pages per call of process_madvise, system call 440
WRITE, WAIT = 2, 4  # of sync_file_range


def _ahead(horizon: int, hot: bool = False) -> Policy:
    def policy(age: Ints, ahead: Ints, uses: Ints) -> Ints:
        return np.where(ahead <= horizon, ahead, FAR - uses if hot else FAR + age)

    return policy


POLICIES: dict[str, Policy] = {
    "LRU": lambda age, ahead, uses: age,
    "hot set": lambda age, ahead, uses: -uses,
    "8 ahead": _ahead(8),
    "8 + hot": _ahead(8, hot=True),
    "64 ahead": _ahead(64),
    "all known": _ahead(FAR - 1),
}


@dataclass(frozen=True)
class Trace:
    """Distinct pages of batches 0, 1, ..., and the uses of each page before batch 0."""

    batches: Sequence[Ints]
    following: Sequence[Ints]  # the batch of the next use of each page of each batch
    last: Ints  # the batch of the last use of each page of the table, negative
    first: Ints  # the batch of its first use from batch 0 on
    uses: Ints


def link(batches: Sequence[Ints], last: Ints, uses: Ints) -> Trace:
    """Find the next use of every page, backwards from the last batch."""
    first = np.full(len(last), FAR)
    following = []
    for at in range(len(batches) - 1, -1, -1):
        following.append(first[batches[at]])
        first[batches[at]] = at
    return Trace(batches, following[::-1], last, first, uses)


def trace(kind: str, row_bytes: int) -> Trace:
    """Return the batches of a stream of ``workloads.py`` as pages."""
    streams = workloads.batches(
        kind, PAGES * PAGE // row_bytes, BATCH, PAST + WARM + SHOWN + FUTURE
    )
    pages = []
    for ids in streams:
        first, last = ids * row_bytes // PAGE, (ids * row_bytes + row_bytes - 1) // PAGE
        pages.append(np.unique(np.concatenate([first, last])))  # some rows of 768 B span two pages
    used = (
        -PAST - 1 - np.random.default_rng(0).permutation(PAGES)
    )  # pages without a use, in any order
    uses = np.zeros(PAGES, np.int64)
    for at, batch in enumerate(pages[:PAST]):
        used[batch] = at - PAST
        uses[batch] += 1
    return link(pages[PAST:], used, uses)


def steady(t: Trace, memory: int, policy: Policy) -> Ints:
    """Return the pages that a policy keeps in memory before batch 0.

    For a page with a known next use, the whole time between its uses counts, and not the rest of
    it: Belady's rule evicts a page with a long pause at the start of the pause.
    """
    order = np.argpartition(policy(-t.last, t.first - t.last, t.uses), memory)
    return order[:memory]


def reads(t: Trace, resident: Ints, policy: Policy, start: int, stop: int) -> float:
    """Return the pages that a batch reads, on average over batches start .. stop-1."""
    memory, total = len(resident), 0
    last, following, uses = t.last.astype(np.int32), t.first.astype(np.int32), t.uses
    inside = np.zeros(len(last), np.bool_)
    inside[resident] = True
    for at in range(stop):
        pages = t.batches[at]
        missing = pages[~inside[pages]]
        total += len(missing) if at >= start else 0
        last[pages], following[pages] = at, t.following[at]
        inside[missing] = True
        held = np.concatenate([resident, missing])
        key = policy(at - last[held], following[held] - at, uses[held])
        key[last[held] == at] = -FAR * 2  # this batch's pages stay
        order = np.argpartition(key, memory - 1)
        resident = held[order[:memory]]
        inside[held[order[memory:]]] = False
    return total / (stop - start)


def _check_simulation() -> None:
    """Check the reference string of textbooks on operating systems: LRU reads 12, the best 9."""
    pages = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
    last = np.full(11, -1)
    t = link([np.array([page]) for page in pages], last, np.zeros(11, np.int64))
    for name, expected in (("LRU", 12), ("all known", 9)):
        found = reads(t, np.array([8, 9, 10]), POLICIES[name], 0, 20)  # three pages without a use
        check(f"the simulation of {name}", found * 20 == expected)


def _simulate(
    kind: str, row_bytes: int, ratios: Sequence[int], emit: Callable[[Row], None]
) -> None:
    t = trace(kind, row_bytes)
    stop = WARM + SHOWN
    accessed = sum(len(batch) for batch in t.batches[WARM:stop]) / SHOWN
    once = len(np.unique(np.concatenate(t.batches[WARM : WARM + 64]))) / 64
    for ratio in ratios:
        memory = PAGES // ratio
        found = {
            name: reads(t, steady(t, memory, policy), policy, WARM, stop)
            for name, policy in POLICIES.items()
        }
        check(f"{kind} {ratio}: Belady's rule", found["all known"] <= 1.01 * min(found.values()))
        enough = int(np.partition(t.first - t.last, memory)[memory])
        case = {"ids": kind, "row": ROW_BYTES[row_bytes], "table / memory": ratio}
        cells = {"pages a batch": f"{accessed:.0f}"}
        cells |= {name: f"{100 * n / accessed:.1f} %" for name, n in found.items()}
        cells["LRU / 64 ahead"] = f"{found['LRU'] / found['64 ahead']:.2f}×"
        cells["LRU / all known"] = f"{found['LRU'] / found['all known']:.2f}×"
        cells["enough"] = f"{enough}" if enough <= FUTURE else f"> {FUTURE}"
        cells["grouped 64"] = f"{100 * once / accessed:.1f} %"
        emit(Row("reads", dict(case), cells, data={"reads": found, "pages": accessed}))


class _File:
    """A mapped file of random bytes on the disk, and hints about its pages."""

    def __init__(self, path: Path, pages: int) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.sync_file_range.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 2, ctypes.c_uint]
        self.libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        path.write_bytes(np.random.default_rng(0).bytes(pages * PAGE))
        self.fd = os.open(path, os.O_RDWR)
        os.fsync(self.fd)
        # The page cache has a written file in large folios, which ignore a hint about one page.
        # Read again, without readahead, it is in single pages, like the file of a running table.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.map = mmap.mmap(self.fd, pages * PAGE)
        self.map.madvise(mmap.MADV_RANDOM)
        self.bytes = np.frombuffer(self.map, np.uint8)[::PAGE]
        self.pidfd = os.pidfd_open(os.getpid())

    def resident(self, pages: Ints) -> float:
        """Return the share of these pages that is in memory."""
        bits = np.zeros(len(self.bytes), np.uint8)
        self.libc.mincore(self.bytes.ctypes.data, len(self.map), bits.ctypes.data)
        return float(np.mean(bits[pages] & 1))

    def advise(self, pages: Ints, advice: int) -> None:
        """Call madvise for each page."""
        madvise = self.libc.madvise
        for address in (self.bytes.ctypes.data + pages * PAGE).tolist():
            if madvise(address, PAGE, advice):
                raise OSError(ctypes.get_errno(), f"madvise {advice} is refused")

    def advise_many(self, pages: Ints, advice: int) -> None:
        """Call process_madvise once for 64 pages."""
        ranges = np.full((len(pages), 2), PAGE, np.uint64)  # struct iovec
        ranges[:, 0] = self.bytes.ctypes.data + pages * PAGE
        for at in range(0, len(pages), RANGES):
            some = ranges[at : at + RANGES]
            pointer, count = ctypes.c_void_p(some.ctypes.data), ctypes.c_size_t(len(some))
            if self.libc.syscall(440, self.pidfd, pointer, count, advice, 0) < 0:
                raise OSError(ctypes.get_errno(), f"process_madvise {advice} is refused")

    def write_back(self, pages: Ints) -> None:
        """Start to write each page, then wait for all."""
        for page in np.sort(pages).tolist():
            self.libc.sync_file_range(self.fd, page * PAGE, PAGE, WRITE)
        self.libc.sync_file_range(self.fd, 0, 0, WAIT)

    def close(self) -> None:
        """Close the descriptors; the mapping ends with its last view."""
        os.close(self.pidfd)
        os.close(self.fd)


def _hints(emit: Callable[[Row], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="pyembed-bench-") as folder:
        file = _File(Path(folder, "hints.tmp"), 3 * HINTED)
        clean, many, dirty = np.random.default_rng(1).permutation(3 * HINTED).reshape(3, HINTED)

        def access(pages: Ints, write: bool = False) -> None:
            file.advise_many(pages, WILLNEED)
            if write:
                file.bytes[pages] += 1
            else:
                file.bytes[pages].sum()

        def row(what: str, pages: Ints, call: Callable[[], None]) -> None:
            start = time.perf_counter()
            try:
                call()
                cost = (time.perf_counter() - start) / HINTED
                cells = {"a page": f"{1e6 * cost:.1f} µs"}
                cells["then in memory"] = f"{100 * file.resident(pages):.0f} %"
            except OSError as error:
                cells = {"a page": str(error.strerror)}
            emit(Row("hints", {"what": what}, cells))

        row("read, 64 requested per call, then accessed", clean, lambda: access(clean))
        access(many)
        row("COLD, 64 a call", clean, lambda: file.advise_many(clean, COLD))
        row("PAGEOUT, one a call", clean, lambda: file.advise(clean, PAGEOUT))
        row("PAGEOUT, 64 a call", many, lambda: file.advise_many(many, PAGEOUT))
        access(dirty, write=True)
        row("write back, one a call", dirty, lambda: file.write_back(dirty))
        row("PAGEOUT after it, 64 a call", dirty, lambda: file.advise_many(dirty, PAGEOUT))
        access(many, write=True)
        row("PAGEOUT of changed pages, 64 a call", many, lambda: file.advise_many(many, PAGEOUT))
        row("write back after it", many, lambda: file.write_back(many))
        row("and PAGEOUT again", many, lambda: file.advise_many(many, PAGEOUT))
        file.close()


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Simulate every case, then measure the hints."""
    _check_simulation()
    for row_bytes in (256,) if quick else ROW_BYTES:
        for kind in ("uniform", "zipf 1.05 hashed") if quick else KINDS:
            _simulate(kind, row_bytes, (8,) if quick else RATIOS, emit)
    _hints(emit)
