"""The limits of a run on disk: a memory group, an empty page cache, and the rate of the disk.

A memory group is a new cgroup, of version 1 or 2, at the root of the hierarchy, whose limit
includes the page cache. Both versions charge a page to the group that read it first, so the limit
of a process that joins after its imports applies to its table and batches alone. The rate of the
disk is measured by fio with io_uring, O_DIRECT and 128 concurrent reads of 4 KiB, on the file in
question.

A limit that cannot be set or measured raises `Unavailable`, whose text goes into the cells of the
report.
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
DEPTH = 128  # concurrent reads
EMPTY = 0.01  # the share of a file in the page cache below which the cache counts as empty


class Unavailable(Exception):
    """The reason why a limit can be neither set nor measured on this machine."""


@dataclass(frozen=True)
class _Version:
    """The file names of one version of the memory controller."""

    limit: str
    no_swap: tuple[str, str]  # file and value
    anonymous: str  # the line of memory.stat


_V1 = _Version("memory.limit_in_bytes", ("memory.swappiness", "0"), "rss")
_V2 = _Version("memory.max", ("memory.swap.max", "0"), "anon")


def _root() -> tuple[Path, _Version]:
    """Return the folder of memory groups and the names of their files."""
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
    """Create a cgroup with a limit of `limit` bytes and yield its folder; remove it at the end.

    The group must be empty by then.

    Raises
    ------
    Unavailable
        If there is no memory controller, or no permission to use it.
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
        with contextlib.suppress(OSError):  # without swap the file may be missing
            (folder / version.no_swap[0]).write_text(version.no_swap[1])
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(50):  # a process still counts for a moment after its end
        with contextlib.suppress(OSError):
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.1)


def join(group: str) -> None:
    """Move this process into a group, which counts its memory and page cache from now on."""
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))


def anonymous(group: str) -> int:
    """Return the bytes of a group without its page cache: arrays, buffers, the interpreter."""
    folder = Path(group)
    name = (_V2 if (folder / _V2.limit).exists() else _V1).anonymous
    lines = (folder / "memory.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == name)


def bytes_read() -> int:
    """Return the bytes that disks have read for this process since its start."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def require_disk(folder: Path) -> None:
    """Raise `Unavailable` if a folder is on a file system in memory."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    if max(inside)[1] in ("tmpfs", "ramfs"):
        raise Unavailable(f"{folder} is in memory; set PYEMBED_BENCH_DIR to a folder on a disk")


def _resident(path: Path) -> float:
    """Return the share of a file that is in the page cache."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as map_:
        start = np.frombuffer(map_, np.uint8)
        pages = np.empty(-(-size // PAGE), np.uint8)
        arguments = [ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size)]
        failed = ctypes.CDLL(None).mincore(*arguments, ctypes.c_void_p(pages.ctypes.data))
        del start  # the map cannot be closed while a view exists
    return 1.0 if failed else float((pages & 1).mean())


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # only clean pages can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def empty_cache(path: Path) -> None:
    """Drop a file, or all files in a folder, from the page cache.

    If dropping these files alone fails, drop the whole page cache of the machine.

    Raises
    ------
    Unavailable
        If they stay, because a process maps them or this user is not root.
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
    """Read bytes of a file from the disk, past the page cache."""
    first, last = offset // PAGE * PAGE, -(-(offset + size) // PAGE) * PAGE
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, last - first) as buffer:  # page-aligned, as O_DIRECT requires
            os.preadv(fd, [buffer], first)
            return buffer[offset - first : offset - first + size]
    finally:
        os.close(fd)


def rows_direct(path: Path, offset: int, stride: int, ids: Array, width: int) -> Array:
    """Read the first `width` floats of rows of `stride` bytes from the disk."""
    pieces = [read_direct(path, offset + int(i) * stride, 4 * width) for i in ids]
    return np.frombuffer(b"".join(pieces), np.float32).reshape(len(ids), width)


def fio_version() -> str:
    """Return the version of fio, or "not installed"."""
    if not shutil.which("fio"):
        return "not installed"
    done = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def fio_rate(path: Path, seconds: float) -> float:
    """Return how many random pages of 4 KiB of a file the disk reads per second.

    Raises
    ------
    Unavailable
        If fio is missing or fails.
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
