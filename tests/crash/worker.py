"""Run one case in a process that is forked from one that has imported everything.

A fork takes about two milliseconds and a new Python a third of a second; both are processes that
can be killed. Nothing here starts threads, so a fork is safe.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing.synchronize  # noqa: F401  tqdm would import it in every child
import os
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyembed.errors import DirtyError, PyembedError
from tests.crash import mutants, program
from tests.crash.calls import Calls
from tests.crash.program import Log, Plan

NAME = "pyembed-crash-"  # prefix of folders and control groups; the process number follows
GROUPS = Path("/sys/fs/cgroup")
GROUPS = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
PATIENCE = 60.0  # seconds: a run takes less than one


class Ended(NamedTuple):
    """How a child ended: its signal or 0, its result, its error, and whether that is promised."""

    signal: int
    result: Any
    error: str
    typed: bool


def in_child(
    function: Callable[[], Any], kill_after: float | None = None, group: Path | None = None
) -> Ended:
    """Run a function in a forked child.

    Parameters
    ----------
    function : function without arguments
        Its result is sent as JSON.
    kill_after : float, optional
        Seconds until the child is killed; `PATIENCE` if not given.
    group : Path, optional
        A control group that the child joins, which limits its memory.
    """
    reading, writing = os.pipe()
    gc.freeze()  # a child's collector would copy all that it looks at
    child = os.fork()
    if child == 0:
        _answer(function, writing, group)
    os.close(writing)
    text, end = b"", time.monotonic() + (PATIENCE if kill_after is None else kill_after)
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(reading, 1 << 20)
        if not piece:
            break
        text += piece
    os.close(reading)
    _, status = os.waitpid(child, 0)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    answer = json.loads(text) if text and not number else {}
    return Ended(number, answer.get("result"), answer.get("error", ""), answer.get("typed", False))


def _answer(function: Callable[[], Any], writing: int, group: Path | None) -> None:
    """In the child: send the outcome, and end without anything that Python does at exit."""
    answer = {}
    try:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        answer = {"result": function()}
    except BaseException as error:
        typed = isinstance(error, (OSError, PyembedError, KeyboardInterrupt))
        answer = {"error": traceback.format_exc(), "typed": typed}
    with contextlib.suppress(BaseException):
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(writing, data) :]
    os._exit(0)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """Make a control group that limits memory to so many bytes; None where that is impossible."""
    old = GROUPS.name == "memory"
    group = GROUPS / f"{NAME}{os.getpid()}"
    try:
        group.mkdir()
        file = "memory.limit_in_bytes" if old else "memory.max"
        (group / file).write_text(str(limit))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):  # it stays busy for a moment
                group.rmdir()
                break
            time.sleep(0.1)


def leave_memory_group() -> None:
    """Leave the control group of a sweep: a process that serves a disk must not be short of memory.

    The system would make it wait until dirty pages are written, and it is the one to write them.
    """
    with contextlib.suppress(OSError):  # without root there is no group to leave
        (GROUPS / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def scratch(root: Path | None = None) -> Iterator[Path]:
    """Make a folder for one case."""
    folder = Path(tempfile.mkdtemp(prefix=f"{NAME}{os.getpid()}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove folders and control groups of runs that were killed."""
    for parent in (root, Path(tempfile.gettempdir()), GROUPS):
        for left in parent.glob(f"{NAME}*"):
            number = left.name.removeprefix(NAME).partition("-")[0]
            if number.isdigit() and not Path("/proc", number).exists():
                if parent == GROUPS:
                    with contextlib.suppress(OSError):
                        left.rmdir()
                else:
                    shutil.rmtree(left, ignore_errors=True)


def run(
    folder: Path,
    plan: Plan,
    calls: Calls | None = None,
    mutant: str = "",
    kill_after: float | None = None,
    group: Path | None = None,
) -> Ended:
    """Train in a child; its result is the names of the calls that it made."""

    def child() -> list[str]:
        with mutants.installed(mutant, calls):
            program.train(folder / "t.pyembed", plan, Log(folder / "log", calls).say)
        return calls.made if calls is not None else []

    return in_child(child, kill_after, group)


def judge(
    folder: Path, plan: Plan, mutant: str = "", resume: bool = False, group: Path | None = None
) -> str:
    """Return the problem with the files that a run left, or ""."""
    program.oracle(plan)  # once, and not in every child

    def child() -> dict[str, Any]:
        said = program.read_log(folder / "log")
        try:
            with mutants.installed(mutant) as broken:
                return program.judge(folder / "t.pyembed", plan, said, resume, broken.changed_rows)
        except DirtyError:
            if plan.durability != "none":  # "none" promises to notice, and no more
                raise
            return {"bad": ""}

    ended = in_child(child, group=group)
    if ended.signal or ended.error:
        return f"signal {ended.signal}" if ended.signal else ended.error
    return str(ended.result["bad"])
