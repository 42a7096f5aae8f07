"""Loop devices and mounts of this process alone: they end with it, however it ends.

A process that calls `alone` has its own mounts, which the system removes with the last process that
sees them; a loop device ends with its last user. So nothing is left over, not even after a run that
was killed, and the mounts of the machine are not changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LO_FLAGS_AUTOCLEAR = 0x4C82, 0x4C0A, 4
BLKFLSBUF = 0x1261
SHUTDOWN, WITHOUT_THE_LOG = 0x8004587D, 2  # of ext4: _IOR('X', 125, u32)
SYNC_FILE_RANGE = 7  # write dirty pages and wait; the device is not told to flush
IMAGE_BYTES = 10 << 20  # at least twice the journal
JOURNAL_MIB = 4  # the least for blocks of 4096 bytes
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def alone() -> None:
    """Give this process its own mounts."""
    _check(LIBC.unshare(CLONE_NEWNS), "unshare")
    _check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount / private")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def mount(source: str, target: Path, kind: str, options: str = "") -> None:
    """Mount a file system."""
    done = LIBC.mount(source.encode(), bytes(target), kind.encode(), 0, options.encode())
    _check(done, f"mount {kind} {options}")


@contextlib.contextmanager
def mounted(source: str, target: Path, kind: str, options: str = "") -> Iterator[Path]:
    """Mount a file system for the length of a block."""
    target.mkdir(exist_ok=True)
    mount(source, target, kind, options)
    try:
        yield target
    except BaseException:
        LIBC.umount2(bytes(target), MNT_DETACH)  # even if it is in use
        raise
    for _ in range(100):
        if LIBC.umount2(bytes(target), 0) == 0:
            return
        if ctypes.get_errno() != errno.EBUSY:
            break
        time.sleep(0.01)  # a loop device releases its file with a delay
    _check(-1, f"umount {target}")


class Loop:
    """A loop device over a file, until it is closed."""

    def __init__(self, file: Path) -> None:
        backing = os.open(file, os.O_RDWR)
        try:
            self.path, self._fd = self._attach(backing)
        finally:
            os.close(backing)

    @staticmethod
    def _attach(backing: int) -> tuple[str, int]:
        control = os.open("/dev/loop-control", os.O_RDWR)
        try:
            while True:
                path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
                fd = os.open(path, os.O_RDWR)
                info = struct.pack("5Q4I176x", 0, 0, 0, 0, 0, 0, 0, 0, LO_FLAGS_AUTOCLEAR)
                try:
                    fcntl.ioctl(fd, LOOP_CONFIGURE, struct.pack("2I232s64x", backing, 0, info))
                    return path, fd
                except OSError as error:
                    os.close(fd)
                    if error.errno != errno.EBUSY:  # another process was faster
                        raise
        finally:
            os.close(control)

    def forget(self) -> None:
        """Drop the cached blocks: the file below has changed."""
        fcntl.ioctl(self._fd, BLKFLSBUF)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def make_ext4(file: Path) -> None:
    """Make a small ext4 with the default features, and no initialisation left to the kernel."""
    file.touch()
    os.truncate(file, IMAGE_BYTES)
    extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    program = shutil.which("mkfs.ext4", path=SBIN) or "mkfs.ext4"
    options = ["-q", "-F", "-b", "4096", "-J", f"size={JOURNAL_MIB}", "-E", extended]
    subprocess.run([program, *options, str(file)], check=True, capture_output=True)


def shut_down(fd: int) -> None:
    """End an ext4 as a power cut would: data that is not on its device is lost."""
    fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_THE_LOG))


def write_back(fd: int) -> None:
    """Have the dirty pages of a file written, as the system may at any time; it syncs nothing."""
    LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE)
