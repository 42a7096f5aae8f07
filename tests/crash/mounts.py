"""Loop devices and mounts of this process alone: they end with it, however it ends.

A process that calls `alone` sees its own mounts, which the system takes away with the last process
that sees them; a loop device goes with its last user. So nothing is left over, not even of a run
that was killed, and nothing of this machine's is touched.
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
SYNC_FILE_RANGE = 7  # write what is dirty, and wait for that; the device is not told to flush
IMAGE_BYTES = 10 << 20  # at least twice the journal
JOURNAL_MIB = 4  # the least for blocks of 4096 bytes
SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def alone() -> None:
    """From here on the mounts of this process are its own."""
    _check(LIBC.unshare(CLONE_NEWNS), "unshare")
    _check(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount / private")


def die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def mount(source: str, target: Path, kind: str, options: str = "") -> None:
    done = LIBC.mount(source.encode(), bytes(target), kind.encode(), 0, options.encode())
    _check(done, f"mount {kind} {options}")


@contextlib.contextmanager
def mounted(source: str, target: Path, kind: str, options: str = "") -> Iterator[Path]:
    """A mount for the time of a block."""
    target.mkdir(exist_ok=True)
    mount(source, target, kind, options)
    try:
        yield target
    except BaseException:
        LIBC.umount2(bytes(target), MNT_DETACH)  # whatever still uses it
        raise
    for _ in range(100):
        if LIBC.umount2(bytes(target), 0) == 0:
            return
        if ctypes.get_errno() != errno.EBUSY:
            break
        time.sleep(0.01)  # a loop device lets go of its file in its own time
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
                    if error.errno != errno.EBUSY:  # somebody else took it just now
                        raise
        finally:
            os.close(control)

    def forget(self) -> None:
        """The file changed underneath: what was read of it is read again."""
        fcntl.ioctl(self._fd, BLKFLSBUF)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def make_ext4(file: Path) -> None:
    """A small ext4 with all that mkfs usually gives, and nothing left for the kernel to do."""
    file.touch()
    os.truncate(file, IMAGE_BYTES)
    extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    program = shutil.which("mkfs.ext4", path=SBIN) or "mkfs.ext4"
    options = ["-q", "-F", "-b", "4096", "-J", f"size={JOURNAL_MIB}", "-E", extended]
    subprocess.run([program, *options, str(file)], check=True, capture_output=True)


def shut_down(fd: int) -> None:
    """End the ext4 that holds `fd` as a power cut would: what is not on its device is lost."""
    fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_THE_LOG))


def write_back(fd: int) -> None:
    """Have the pages of a file written, as the system does when it likes. That syncs nothing."""
    LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), SYNC_FILE_RANGE)
