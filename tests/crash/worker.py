"""One run in a process of its own, forked from one that has imported everything.

A fork takes about two milliseconds, a new Python a third of a second; what dies is a process
either way. Nothing here starts threads, so that a fork is safe.
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

NAME = "pyembed-crash-"  # of folders and control groups; then the number of the process
GROUPS = Path("/sys/fs/cgroup")
GROUPS = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
PATIENCE = 60.0  # seconds: a run takes less than one


class Ended(NamedTuple):
    """How a child ended: the signal or 0, what it returned, and its error's text."""

    signal: int
    result: Any
    error: str
    typed: bool


def in_child(
    function: Callable[[], Any], kill_after: float | None = None, group: Path | None = None
) -> Ended:
    """Run it in a fork; kill that after some seconds if so asked, and in any case at last.

    `group` is a control group that the child joins, which limits its memory.
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
    """In the child: send what came out, and end without anything that Python does at exit."""
    send, answer = os.write, {}
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
            data = data[send(writing, data) :]
    os._exit(0)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A control group with so many bytes of memory; None where it cannot be made."""
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
            with contextlib.suppress(OSError):  # busy, for a moment after the last of it died
                group.rmdir()
                break
            time.sleep(0.1)


@contextlib.contextmanager
def scratch(root: Path | None = None) -> Iterator[Path]:
    """A folder for one case."""
    folder = Path(tempfile.mkdtemp(prefix=f"{NAME}{os.getpid()}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """What runs that were killed have left: folders and control groups of processes long gone."""
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
    """Train in a child; returns the names of the calls that it made, if it lived."""

    def child() -> list[str]:
        mutants.apply(mutant)
        log = Log(folder / "log")
        if calls is not None:
            calls.install()
        program.train(folder / "t.pyembed", plan, log.say)
        return calls.names if calls is not None else []

    return in_child(child, kill_after, group)


def judge(
    folder: Path, plan: Plan, mutant: str = "", resume: bool = False, group: Path | None = None
) -> str:
    """What is wrong with what a run left, or ""."""
    program.oracle(plan)  # once, and not in every child

    def child() -> dict[str, Any]:
        mutants.apply(mutant)
        said = program.read_log(folder / "log")
        try:
            return program.judge(folder / "t.pyembed", plan, said, resume)
        except DirtyError:
            if plan.durability != "none":  # which promises no more than to notice
                raise
            return {"bad": ""}

    ended = in_child(child, group=group)
    if ended.signal or ended.error:
        return f"signal {ended.signal}" if ended.signal else ended.error
    return str(ended.result["bad"])
