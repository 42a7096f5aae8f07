"""Recovery: bring a dirty table back to its last commit, if its journal can do that."""

from __future__ import annotations

import errno
import mmap
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed._checks import F32
from pyembed.errors import DirtyError
from pyembed.storage.fs import File, Folder
from pyembed.storage.journal import Replay
from pyembed.storage.manifest import Manifest
from pyembed.storage.npy import HEADER_BYTES

I64 = NDArray[np.int64]
Frames = Iterable[tuple[I64, F32]]
# Wraps an iterable of frames and gets a description: it shows a progress bar, or does nothing.
Progress = Callable[[Frames, str], Frames]
TOGETHER_BYTES = 256 << 20  # bytes of frames sorted at a time, as a sweep over the table is faster
SWEEP_ROWS, AHEAD = 4096, 8  # rows of a part of a sweep; parts whose pages are being read
DENSE = 4  # a part reads all pages of its range if they are at most 4 times the pages it needs


def silent(frames: Frames, what: str) -> Frames:
    """Show no progress."""
    return frames


def judge(
    folder: Folder,
    state: Manifest,
    written: int = 0,
    file: File | None = None,
    progress: Progress = silent,
) -> Replay:
    """Return the frames that bring a dirty table back, after reading them once to the end.

    Parameters
    ----------
    folder : Folder
    state : Manifest
        The dirty manifest.
    written : int
        Number of frames that are known to be in the journal; 0 if it is unknown.
    file : File, optional
        The journal, if it is open.
    progress : function
        See `Progress`.

    Raises
    ------
    DirtyError
        If there is no journal, or frames of it are lost.
    """
    number, salt, why = state.generation, int(state.salt or "0", 16), ""
    replay = Replay(folder, salt, number, state.stride, state.rows, file)
    if state.durability == "none":
        why = f"a commit after generation {number}, and it keeps no journal"
    elif state.durability == "process" and state.boot != folder.system.boot_id():
        why = f"a commit after generation {number}, and then the machine went down"
    else:
        for _ in progress(replay, "checking the journal"):
            pass
        if replay.end == "damaged":
            why = f"a commit after generation {number}, and {replay.problem}"
    if why:
        raise DirtyError(
            errno.EUCLEAN,
            f"the last writer ended without {why}: rows may be from any time since; "
            "restore a copy, or open it as it is with salvage=True",
            str(folder.path),
        )
    if replay.frames < written:
        what = f"{replay.frames} of {written} frames of the journal are left"
        raise DirtyError(errno.EUCLEAN, f"{what}; close the table", str(folder.path))
    return replay


def put_back(
    array: F32, replay: Replay, file: File | None = None, progress: Progress = silent
) -> None:
    """Write the rows of a journal into the mapping of a table.

    A frame of neighbouring rows is written to the file, if one is given, so that the pages which it
    covers need not be read first.

    Parameters
    ----------
    array : float32 array of shape (rows, stride)
        The mapping of the last commit.
    replay : Replay
    file : File, optional
        The mapped file, if it is to change.
    progress : function
        See `Progress`.
    """
    some: list[tuple[I64, F32]] = []
    for rows, old in progress(replay, "recovering"):
        if file is not None and (np.diff(rows) == 1).all():
            at = HEADER_BYTES + int(rows[0]) * old[0].nbytes
            file.write_at([old.reshape(-1).view(np.uint8)], at)
            # The disk writes while the next frames are read.
            file.system.start_write_back(file.fd, at, old.nbytes)
            continue
        some.append((rows, old))
        if sum(old.nbytes for _, old in some) >= TOGETHER_BYTES:
            _put_back_sorted(array, some)
            some.clear()
    if some:
        _put_back_sorted(array, some)


def _put_back_sorted(array: F32, frames: list[tuple[I64, F32]]) -> None:
    """Write many frames in one sweep over the table, with readahead of its pages."""
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
        _core.readahead(whole, wanted)
        if len(coming) > AHEAD:
            part = coming.popleft()
            array[rows[part]] = old[part]
    for part in coming:
        array[rows[part]] = old[part]
