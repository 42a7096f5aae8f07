"""How many threads a call uses: what ``num_threads=None`` means, and when a batch is too small.

Policy lives here alone; below this file a number of threads is an argument. Nothing starts at
import: the first parallel kernel starts the pool.

OpenMP does not survive `os.fork` with libgomp: a child that inherits a started pool hangs in its
first parallel region. So the pool is given back before a fork, and the child uses one thread.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyembed import _core
from pyembed.errors import ArgumentError

# Below this many floats a parallel region costs more than it saves: waking a spinning pool takes
# about 2 µs, and one core moves 32768 floats from its caches in about 5 µs (EPYC 9005).
SERIAL_FLOATS = 32768

# Far above any machine's gain; libgomp ends the process when it cannot start a thread.
MAX_THREADS = 1024

_default: int | None = None
_forked = False


def default_num_threads() -> int:
    """The number of threads for ``num_threads=None``.

    The first that is set of ``PYEMBED_NUM_THREADS`` and ``OMP_NUM_THREADS``; else the processors
    that this process may run on, limited by the quota of its control group. Read once.

    Raises
    ------
    ArgumentError
        If a variable is set to something that is not a positive integer.
    """
    global _default
    if _default is None:
        _default = _from_environment() or _processors()
    return 1 if _forked else _default


def resolve(num_threads: int | None) -> int:
    """Turn a ``num_threads`` argument into a positive number.

    >>> resolve(3)
    3
    >>> resolve(0)
    Traceback (most recent call last):
    pyembed.errors.ArgumentError: num_threads = 0; allowed: 1..1024, or None for ...
    """
    if num_threads is None:
        return default_num_threads()
    if isinstance(num_threads, bool) or not isinstance(num_threads, int):
        num_threads = 0
    if not 1 <= num_threads <= MAX_THREADS:
        raise ArgumentError(
            f"num_threads = {num_threads!r}; allowed: 1..{MAX_THREADS}, or None for "
            "PYEMBED_NUM_THREADS, OMP_NUM_THREADS or the processors of this process"
        )
    return num_threads


def for_work(floats: int, num_threads: int) -> int:
    """The threads worth using for a batch that touches this many floats."""
    if floats < SERIAL_FLOATS or _forked:
        return 1
    return num_threads


def _from_environment() -> int | None:
    for name in ("PYEMBED_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may list levels
        if value:
            if not (value.isascii() and value.isdigit() and 1 <= int(value) <= MAX_THREADS):
                raise ArgumentError(f"{name} = {value!r}; allowed: 1..{MAX_THREADS}; or unset it")
            return int(value)
    return None


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
    else:
        affinity = os.cpu_count() or 1
    return max(1, min(affinity, _cgroup_quota() or affinity))


def _cgroup_quota() -> int | None:
    """Processors of the control group's quota (v2, then v1), rounded up; None if unlimited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return -(-int(quota) // int(period))


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_core.pause_threads, after_in_child=_in_child)
