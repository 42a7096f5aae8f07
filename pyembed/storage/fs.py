"""The seam to the operating system: every call on a table's files is a method of `FileSystem`.

::

    store, journal, change log, …  ──►  Folder, File  ──►  FileSystem  ──►  os, mmap, fcntl

A `Folder` holds the descriptor of a table's folder from open to close. All names are resolved
relative to that descriptor, so a table stays where it was opened when the process changes its
working directory, or when another program renames the folder. A path is for messages.

How a test replaces the system: it subclasses `FileSystem` and installs an instance with `using`.
Each store, folder and file keeps the instance that was installed when it was opened. ::

    class FailingSync(fs.FileSystem):
        def sync(self, fd):
            raise OSError(errno.EIO, "injected")

    with fs.using(FailingSync()):
        table = Table.open(path)

The methods of `FileSystem` are thin: each is one call. A subclass sees these arguments:

- a call by name (`open`, `rename`, `unlink`, `mkdir`, `rmdir`, `stat_name`) gets the absolute path
  as it was at open, and ``dir_fd``, the descriptor of the folder. The system resolves only the last
  component of the path, relative to ``dir_fd``; where ``dir_fd`` is None it resolves the path
  itself;
- a call on an open file gets its descriptor; `open` says which path a descriptor belongs to;
- `pwrite` and `pread` get the data and the offset, and return the number of bytes done. Their
  callers repeat them until everything is done, so a subclass may do a part;
- `map` returns the mapping; stores to it pass no call;
- `helper` returns the executor that takes the work of a background thread; a subclass may return
  one that runs each task in turn.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyembed import _core
from pyembed._checks import F32
from pyembed.errors import FormatError, TableError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
PASSING = (*FULL, errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # a later try may succeed
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)


class Helper(Protocol):
    """The part of `concurrent.futures.Executor` that storage uses."""

    def submit(self, task: Callable[..., Any], /, *args: Any) -> Any:
        """Schedule a call; return its future."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks."""


