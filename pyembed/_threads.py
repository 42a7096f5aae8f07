"""The number of threads of a call: what ``num_threads=None`` means, and when one thread is enough.

Only this module decides; below it the number of threads is an argument. Nothing starts at import:
the first parallel kernel starts the pool.

libgomp's pool does not survive `os.fork`: a child that inherits a started pool hangs in its first
parallel region. Therefore the pool is released before a fork, and the child uses one thread.

libgomp ends the process if the system allows it no more threads. Therefore `startable` starts that
many before libgomp does, and a call makes do with fewer.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Mapping

from pyembed import _cgroup, _core
from pyembed.errors import ArgumentError

# Below this many floats a parallel region costs more than it saves: waking a spinning pool takes
# about 2 µs, and one core moves 32768 floats from its caches in about 5 µs (EPYC 9005).
SERIAL_FLOATS = 32768

MAX_THREADS = 1024  # more than any machine can use

_forked = False


def default_num_threads() -> int:
    """The number of threads for ``num_threads=None``: `choose`, once per process.

    Returns
    -------
    int
        1 in a child process that was forked.

    Raises
    ------
    ArgumentError
        If an environment variable is not a positive integer.
    """
    return 1 if _forked else _default()


@functools.cache
def _default() -> int:
    return choose(os.environ)


def choose(environment: Mapping[str, str]) -> int:
    """Choose the default number of threads.

    ``PYEMBED_NUM_THREADS`` decides if it is set, else ``OMP_NUM_THREADS``, else the processors
    that this process may run on, limited by the CPU quota of its control groups.

    Parameters
    ----------
    environment : mapping of str to str
        The environment variables.

    Returns
    -------
    int

    Raises
    ------
    ArgumentError
        If a variable is not a positive integer.

    Examples
    --------
    >>> choose({"OMP_NUM_THREADS": "4,2"})
    4
    """
    for name in ("PYEMBED_NUM_THREADS", "OMP_NUM_THREADS"):
        value = environment.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may list levels
        if value:
            if not (value.isascii() and value.isdigit() and 1 <= int(value) <= MAX_THREADS):
                raise ArgumentError(f"{name} = {value!r}; allowed: 1..{MAX_THREADS}; or unset it")
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return max(1, min(processors, _cgroup.cpu_quota() or processors))


def resolve(num_threads: int | None) -> int:
    """Turn a ``num_threads`` argument into a positive number.

    Parameters
    ----------
    num_threads : int or None
        None stands for `default_num_threads`.

    Returns
    -------
    int

    Raises
    ------
    ArgumentError
        If it is not in 1..1024.

    Examples
    --------
    >>> resolve(3)
    3
    >>> resolve(0)
    Traceback (most recent call last):
    pyembed.errors.ArgumentError: num_threads = 0; allowed: 1..1024, or None for ...
    """
    if num_threads is None:
        return startable(default_num_threads())
    if isinstance(num_threads, bool) or not isinstance(num_threads, int):
        num_threads = 0
    if not 1 <= num_threads <= MAX_THREADS:
        raise ArgumentError(
            f"num_threads = {num_threads!r}; allowed: 1..{MAX_THREADS}, or None for "
            "PYEMBED_NUM_THREADS, OMP_NUM_THREADS or the processors of this process"
        )
    return startable(num_threads)


def startable(num_threads: int) -> int:
    """The number of threads that a call can use, its own included, under the system's limits.

    Parameters
    ----------
    num_threads : int
        The number that is wanted.

    Returns
    -------
    int
        1 .. `num_threads`. It is found out once for each number and calling thread, as each has a
        pool of its own.
    """
    return _try_to_start(num_threads, threading.get_ident())


@functools.lru_cache(maxsize=256)
def _try_to_start(num_threads: int, caller: int) -> int:
    end, started = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(num_threads - 1):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):  # a limit of the user, of the container or of memory
        pass
    end.set()
    for thread in started:
        thread.join()
    if started:
        time.sleep(0.001)  # a joined thread counts until the system has removed it
    return len(started) + 1


def for_work(floats: int, num_threads: int) -> int:
    """The number of threads worth using for a batch that touches this many floats.

    Parameters
    ----------
    floats : int
        The number of float32 values that the call reads or writes.
    num_threads : int
        The most threads that the caller allows.

    Returns
    -------
    int
        1, or `num_threads`.
    """
    if floats < SERIAL_FLOATS or _forked:
        return 1
    return startable(num_threads)


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_core.pause_threads, after_in_child=_in_child)
