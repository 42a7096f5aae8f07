"""The page cache of a mapped table: how much is in memory, a limit to keep, early write-back.

The system decides which pages of a file stay in memory, for all programs on the machine. A table
can say how much of it is there, evict pages above a limit, and begin to write dirty pages early,
in small portions, so that no step waits for gigabytes of them.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pyembed import _cgroup, _core
from pyembed._checks import F32
from pyembed.errors import ArgumentError, DTypeError
from pyembed.storage.fs import File
from pyembed.storage.npy import HEADER_BYTES

POLL_SECONDS = 0.1  # between two checks; at 80,000 pages a second 32 MB are read in this time
SLICE_BYTES = 32 << 20  # bytes evicted by one call
WRITE_SLICE_BYTES = 64 << 20  # bytes of the file that one call searches for dirty pages
MIN_LIMIT = 1 << 20
NEAR = 0.75  # share of the dirty pages at which the system begins to write by itself


@dataclass(frozen=True)
class Stats:
    """How much of a table is in memory, and how its batches found it.

    Attributes
    ----------
    nbytes : int
        Bytes of all rows.
    resident_bytes, dirty_bytes : int or None
        Bytes in the page cache, whichever program read them; and those that are not written yet.
        None where the system does not say (Linux before 6.5).
    cold_batches, cold_rows : int
        Number of calls that found rows missing, and of rows that they named.
    pages_asked : int
        Number of ranges of pages that were read ahead of use.
    hit_rate : float
        Share of the rows of these calls that were in memory, from a sample of 64 rows per call.
    bytes_read, bytes_written : int or None
        By this process, for all its files together, since the table was opened.
    """

    nbytes: int
    resident_bytes: int | None
    dirty_bytes: int | None
    cold_batches: int
    cold_rows: int
    pages_asked: int
    hit_rate: float
    bytes_read: int | None
    bytes_written: int | None

    def __str__(self) -> str:
        """Return a short text for a progress bar.

        >>> print(in_memory(4096))
        100 % in memory
        """
        if self.resident_bytes is None:
            return f"{self.hit_rate:.0%} hits"
        share = min(1.0, self.resident_bytes / self.nbytes) if self.nbytes else 1.0
        missed = f", {self.hit_rate:.0%} hits" if self.cold_batches else ""
        return f"{100 * share:.0f} % in memory{missed}"


def write_back_is_near() -> bool:
    """Whether the system is about to write dirty pages by itself; False if that is unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return False
    pages = dict(line.split() for line in lines)
    threshold = int(pages.get("nr_dirty_background_threshold", 0))
    return int(pages.get("nr_dirty", 0)) > NEAR * threshold > 0


def memory_bytes() -> int:
    """Return what this process may use: the machine's memory, or the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup.memory_limit()
    return total if limit is None else min(total, limit)


def limit_bytes(memory_limit: int | float | None) -> int | None:
    """Return a limit in bytes, given in bytes or as a share of the memory.

    >>> limit_bytes(1 << 30)
    1073741824

    Raises
    ------
    DTypeError, ArgumentError
    """
    if memory_limit is None:
        return None
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, (int, float)):
        kind = type(memory_limit).__name__
        raise DTypeError(f"memory_limit = {memory_limit!r} is a {kind}; allowed: bytes or a share")
    if isinstance(memory_limit, float):
        if not 0 < memory_limit <= 1:
            raise ArgumentError(
                f"memory_limit = {memory_limit}; allowed: a share in (0, 1], or bytes as an integer"
            )
        return int(memory_limit * memory_bytes())
    if memory_limit < MIN_LIMIT:
        raise ArgumentError(f"memory_limit = {memory_limit} bytes; allowed: {MIN_LIMIT} or more")
    return memory_limit


def process_io() -> tuple[int, int] | None:
    """Return the bytes that this process read from disks and wrote; None if they are unknown."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(": ") for line in lines)
    return int(found["read_bytes"]), int(found["write_bytes"])