class FileSystem:
    """The system calls on a table's files; see the module for how a subclass replaces them."""

    def open(self, path: Path, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        """Open a file or a folder; return its descriptor."""
        name = path if dir_fd is None else path.name
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def duplicate(self, fd: int) -> int:
        """Return a second descriptor of an open file."""
        return os.dup(fd)

    def pread(self, fd: int, buffer: memoryview, at: int) -> int:
        """Read from an offset into a buffer; return how many bytes were read."""
        return os.preadv(fd, [buffer], at)

    def pwrite(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        """Write buffers one after the other at an offset; return how many bytes were written."""
        return os.pwritev(fd, parts, at)

    def map(self, fd: int, size: int, access: int) -> mmap.mmap:
        """Map the first bytes of a file."""
        return mmap.mmap(fd, size, access=access)

    def sync(self, fd: int) -> None:
        """Make what was written to a file, or the names in a folder, durable."""
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size of a file."""
        os.ftruncate(fd, size)

    def allocate(self, fd: int, at: int, size: int) -> None:
        """Reserve disk space."""
        os.posix_fallocate(fd, at, size)

    def lock(self, fd: int, exclusive: bool) -> None:
        """Take a flock, without waiting; BlockingIOError if it is held elsewhere."""
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(fd, kind | fcntl.LOCK_NB)

    def unlock(self, fd: int) -> None:
        """Free a flock, which a child process may hold as well."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def stat(self, fd: int) -> os.stat_result:
        """Return the status of an open file."""
        return os.fstat(fd)

    def free_bytes(self, fd: int) -> int:
        """Return the free space of the file system that a file is on."""
        found = os.fstatvfs(fd)
        return found.f_bavail * found.f_frsize

    def stat_name(
        self, path: Path, *, dir_fd: int | None = None, follow: bool = True
    ) -> os.stat_result:
        """Return the status of what a name leads to; of a link itself if it is not followed."""
        name = path if dir_fd is None else path.name
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=follow)

    def names(self, fd: int) -> list[str]:
        """Return the names in a folder."""
        return os.listdir(fd)

    def rename(self, source: Path, target: Path, *, dir_fd: int) -> None:
        """Rename within one folder; a file replaces an existing one."""
        os.replace(source.name, target.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, path: Path, *, dir_fd: int) -> None:
        """Remove the name of a file."""
        os.unlink(path.name, dir_fd=dir_fd)

    def mkdir(self, path: Path, *, dir_fd: int) -> None:
        """Make a folder."""
        os.mkdir(path.name, dir_fd=dir_fd)

    def rmdir(self, path: Path, *, dir_fd: int) -> None:
        """Remove an empty folder."""
        os.rmdir(path.name, dir_fd=dir_fd)

    def advise(self, fd: int, at: int, size: int, advice: str) -> None:
        """Give posix_fadvise a hint, "willneed" or "dontneed", where the system has it."""
        if hasattr(os, "posix_fadvise"):
            flag = {"willneed": os.POSIX_FADV_WILLNEED, "dontneed": os.POSIX_FADV_DONTNEED}[advice]
            os.posix_fadvise(fd, at, size, flag)

    def start_write_back(self, fd: int, at: int, size: int) -> bool:
        """Begin to write dirty pages to the disk, without waiting; False if not supported."""
        return _core.start_write_back(fd, at, size)

    def cached_pages(self, fd: int) -> tuple[int, int] | None:
        """Return how many pages of a file are in memory, and how many of them are dirty."""
        return _core.cached_pages(fd)

    def boot_id(self) -> str:
        """Return the id of this start of the machine; a new one for each call if it is unknown."""
        try:
            return _read_boot_id()
        except (FileNotFoundError, PermissionError):
            return f"unknown {self.token()}"

    def token(self) -> str:
        """Draw 16 random hex digits."""
        return secrets.token_hex(8)

    def helper(self, name: str, num_threads: int) -> Helper:
        """Return an executor whose threads start with its first task."""
        return ThreadPoolExecutor(num_threads, name)


@functools.cache
def _read_boot_id() -> str:
    return BOOT_ID.read_text().strip()


class Reserve:
    """A descriptor that this process gives up for a commit when it has no other."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def keep(self) -> None:
        """Have the descriptor, if there is one left."""
        if not self._fds:
            with contextlib.suppress(OSError):
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def give_up(self) -> bool:
        """Close the descriptor; return whether there was one."""
        with contextlib.suppress(IndexError):
            os.close(self._fds.pop())
            return True
        return False


reserve = Reserve()
_installed = FileSystem()


def current() -> FileSystem:
    """Return the file system that stores capture when they are opened."""
    return _installed


class using:
    """Install a file system for the whole process, for the length of a block.

    Parameters
    ----------
    system : FileSystem
    """

    def __init__(self, system: FileSystem) -> None:
        self._system = system

    def __enter__(self) -> FileSystem:
        global _installed
        self._before, _installed = _installed, self._system
        return self._system

    def __exit__(self, *_: object) -> None:
        global _installed
        _installed = self._before


class File:
    """An open file: a descriptor, the file system that opened it, and a path for messages.

    Parameters
    ----------
    system : FileSystem
    fd : int
    path : Path

    Attributes
    ----------
    fd : int
        -1 once it is closed.
    path : Path
    system : FileSystem
    """

    def __init__(self, system: FileSystem, fd: int, path: Path) -> None:
        self.system, self.fd, self.path = system, fd, path

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.system.stat(self.fd).st_size

    def require_regular(self) -> File:
        """Return the file itself.

        Raises
        ------
        FormatError
            If it is a folder, a pipe or a device. It is then closed.
        """
        if not stat.S_ISREG(self.system.stat(self.fd).st_mode):
            self.close()
            raise FormatError(f"{self.path}: not a regular file; remove it")
        return self

    def read_into(self, buffer: Any, at: int) -> int:
        """Fill a buffer from an offset; return how many bytes the file had for it."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = self.system.pread(self.fd, view[done:], at + done)
            if not count:
                break
            done += count
        return done

    def read_at(self, size: int, at: int) -> bytes:
        """Return at most `size` bytes from an offset: fewer only at the end of the file."""
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.read_into(buffer, at)])

    def write_at(self, parts: Iterable[Any], at: int) -> int:
        """Write all parts, one after the other, at an offset; return the offset behind them."""
        left = [view for part in parts if len(view := memoryview(part).cast("B"))]
        while left:
            count = self.system.pwrite(self.fd, left, at)
            at += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        return at

    def sync(self) -> None:
        """Make what was written durable."""
        self.system.sync(self.fd)

    def truncate(self, size: int) -> None:
        """Set the size."""
        self.system.truncate(self.fd, size)

    def allocate(self, at: int, size: int, needed: int | None = None) -> None:
        """Reserve disk space, so that a full disk is an error here and not a signal later.

        Raises
        ------
        TableError
            If the disk has not enough space (errno ENOSPC). The size is then as it was.
        """
        if size == 0:
            return
        before = self.size
        try:
            self.system.allocate(self.fd, at, size)
        except OSError as error:
            self.truncate(before)
            if error.errno not in FULL:
                raise
            raise TableError(
                error.errno,
                f"{error.strerror}: the table needs {needed or size:,} more bytes, "
                f"{self.system.free_bytes(self.fd):,} are free; make room or choose another disk",
                str(self.path),
            ) from None

    def fill_holes(self) -> None:
        """Reserve disk space for the holes of a file, which sparse copies have.

        Without it, the process dies of SIGBUS when it changes a row in a hole on a full disk.

        Raises
        ------
        TableError
            If the disk has not enough space (errno ENOSPC).
        """
        status = self.system.stat(self.fd)
        if 512 * status.st_blocks < status.st_size:
            self.allocate(0, status.st_size, status.st_size - 512 * status.st_blocks)

    def map_rows(self, offset: int, rows: int, stride: int, access: int) -> F32:
        """Map float32 rows that begin at an offset of a file that is long enough.

        Returns
        -------
        float32 array of shape (rows, stride)

        Raises
        ------
        TableError
            If the address space has no room (errno ENOMEM).
        """
        if rows == 0:
            return np.zeros((0, stride), np.float32)
        size = offset + 4 * rows * stride
        try:
            memory = self.system.map(self.fd, size, access)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            what = f"the system cannot map {size:,} bytes; raise the limit (ulimit -v)"
            raise TableError(error.errno, what, str(self.path)) from None
        with contextlib.suppress(OSError, AttributeError):  # a hint; not every system has it
            # The system's own readahead would read megabytes for one cold row.
            memory.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(memory, np.float32, rows * stride, offset).reshape(rows, stride)

    def close(self) -> None:
        """Close the descriptor. Closing twice is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.system.close(fd)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Folder:
    """A folder that is held by a descriptor: all names are resolved relative to it.

    Parameters
    ----------
    path : Path
        Links are followed. A relative path is stored as an absolute one.
    system : FileSystem, optional
        The one that is installed, if not given.

    Attributes
    ----------
    path : Path
        Where the folder was when it was opened: for messages.
    system : FileSystem
    """

    def __init__(self, path: Path, system: FileSystem | None = None) -> None:
        self.path, self.system = path.absolute(), system or current()
        self._fd = self.system.open(self.path, FOLDER_FLAGS)

    def subfolder(self, name: str) -> Folder:
        """Open a folder of this folder."""
        folder = Folder.__new__(Folder)
        folder.path, folder.system = self.path / name, self.system
        folder._fd = self.system.open(folder.path, FOLDER_FLAGS, dir_fd=self._fd)
        return folder

    def open(self, name: str, flags: int = os.O_RDONLY) -> File:
        """Open a file of the folder; links are followed without the flag `NO_LINK`."""
        path = self.path / name
        return File(self.system, self.system.open(path, flags, dir_fd=self._fd), path)

    def stat(self, name: str) -> os.stat_result:
        """Return the status of a name in the folder; of a link itself."""
        return self.system.stat_name(self.path / name, dir_fd=self._fd, follow=False)

    def exists(self, name: str) -> bool:
        """Whether the folder has this name, be it a link that leads nowhere."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        with self.open(name) as file:
            return file.read_at(file.size, 0)

    def write(self, name: str, parts: Iterable[Any], size: int = 0) -> None:
        """Write a file and sync it. Its name is durable once the folder is synced as well.

        Parameters
        ----------
        name : str
        parts : iterable of bytes-like objects
            Making them may fail: the file is then incomplete.
        size : int
            Bytes to allocate first, if that is known.

        Raises
        ------
        TableError
            If the disk has not so many free bytes.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            opened = self.open(name, flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not reserve.give_up():
                raise
            opened = self.open(name, flags)
        with opened as file:
            file.allocate(0, size)
            at = 0
            for part in parts:
                at = file.write_at([part], at)
            file.sync()
        reserve.keep()

    def replace(self, name: str, parts: Iterable[Any]) -> None:
        """Atomically replace a file: temporary file, sync, rename, sync of the folder.

        Making the parts may fail: the file is then as it was.

        Raises
        ------
        OSError
            With errno EIO if only the last sync failed. The file already is the new one, so a
            caller must not take that for a full disk, which is met before.
        """
        temporary = name + ".new"
        self.write(temporary, parts)
        self.rename(temporary, name)
        try:
            self.sync()
        except OSError as error:
            what = f"its new content may be lost with the machine ({error.strerror})"
            raise OSError(errno.EIO, what, str(self.path / name)) from error

    def rename(self, source: str, target: str) -> None:
        """Rename a file of the folder."""
        self.system.rename(self.path / source, self.path / target, dir_fd=self._fd)

    def unlink(self, name: str, missing_ok: bool = False) -> None:
        """Remove a file of the folder."""
        try:
            self.system.unlink(self.path / name, dir_fd=self._fd)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, name: str) -> None:
        """Make a folder in this folder."""
        self.system.mkdir(self.path / name, dir_fd=self._fd)

    def rmdir(self, name: str) -> None:
        """Remove an empty folder of this folder."""
        self.system.rmdir(self.path / name, dir_fd=self._fd)

    def names(self) -> list[str]:
        """Return the names in the folder."""
        return self.system.names(self._fd)

    def sync(self) -> None:
        """Make the names in the folder durable."""
        self.system.sync(self._fd)

    def has(self, file: File) -> bool:
        """Whether a file's name in the folder still leads to the file that is open."""
        try:
            found = self.system.stat_name(file.path, dir_fd=self._fd)
        except OSError:
            return False
        return os.path.samestat(found, self.system.stat(file.fd))

    def is_at_path(self) -> bool:
        """Whether the path still leads to this folder."""
        try:
            found = self.system.stat_name(self.path)
        except OSError:
            return False
        return os.path.samestat(found, self.system.stat(self._fd))

    def close(self) -> None:
        """Close the descriptor. Closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.system.close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_file(path: Path, flags: int = os.O_RDONLY) -> File:
    """Open a file by its path; links are followed."""
    system, path = current(), path.absolute()
    return File(system, system.open(path, flags), path)


def sync(fd: int) -> None:
    """Make what was written to a descriptor durable: for a file that this module did not open."""
    current().sync(fd)
