"""A disk that records everything that reaches it: a file in a FUSE, for a loop device.

::

    ext4 ── /dev/loopN ── FOLDER/disk ── the kernel's FUSE ── this process: events
                          FOLDER/said ──┘

Events are ("write", at, bytes), ("flush",), ("fail",) for a write that was refused, and ("say",
word, number), in their order. `said` takes the announcements, a line each, so that each has its
place among the writes. A write returns after it is recorded, so a flush covers every write before
it.

The module speaks the protocol of /dev/fuse itself (linux/fuse.h), the dozen requests that a loop
device makes, so that nothing has to be installed or compiled.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import signal
import stat
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tests.crash import mounts, worker

BLOCK = 4096
Event = tuple[Any, ...]
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, RELEASEDIR, INTERRUPT = 18, 20, 25, 26, 27, 29, 36
DESTROY, BATCH_FORGET = 38, 42
SILENT = (FORGET, BATCH_FORGET, INTERRUPT)
HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, …
ANSWER = struct.Struct("<IiQ")  # length, -errno, unique
MAX_WRITE = 128 << 10  # bytes of one request
ROOT, DISK, SAID = 1, 2, 3  # nodes
NODES = {b"disk": DISK, b"said": SAID}
DIRECT_IO = 1  # of an open file: nothing of it is cached


def sparse(data: Any) -> np.ndarray:
    """Return a copy that needs memory only for blocks that are not zero."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, BLOCK)
    used, copy = blocks.any(axis=1), np.frombuffer(mmap.mmap(-1, blocks.size), np.uint8)
    copy.reshape(blocks.shape)[used] = blocks[used]
    return copy


class Server:
    """Answers the kernel until the folder is unmounted.

    Parameters
    ----------
    fd : int
        The descriptor of /dev/fuse.
    image : uint8 array
        The content of the disk.
    fail_at : int
        The number of a write that is refused with EIO.
    """

    def __init__(self, fd: int, image: np.ndarray, fail_at: int = -1) -> None:
        self._fd, self._image, self._fail_at = fd, sparse(image), fail_at
        self.events: list[Event] = []
        self._writes = 0
        self._answers: dict[int, Callable[[int, memoryview], bytes]] = {
            INIT: self._init,
            LOOKUP: self._lookup,
            GETATTR: self._getattr,
            SETATTR: self._getattr,
            OPEN: self._open,
            OPENDIR: self._open,
            READ: self._read,
            WRITE: self._write,
            STATFS: lambda node, data: bytes(80),
            FSYNC: self._fsync,
            **dict.fromkeys((RELEASE, RELEASEDIR, FLUSH, DESTROY), lambda node, data: b""),
        }

    def serve(self) -> None:
        """Answer requests until the end."""
        while True:
            try:
                request = os.read(self._fd, MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # a request was withdrawn
                    continue
                return  # unmounted
            _, opcode, unique, node, *_ = HEADER.unpack_from(request)
            if opcode in SILENT:
                continue
            try:
                answer = self._answers.get(opcode, _unknown)
                code, body = 0, answer(node, memoryview(request)[HEADER.size :])
            except OSError as error:
                code, body = -(error.errno or errno.EIO), b""
            with contextlib.suppress(FileNotFoundError):  # nothing waits for the answer
                os.write(self._fd, ANSWER.pack(ANSWER.size + len(body), code, unique) + body)

    def _init(self, node: int, data: memoryview) -> bytes:
        major, _, readahead = struct.unpack_from("<III", data)
        big_writes, pages = 1 << 5, 1 << 22
        return struct.pack(
            "<IIIIHHIIHH32x",
            *(major, 31, readahead, big_writes | pages, 16, 12, MAX_WRITE, 1, MAX_WRITE // 4096, 0),
        )

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o700 if node == ROOT else stat.S_IFREG | 0o600
        size = len(self._image) if node == DISK else 0
        times = (0,) * 6
        return struct.pack(
            "<6Q10I", node, size, size // 512, *times[:3], *times[3:], mode, 1, 0, 0, 0, 4096, 0
        )

    def _lookup(self, node: int, data: memoryview) -> bytes:
        found = NODES.get(bytes(data).rstrip(b"\0"))
        if found is None:
            raise OSError(errno.ENOENT, "")
        return struct.pack("<4Q2I", found, 0, 3600, 3600, 0, 0) + self._attributes(found)

    def _getattr(self, node: int, data: memoryview) -> bytes:
        return struct.pack("<Q2I", 3600, 0, 0) + self._attributes(node)

    def _open(self, node: int, data: memoryview) -> bytes:
        return struct.pack("<QII", 0, DIRECT_IO if node == SAID else 0, 0)

    def _read(self, node: int, data: memoryview) -> bytes:
        _, at, size = struct.unpack_from("<QQI", data)
        return bytes(self._image[at : at + size])

    def _write(self, node: int, data: memoryview) -> bytes:
        _, at, size = struct.unpack_from("<QQI", data)
        new = bytes(data[40 : 40 + size])
        if node == SAID:
            word, number = new.split()
            self.events.append(("say", word.decode(), int(number)))
        else:
            self._writes += 1
            if self._writes - 1 == self._fail_at:
                self.events.append(("fail",))
                raise OSError(errno.EIO, "")
            self._image[at : at + size] = np.frombuffer(new, np.uint8)
            self.events.append(("write", at, new))
        return struct.pack("<II", size, 0)

    def _fsync(self, node: int, data: memoryview) -> bytes:
        if node == DISK:
            self.events.append(("flush",))
        return b""


def _unknown(node: int, data: memoryview) -> bytes:
    raise OSError(errno.ENOSYS, "")


@contextlib.contextmanager
def serving(folder: Path, image: np.ndarray, fail_at: int = -1) -> Iterator[list[Event]]:
    """Serve the disk in a folder for the length of a block; the list is filled at its end."""
    fd, result = os.open("/dev/fuse", os.O_RDWR), folder.with_suffix(".events")
    events: list[Event] = []
    child, options = 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    try:
        with mounts.mounted("logdisk", folder, "fuse", options):
            child = os.fork()
            if child == 0:
                _serve(fd, image, fail_at, result)
            os.close(fd)
            yield events
    except BaseException:
        if child:
            os.kill(child, signal.SIGKILL)
        raise
    finally:
        if child:
            os.waitpid(child, 0)
    events += pickle.loads(result.read_bytes())
    result.unlink()


def _serve(fd: int, image: np.ndarray, fail_at: int, result: Path) -> NoReturn:
    mounts.die_with_parent()
    worker.leave_memory_group()
    try:
        server = Server(fd, image, fail_at)
        server.serve()
        result.write_bytes(pickle.dumps(server.events))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