class PageCache:
    """Evicts and writes the pages of one mapped file, on a thread that exists only when needed.

    It begins to write dirty pages early while a table is trained that does not fit into memory, and
    keeps the resident pages near a limit. Both change time, never results.

    Parameters
    ----------
    file : File
        Stays open until `close` returns, unless the thread itself closes the table.
    rows : float32 array of shape (rows, stride)
        The mapping.
    limit : int or None
        Bytes that may stay resident.
    writable : bool
        Whether dirty pages of the mapping reach the file.

    Attributes
    ----------
    pages : Pages
        What the kernels know of the pages.
    """

    def __init__(self, file: File, rows: F32, limit: int | None, writable: bool) -> None:
        self.pages = _core.Pages()
        self.rows = rows
        self.limit = limit
        self._file = file
        self._writable = writable
        self._io = process_io()
        self._requested = 0  # `pages.requested` at the last check
        self._hand = self._written = 0  # the clock hand: the next row to evict; the next byte
        self._stop = threading.Event()
        self._below_dirty_limit = threading.Event()
        self._below_dirty_limit.set()
        self._thread: threading.Thread | None = None
        if limit is not None:
            self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="pyembed-pages", daemon=True)
        self._thread.start()

    def before_change(self) -> None:
        """Start the thread if pages had to be read, as the dirty ones will have to be written.

        Wait while the dirty pages exceed the dirty limit, a quarter of the memory limit.
        """
        if self._thread is None and self.pages.requested and not self._stop.is_set():
            self._start()
        self._below_dirty_limit.wait()

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS if self._below_dirty_limit.is_set() else 0):
                if self.limit is not None:
                    self._keep_below(self.limit)
                if self._writable and (
                    self.pages.requested != self._requested or not self._below_dirty_limit.is_set()
                ):
                    self._requested = self.pages.requested
                    self._write_back()
        finally:
            self._below_dirty_limit.set()

    def _write_back(self) -> None:
        """Begin to write dirty pages for a while, slice by slice, from where the last one ended."""
        end = time.monotonic() + POLL_SECONDS
        size = self._file.size
        while time.monotonic() < end and not self._stop.is_set():
            at = self._written
            if not self._file.system.start_write_back(self._file.fd, at, WRITE_SLICE_BYTES):
                return
            self._written = (self._written + WRITE_SLICE_BYTES) % max(size, 1)

    def _keep_below(self, limit: int) -> None:
        found = self._file.system.cached_pages(self._file.fd)
        if found is None:
            self._stop.set()  # the system does not say how many pages are resident
            return
        resident, dirty = found[0] * mmap.PAGESIZE, found[1] * mmap.PAGESIZE
        if dirty > limit // 4:
            self._below_dirty_limit.clear()
        else:
            self._below_dirty_limit.set()
        if resident > limit and self.rows.size:
            self._evict((resident - limit) / resident)

    def _evict(self, share: float) -> None:
        """Evict a share of the pages, by a clock hand that sweeps the table."""
        rows = self.rows
        step = max(1, SLICE_BYTES // (4 * rows.shape[1]))
        left = int(rows.shape[0] * share) + 1  # assuming that the pages are evenly spread
        while left > 0 and not self._stop.is_set():
            end = min(self._hand + min(step, left), rows.shape[0])
            _core.page_out(rows[self._hand : end])
            # page_out sees mapped pages alone, and unmaps dirty ones instead of freeing them.
            first, size = self._hand * 4 * rows.shape[1], (end - self._hand) * 4 * rows.shape[1]
            self._file.system.advise(self._file.fd, HEADER_BYTES + first, size, "dontneed")
            left -= end - self._hand
            self._hand = end % rows.shape[0]

    def stats(self) -> Stats:
        """Return the numbers of this moment."""
        found, io, pages = self._file.system.cached_pages(self._file.fd), process_io(), self.pages
        read = wrote = None
        if io is not None and self._io is not None:
            read, wrote = io[0] - self._io[0], io[1] - self._io[1]
        return Stats(
            nbytes=self.rows.nbytes,
            resident_bytes=None if found is None else found[0] * mmap.PAGESIZE,
            dirty_bytes=None if found is None else found[1] * mmap.PAGESIZE,
            cold_batches=pages.batches,
            cold_rows=pages.rows,
            pages_asked=pages.requested,
            hit_rate=pages.found / pages.sampled if pages.sampled else 1.0,
            bytes_read=read,
            bytes_written=wrote,
        )

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def in_memory(nbytes: int) -> Stats:
    """Return the numbers of a table that no file backs."""
    return Stats(nbytes, nbytes, 0, 0, 0, 0, 1.0, None, None)
