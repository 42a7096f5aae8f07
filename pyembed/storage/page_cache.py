"""How much of a mapped table is in memory: numbers, a limit to keep, changes written in time.

The system decides which pages of a file stay in memory, for all that runs on the machine. What a
table can do is: say how much of it is there, give pages back above a limit, and begin to write
what was changed early, in small portions, so that no step waits for gigabytes of them.
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

POLL_SECONDS = 0.1  # between two looks; at 80,000 pages a second 32 MB have come in
SLICE_BYTES = 32 << 20  # given back by one call
WRITE_SLICE_BYTES = 64 << 20  # of the file, looked through for changes by one call
MIN_LIMIT = 1 << 20
NEAR = 0.75  # share of the dirty pages at which the system begins to write by itself


@dataclass(frozen=True)
class Stats:
    """What a table has in memory, and what its batches found there.

    Attributes
    ----------
    nbytes : int
        All rows.
    resident_bytes, dirty_bytes : int or None
        In the page cache, whoever brought it there; and of that, not written yet. None where the
        system does not say (Linux before 6.5).
    cold_batches, cold_rows : int
        Calls that found rows missing, and the rows that they named.
    pages_asked : int
        Ranges of pages that were asked for ahead of use.
    hit_rate : float
        Share of those calls' rows that were in memory, from a sample of 64 rows a call.
    bytes_read, bytes_written : int or None
        By this process, all its files together, since the table was opened.
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
        """For a progress bar.

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
    """The bytes that this process may use: the machine's memory, limited by its control groups."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, _cgroup.memory_limit() or total)


def limit_bytes(memory_limit: int | float | None) -> int | None:
    """A limit in bytes, from bytes or from a share of the memory.

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
    """(bytes read from disks, bytes sent to be written) by this process; None if unknown."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    found = dict(line.split(": ") for line in lines)
    return int(found["read_bytes"]), int(found["write_bytes"])


class PageCache:
    """Looks after the pages of one open file: a helper thread, which exists only when needed.

    It begins to write changes while a table is trained that does not fit into memory, and keeps
    the resident pages near a limit. Both change time, never results.

    Parameters
    ----------
    file : File
        A duplicate of its descriptor is used.
    rows : float32 array of shape (rows, stride)
        The mapping.
    limit : int or None
        Bytes that may stay resident.
    """

    def __init__(self, file: File, rows: F32, limit: int | None, writable: bool) -> None:
        self.pages = _core.Pages()
        self.rows = rows
        self.limit = limit
        self._file = File(file.system, file.system.duplicate(file.fd), file.path)
        self._writable = writable
        self._io = process_io()
        self._asked = 0  # pages, at the last look
        self._hand = self._written = 0  # the next row to give back; the next byte to write
        self._stop = threading.Event()
        self._room = threading.Event()  # for more changes, below the limit
        self._room.set()
        self._thread: threading.Thread | None = None
        if limit is not None:
            self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="pyembed-pages", daemon=True)
        self._thread.start()

    def before_change(self) -> None:
        """Rows are about to change: if they had to be read first, they will have to be written.

        Waits while a quarter of the limit is taken by changes that are not written yet.
        """
        if self._thread is None and self.pages.asked and not self._stop.is_set():
            self._start()
        self._room.wait()

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS if self._room.is_set() else 0):
                if self.limit is not None:
                    self._keep_below(self.limit)
                if self._writable and (self.pages.asked != self._asked or not self._room.is_set()):
                    self._asked = self.pages.asked
                    self._write_back()
        finally:
            self._room.set()

    def _write_back(self) -> None:
        """Begin to write changes for a while, slice by slice, from where the last look ended."""
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
            self._stop.set()  # a system that does not say: there is nothing to go by
            return
        resident, dirty = found[0] * mmap.PAGESIZE, found[1] * mmap.PAGESIZE
        if dirty > limit // 4:
            self._room.clear()
        else:
            self._room.set()
        if resident > limit and self.rows.size:
            self._give_back((resident - limit) / resident)

    def _give_back(self, share: float) -> None:
        """Take a share of the pages out of memory, from where the hand of the clock stands."""
        rows = self.rows
        step = max(1, SLICE_BYTES // (4 * rows.shape[1]))
        left = int(rows.shape[0] * share) + 1  # the pages lie evenly spread
        while left > 0 and not self._stop.is_set():
            end = min(self._hand + min(step, left), rows.shape[0])
            _core.page_out(rows[self._hand : end])
            # That sees mapped pages alone, and unmaps changed ones instead of freeing them.
            first, size = self._hand * 4 * rows.shape[1], (end - self._hand) * 4 * rows.shape[1]
            self._file.system.advise(self._file.fd, HEADER_BYTES + first, size, "dontneed")
            left -= end - self._hand
            self._hand = end % rows.shape[0]

    def stats(self) -> Stats:
        """The numbers of this moment."""
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
            pages_asked=pages.asked,
            hit_rate=pages.found / pages.sampled if pages.sampled else 1.0,
            bytes_read=read,
            bytes_written=wrote,
        )

    def close(self) -> None:
        """End the thread, and let go of the file."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._file.close()


def in_memory(nbytes: int) -> Stats:
    """The numbers of a table that no file backs."""
    return Stats(nbytes, nbytes, 0, 0, 0, 0, 1.0, None, None)
