"""The system calls of a run, numbered from 0: to die before or after the n-th, or to fail it.

Every call that changes or reads a file of a table passes here, and every kernel that changes rows
(as `kernel`). It is installed in a process that is thrown away. A run has one order of calls: what
the helper thread would do is done in turn; runs without numbered calls have the thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from pyembed import _core
from pyembed.storage import transaction

WRITES = ("write", "pwrite", "pwritev")
CHANGES = (
    *WRITES,
    "open",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "mkdir",
)
READS = ("pread", "preadv")
KERNELS = ("update", "scatter_add", "add_groups", "renorm")
REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in (*CHANGES, *READS)}
REAL_KERNELS: dict[str, Callable[..., Any]] = {name: getattr(_core, name) for name in KERNELS}
REAL_HELPER: Any = transaction.ThreadPoolExecutor


class Helper:
    """Does what it is given at once; every third time late: before what it is given next."""

    def __init__(self, *_: Any) -> None:
        self._given, self._waiting = 0, list[tuple[Callable[..., Any], Any]]()

    def submit(self, task: Callable[..., Any], *args: Any) -> None:
        self._given += 1
        self._waiting.append((task, args))
        while self._given % 3 and self._waiting:
            task, args = self._waiting.pop(0)
            with contextlib.suppress(BaseException):  # as of a thread: nobody asks for the result
                task(*args)

    def shutdown(self, **_: Any) -> None:
        self._waiting.clear()


class Calls:
    """Counts; subclasses act.

    Attributes
    ----------
    names : list of str
        Of the calls so far.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def install(self) -> None:
        for name, real in REAL.items():
            setattr(os, name, self._wrap(name, real))
        for name, real in REAL_KERNELS.items():
            setattr(_core, name, self._wrap("kernel", real))
        transaction.ThreadPoolExecutor = Helper  # type: ignore

    @staticmethod
    def uninstall() -> None:
        for name, real in REAL.items():
            setattr(os, name, real)
        for name, real in REAL_KERNELS.items():
            setattr(_core, name, real)
        transaction.ThreadPoolExecutor = REAL_HELPER  # type: ignore

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            number = len(self.names)
            self.names.append(name)
            return self.act(number, name, lambda: real(*args, **more), args)

        return call

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        return make()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(Calls):
    """Does something at one call.

    Parameters
    ----------
    at : int
    action : str
        "kill before", "kill after"; "short": a write takes half; an errno's name: the call is not
        made, and fails; the same with " then kill": and the process dies after the next change of
        rows; "interrupt before", "interrupt after": KeyboardInterrupt.
    """

    def __init__(self, at: int, action: str) -> None:
        super().__init__()
        self.at, self.action = at, action
        self._doomed = False

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if number != self.at:
            result = make()
            if self._doomed and name == "kernel":
                die()
            return result
        word, _, then = self.action.partition(" ")
        self._doomed = then == "then kill"
        if word == "short" and name in WRITES:
            return self._short(name, args)
        if word in errno.errorcode.values() and name != "kernel":
            code = getattr(errno, word)
            raise OSError(code, f"injected into {name}: {os.strerror(code)}")
        if (word, then) == ("kill", "before"):
            die()
        if (word, then) == ("interrupt", "before"):
            raise KeyboardInterrupt
        try:
            result = make()
        finally:
            if (word, then) == ("kill", "after"):  # also where the call fails
                die()
        if (word, then) == ("interrupt", "after"):
            raise KeyboardInterrupt
        return result

    @staticmethod
    def _short(name: str, args: tuple[Any, ...]) -> int:
        fd, data, *at = args
        data = b"".join(data) if name == "pwritev" else bytes(data)
        half = data[: max(1, len(data) // 2)]
        return int(REAL["pwrite"](fd, half, *at) if at else REAL["write"](fd, half))
