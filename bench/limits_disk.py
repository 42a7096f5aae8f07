"""The limits of a run on disk: a memory group, an empty page cache, the disk's own rate of reads.

A memory group is a cgroup of its own, of version 1 or 2, at the root of the hierarchy, with a limit
that page cache counts towards. Both versions charge a page to the group that brought it in, so a
process that joins after its imports has the limit for its table and batches alone. The disk's rate
is that of fio with io_uring, O_DIRECT, 128 reads of 4 KiB under way, on the file in question.

It refuses to guess: what cannot be made or measured raises `Unavailable`, whose text goes into the
cells of the report.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Array

PAGE = mmap.PAGESIZE
DEPTH = 128  # reads under way
EMPTY = 0.01  # of a file may stay in the page cache, and the cache still counts as empty


class Unavailable(Exception):
    """Why a limit can be neither made nor measured here."""


@dataclass(frozen=True)
class _Version:
    """The names of one version of the memory controller."""

    limit: str
    no_swap: tuple[str, str]  # file and value
    anonymous: str  # the line of memory.stat


_V1 = _Version("memory.limit_in_bytes", ("memory.swappiness", "0"), "rss")
_V2 = _Version("memory.max", ("memory.swap.max", "0"), "anon")


def _root() -> tuple[Path, _Version]:
    """Where memory groups are made, and how their files are called."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(folder), _V1
    for _, folder, kind, *_ in mounts:
        controllers = Path(folder, "cgroup.controllers")
        if kind == "cgroup2" and "memory" in controllers.read_text().split():
            return Path(folder), _V2
    raise Unavailable("no memory cgroup is mounted")


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A new cgroup that may hold `limit` bytes; at the end it is removed, so it must be empty.

    Raises
    ------
    Unavailable
        No controller, or no right to use it.
    """
    root, version = _root()
    folder = root / f"pyembed-bench-{os.getpid()}"
    try:
        if version is _V2:
            (root / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as error:
        raise Unavailable(f"no memory cgroup: {error.strerror}; needs root") from error
    try:
        (folder / version.limit).write_text(str(limit))
        with contextlib.suppress(OSError):  # where there is no swap there may be no such file
            (folder / version.no_swap[0]).write_text(version.no_swap[1])
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(50):  # a process that has just ended is counted for a moment
        with contextlib.suppress(OSError):
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.1)


def join(group: str) -> None:
    """Move this process into a group: what it allocates and reads from now on counts there."""
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))


def anonymous(group: str) -> int:
    """Bytes of a group that are no page cache: arrays, buffers, the interpreter's later needs."""
    folder = Path(group)
    name = (_V2 if (folder / _V2.limit).exists() else _V1).anonymous
    lines = (folder / "memory.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == name)


def bytes_read() -> int:
    """Bytes that this process has had read from disks since it began."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def require_disk(folder: Path) -> None:
    """Refuse a folder that lies in memory, where nothing is larger than memory."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    if max(inside)[1] in ("tmpfs", "ramfs"):
        raise Unavailable(f"{folder} lies in memory; set PYEMBED_BENCH_DIR to a folder on a disk")


def _resident(path: Path) -> float:
    """The share of a file that lies in the page cache, whoever brought it there."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as map_:
        start = np.frombuffer(map_, np.uint8)
        pages = np.empty(-(-size // PAGE), np.uint8)
        arguments = [ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size)]
        failed = ctypes.CDLL(None).mincore(*arguments, ctypes.c_void_p(pages.ctypes.data))
        del start  # or the map could not be closed
    return 1.0 if failed else float((pages & 1).mean())


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # only what is on the disk can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty_cache(path: Path) -> None:
    """Drop a file, or all files in a folder, from the page cache.

    First these files alone, for the sake of others on the machine; if that is not enough, all.

    Raises
    ------
    Unavailable
        If they stay: somebody has them mapped, or this is not root.
    """
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    large = [f for f in files if f.stat().st_size > 1 << 20]
    for file in files:
        _forget(file)
    if all(_resident(file) < EMPTY for file in large):
        return
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    if not all(_resident(file) < EMPTY for file in large):
        raise Unavailable("the page cache could not be emptied")


def read_direct(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file from the disk itself: the page cache is neither used nor filled."""
    first, last = offset // PAGE * PAGE, -(-(offset + size) // PAGE) * PAGE
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, last - first) as buffer:  # page-aligned, as O_DIRECT wants
            os.preadv(fd, [buffer], first)
            return buffer[offset - first : offset - first + size]
    finally:
        os.close(fd)


def rows_direct(path: Path, offset: int, stride: int, ids: Array, width: int) -> Array:
    """The first `width` floats of rows of `stride` bytes, as they lie on the disk."""
    pieces = [read_direct(path, offset + int(i) * stride, 4 * width) for i in ids]
    return np.frombuffer(b"".join(pieces), np.float32).reshape(len(ids), width)


def fio_version() -> str:
    """What fio calls itself, or that there is none."""
    if not shutil.which("fio"):
        return "not installed"
    done = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def fio_rate(path: Path, seconds: float) -> float:
    """Pages of 4 KiB a second that the disk delivers from random places of a file.

    Raises
    ------
    Unavailable
    """
    if not shutil.which("fio"):
        raise Unavailable("fio is not installed")
    command = ["fio", "--name=limit", f"--filename={path}", f"--size={path.stat().st_size}"]
    command += ["--readonly", "--rw=randread", "--bs=4k", "--norandommap", "--randrepeat=0"]
    command += ["--ioengine=io_uring", "--direct=1", f"--iodepth={DEPTH}"]
    command += ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    except (ValueError, LookupError):
        raise Unavailable(f"fio failed: {done.stderr.strip()[:80]}") from None
    if found["error"]:
        raise Unavailable(f"fio failed: {os.strerror(found['error'])}")
    return float(found["read"]["iops"])
