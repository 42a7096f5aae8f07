"""File systems for tests: each watches the calls on a table's files, or makes one of them fail.

A test installs one with ``fs.using(system)``; every table that is opened in that block keeps it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

from pyembed.storage import fs


class Watched(fs.FileSystem):
    """Gives each call to `act`, which by default makes it.

    Attributes
    ----------
    calls : list of str
        The names of the calls so far.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def act(self, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make the call, or do something else; `args` are those of the method."""
        return make()


def _passing(name: str) -> Callable[..., Any]:
    real = getattr(fs.FileSystem, name)

    def call(self: Watched, *args: Any, **options: Any) -> Any:
        self.calls.append(name)
        return self.act(name, lambda: real(self, *args, **options), args)

    return call


for _name in [name for name in vars(fs.FileSystem) if not name.startswith("_")]:
    setattr(Watched, _name, _passing(_name))


class Faults(Watched):
    """Makes calls fail, once they are asked to: see `fail`."""

    def __init__(self) -> None:
        super().__init__()
        self._fault: tuple[str, int, BaseException, Callable[..., bool]] | None = None

    def fail(
        self,
        name: str,
        after: int = 0,
        error: int | BaseException = errno.EIO,
        when: Callable[..., bool] = lambda *args: True,
    ) -> None:
        """Let all calls of a name fail for which `when` holds, but the first ones of them.

        Parameters
        ----------
        name
            A method of `fs.FileSystem`; "" for none: the system works again.
        after
            How many of them succeed before.
        error
            An exception, or an errno.
        when
            Gets the arguments of the call.
        """
        raised = OSError(error, "injected") if isinstance(error, int) else error
        self._fault = (name, after, raised, when)

    def work(self) -> None:
        """Let no call fail any more."""
        self._fault = None

    def act(self, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if self._fault is not None and name == self._fault[0] and self._fault[3](*args):
            _, left, error, when = self._fault
            if left == 0:
                raise error
            self._fault = (name, left - 1, error, when)
        return make()


class Unsynced(fs.FileSystem):
    """Syncs nothing: for tests in which no machine dies."""

    def sync(self, fd: int) -> None:
        """Return at once."""


class HeldHelper(Faults):
    """Can hold the helper of a transaction up in a sync, until `go_on`, and then fail it.

    Attributes
    ----------
    syncs : list of bool
        Of each sync so far, whether the helper made it.
    helpers : list of Helper
        One for each table that was opened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[bool] = []
        self.helpers: list[fs.Helper] = []
        self._begun, self._go_on = threading.Event(), threading.Event()
        self._holds = self._fails = False

    def hold(self, fails: bool = False) -> None:
        """From now on, hold the helper up."""
        self._holds, self._fails = True, fails

    def act(self, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make the call; in a sync on the helper, wait before."""
        if name == "sync":
            self.syncs.append(on_helper())
            if self._holds and on_helper():
                self._begun.set()
                self._go_on.wait()
                if self._fails:
                    raise OSError(errno.EIO, "injected")
        done = super().act(name, make, args)
        if name == "helper" and args[0] == "pyembed-journal":
            self.helpers.append(done)
        return done

    def wait_until_held(self) -> None:
        """Return once the helper is held up."""
        self._begun.wait()

    def go_on(self, after: float = 0.0) -> None:
        """Let the helper go on, some seconds later."""
        threading.Timer(after, self._go_on.set).start()

    @property
    def is_holding(self) -> bool:
        """Whether the helper may not go on yet."""
        return not self._go_on.is_set()


def on_helper() -> bool:
    """Whether this is the helper thread of a transaction."""
    return threading.current_thread().name.startswith("pyembed-journal")
