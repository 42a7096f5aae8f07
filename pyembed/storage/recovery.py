"""From a dirty table back to its last commit: can its journal do that, and doing it."""

from __future__ import annotations

import errno
import mmap
import secrets
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pyembed import _core
from pyembed._checks import F32
from pyembed.errors import DirtyError
from pyembed.storage.fs import HEADER_BYTES, write_at
from pyembed.storage.journal import Replay, undo_path
from pyembed.storage.manifest import Manifest

I64 = NDArray[np.int64]
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
TOGETHER_BYTES = 256 << 20  # of frames that are sorted, as a sweep reads faster than they would
SWEEP_ROWS, AHEAD = 4096, 8  # of a part of a sweep; parts whose pages are on their way
DENSE = 4  # times what is needed is read where it lies together: a disk is that much faster then


def boot_id() -> str:
    """Which start of the machine this is; one of its own for every call where nobody knows."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return f"unknown {secrets.token_hex(8)}"


def judge(folder: Path, state: Manifest, written: int = 0) -> Replay:
    """The frames that bring a dirty table back to its last commit, read once to the end.

    `written` is how many there are, as far as that is known.

    Raises
    ------
    DirtyError
        If they cannot: there is no journal, or what it kept is lost.
    """
    number, salt, why = state.generation, int(state.salt or "0", 16), ""
    replay = Replay(undo_path(folder, number), salt, number, state.stride, state.rows)
    if state.durability == "none":
        why = f"a commit after generation {number}, and it keeps no journal"
    elif state.durability == "process" and state.boot != boot_id():
        why = f"a commit after generation {number}, and then the machine went down"
    else:
        for _ in _frames(replay, "checking the journal"):
            pass
        if replay.end == "damaged":
            why = f"a commit after generation {number}, and {replay.problem}"
    if why:
        raise DirtyError(
            errno.EUCLEAN,
            f"the last writer ended without {why}: rows may be from any time since; "
            "restore a copy, or open it as it is with salvage=True",
            str(folder),
        )
    if replay.frames < written:
        what = f"{replay.frames} of {written} frames of the journal are left"
        raise DirtyError(errno.EUCLEAN, f"{what}; close the table", str(folder))
    return replay


def put_back(array: F32, replay: Replay, fd: int = -1) -> None:
    """Rows as the journal has them, in a mapping of shape (rows, stride) of the last commit.

    Neighbours go through the file, where there is one, whose pages need not be read for that.

    Parameters
    ----------
    array : float32 array of shape (rows, stride)
    replay : Replay
    fd : int
        Of the file that is mapped, if it shall change.
    """
    some: list[tuple[I64, F32]] = []
    for rows, old in _frames(replay, "recovering"):
        if fd >= 0 and (np.diff(rows) == 1).all():
            at = HEADER_BYTES + int(rows[0]) * old[0].nbytes
            write_at(fd, [old.reshape(-1).view(np.uint8)], at)
            _core.start_write_back(fd, at, old.nbytes)  # while the next are read
            continue
        some.append((rows, old))
        if sum(old.nbytes for _, old in some) >= TOGETHER_BYTES:
            _put_back_sorted(array, some)
            some.clear()
    if some:
        _put_back_sorted(array, some)


def _put_back_sorted(array: F32, frames: list[tuple[I64, F32]]) -> None:
    """Many frames in one sweep over the table, with its pages asked for ahead."""
    whole = _core.Column(array, _core.Pages())
    rows, old = (np.concatenate(parts) for parts in zip(*frames, strict=True))
    order = np.argsort(rows)
    coming = deque[I64]()
    for start in range(0, order.size, SWEEP_ROWS):
        coming.append(order[start : start + SWEEP_ROWS])
        wanted = rows[coming[-1]]
        span = wanted[-1] - wanted[0] + 1
        if span * old[0].nbytes <= DENSE * wanted.size * mmap.PAGESIZE:
            wanted = np.arange(wanted[0], wanted[-1] + 1)
        _core.ask_pages(whole, wanted)
        if len(coming) > AHEAD:
            part = coming.popleft()
            array[rows[part]] = old[part]
    for part in coming:
        array[rows[part]] = old[part]


def _frames(replay: Replay, what: str) -> Iterable[tuple[I64, F32]]:
    return tqdm(replay, desc=what, unit="frame", disable=None, delay=1, leave=False)
