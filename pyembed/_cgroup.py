"""Limits that Linux control groups, version 1 and 2, put on this process.

A group's limit holds for all groups below it, so the effective limit is the smallest one on the
path from the process's own group to the root. The kernel files of a group are read afresh at each
call; nothing is cached here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

_UNLIMITED = 1 << 62  # version 1 writes "no limit" as the largest multiple of a page in an int64


def cpu_quota(root: Path = Path("/")) -> int | None:
    """The processors that the control groups of this process allow it to use.

    Parameters
    ----------
    root : Path
        The folder that holds ``proc`` and ``sys``.

    Returns
    -------
    int or None
        The quota, rounded up to whole processors; None if there is none.
    """
    quotas = []
    for group in _groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, (group / "cpu.max").read_text().split())
            quotas.append(-(-quota // period))
        with contextlib.suppress(OSError, ValueError):
            quota = int((group / "cpu.cfs_quota_us").read_text())
            period = int((group / "cpu.cfs_period_us").read_text())
            if quota > 0:  # -1 stands for no quota
                quotas.append(-(-quota // period))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The bytes of memory that the control groups of this process allow it to use.

    Parameters
    ----------
    root : Path
        The folder that holds ``proc`` and ``sys``.

    Returns
    -------
    int or None
        The limit in bytes; None if there is none.
    """
    limits = []
    for group in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((group / name).read_text()))
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups for a controller, each with its ancestors."""
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or /proc is not mounted
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)  # version 2 names no controllers
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            place, _, source = mount.partition(" - ")
            kind, _, options = source.split(" ", 2)
            if kind == "cgroup2" if not controllers else controller in options.split(","):
                top, point = map(_unescape, place.split(" ")[3:5])
                below = _relative(path, top)
                for depth in range(len(below), -1, -1):
                    yield root.joinpath(point.lstrip("/"), *below[:depth])


def _relative(path: str, top: str) -> tuple[str, ...]:
    """The path of a group below the group that is mounted; empty if it is not below it.

    In a container, `path` may name a group that is not visible; then the mounted group is the one
    that limits the container.
    """
    group = PurePath(path)
    if not group.is_relative_to(top) or ".." in group.parts:
        return ()
    return group.relative_to(top).parts


def _unescape(field: str) -> str:
    r"""Decode the octal escapes of ``mountinfo``: a space is written as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
