"""From a dirty table back to its last commit: can its journal do that, and doing it."""

from __future__ import annotations

import errno
import secrets
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pyembed import _core
from pyembed.arrays import F32
from pyembed.errors import DirtyError
from pyembed.journal import Replay, undo_path
from pyembed.manifest import Manifest

I64 = NDArray[np.int64]
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FRAMES_AHEAD = 8  # whose pages are on their way while a frame is put back


def boot_id() -> str:
    """Which start of the machine this is; one of its own for every call where nobody knows."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return f"unknown {secrets.token_hex(8)}"


def judge(folder: Path, state: Manifest) -> Replay:
    """The frames that bring a dirty table back to its last commit, read once to the end.

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
    return replay


def put_back(array: F32, replay: Replay) -> None:
    """Rows as the journal has them, in a mapping of shape (rows, stride) of the last commit."""
    whole, coming = _core.Column(array, _core.Pages()), deque[tuple[I64, F32]]()
    for frame in _frames(replay, "recovering"):
        _core.ask_pages(whole, frame[0])
        coming.append(frame)
        if len(coming) > FRAMES_AHEAD:
            rows, old = coming.popleft()
            array[rows] = old
    for rows, old in coming:
        array[rows] = old


def _frames(replay: Replay, what: str) -> Iterable[tuple[I64, F32]]:
    return tqdm(replay, desc=what, unit="frame", disable=None, delay=1, leave=False)
