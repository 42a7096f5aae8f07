"""Number the calls of a run on the files of a table; die before or after the n-th, or fail it.

`Layer` is a file system on top of another one; everything that the suite injects is a layer.
`Calls` numbers each call that reads or changes a file, from 0. A change of rows makes no call,
because rows are stores to a mapping. So a process that dies at the next call, or at the point that
the program announces after each of its changes (`say("change", …)`), leaves the same files as one
that dies right after the store; these points are numbered too.

A run has one order of calls, because the work of the helper thread is done in turn. Only runs whose
calls are not numbered have the thread.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pyembed.storage import fs

NUMBERED = (
    *("open", "pread", "pwrite", "truncate", "allocate", "sync"),
    *("rename", "unlink", "mkdir", "rmdir"),
)
CHANGE = "change"  # the name of a point that the program announces


class Layer(fs.FileSystem):
    """Pass every call on to another file system, and know the path of each open file.

    Parameters
    ----------
    below : FileSystem, optional
        The real one if not given.

    Attributes
    ----------
    paths : dict of int to Path
        The path of each descriptor.
    """

    def __init__(self, below: fs.FileSystem | None = None) -> None:
        self.below = below or fs.FileSystem()
        self.paths: dict[int, Path] = {}

    def open(self, path: Path, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        fd = self.below.open(path, flags, mode, dir_fd=dir_fd)
        self.paths[fd] = path
        return fd

    def rename(self, source: Path, target: Path, *, dir_fd: int) -> None:
        self.below.rename(source, target, dir_fd=dir_fd)
        for fd, path in self.paths.items():
            if path.is_relative_to(source):
                self.paths[fd] = target / path.relative_to(source)

    def close(self, fd: int) -> None:
        self.paths.pop(fd, None)
        self.below.close(fd)

    def duplicate(self, fd: int) -> int:
        copy = self.below.duplicate(fd)
        self.paths[copy] = self.path_of(fd)
        return copy

    def path_of(self, fd: int) -> Path:
        """Return the path of an open file; an empty one, if another module opened it."""
        return self.paths.get(fd, Path())


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: Layer, *args: Any, **more: Any) -> Any:
        return getattr(self.below, name)(*args, **more)

    return method


for _name in vars(fs.FileSystem):
    if not _name.startswith("_") and _name not in vars(Layer):
        setattr(Layer, _name, _passed_on(_name))


class Task(Future[Any]):
    """A call that is made when its result is requested, or before."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call

    def run(self) -> None:
        try:
            self.set_result(self._call())
        except BaseException as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.run()
        return super().result(timeout)


class InTurn:
    """An executor without threads: it runs each task at once, and every third one late."""

    def __init__(self) -> None:
        self._given, self._waiting = 0, list[Task]()

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Task:
        self._given += 1
        task = Task(functools.partial(function, *args))
        self._waiting.append(task)
        if self._given % 3:
            self._run()
        return task

    def _run(self) -> None:
        while self._waiting:
            task = self._waiting.pop(0)
            if not task.done():
                task.run()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if not cancel_futures:
            self._run()
        self._waiting.clear()


class Calls(Layer):
    """Number the calls; subclasses act on them.

    Attributes
    ----------
    made : list of str
        The names of the calls so far.
    """

    def __init__(self, below: fs.FileSystem | None = None) -> None:
        super().__init__(below)
        self.made: list[str] = []

    def number(self, name: str, make: Callable[[], Any], args: tuple[Any, ...] = ()) -> Any:
        """Make a call as the next one of the run."""
        self.made.append(name)
        return self.act(len(self.made) - 1, name, make, args)

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make a call, or do something else."""
        return make()

    def say(self, word: str, number: int) -> None:
        """Hear what the program announces between its steps."""
        if word == CHANGE:
            self.number(CHANGE, lambda: None)

    def helper(self, name: str, num_threads: int) -> fs.Helper:
        return InTurn()


def _numbered(name: str) -> Callable[..., Any]:
    passed_on = getattr(Layer, name)

    def method(self: Calls, *args: Any, **more: Any) -> Any:
        return self.number(name, functools.partial(passed_on, self, *args, **more), args)

    return method


for _name in NUMBERED:
    setattr(Calls, _name, _numbered(_name))


def die() -> None:
    """End this process as the kernel would end it."""
    os.kill(os.getpid(), signal.SIGKILL)


class Fault(Calls):
    """Do something at one call.

    Parameters
    ----------
    at : int
    action : str
        "kill before", "kill after"; "short": a write takes half; the name of an errno: the call is
        not made, and fails; the same with " then kill": and the process dies after the next change
        of rows; "interrupt before", "interrupt after": KeyboardInterrupt.
    """

    def __init__(self, at: int, action: str) -> None:
        super().__init__()
        self.at, self.action = at, action
        self._doomed = False

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if number != self.at:
            if self._doomed and name == CHANGE:
                die()
            return make()
        word, _, then = self.action.partition(" ")
        self._doomed = then == "then kill"
        if word == "short" and name == "pwrite":
            return self._write_half(*args)
        if word in errno.errorcode.values() and name != CHANGE:
            code = getattr(errno, word)
            raise OSError(code, f"injected into {name}: {os.strerror(code)}")
        self._happen(word, then, "before")
        try:
            result = make()
        finally:
            if word == "kill":  # also where the call fails
                self._happen(word, then, "after")
        self._happen(word, then, "after")
        return result

    @staticmethod
    def _happen(word: str, then: str, moment: str) -> None:
        if then == moment and word == "kill":
            die()
        if then == moment and word == "interrupt":
            raise KeyboardInterrupt

    def _write_half(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        data = b"".join(parts)
        return self.below.pwrite(fd, [memoryview(data)[: max(1, len(data) // 2)]], at)
