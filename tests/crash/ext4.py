"""The sweeps of power cuts on a real ext4: the kernel's own journal decides what is left.

There are two ways. First, the writes and flushes of a run are recorded below ext4 (`logdisk`). The
disk is built as it may be after each of them and is mounted, so that the kernel replays its
journal. Second, ext4 is shut down during a run, which forgets everything that did not reach the
device.

The model of the disk: a flush that returned makes the writes before it safe. Any sectors of later
writes may be there, whole or torn at any byte. Some blocks are there whole or not at all, because
ext4 refuses a disk where they are torn, and no table can help that: the superblock, the list of
groups, and the blocks that commit the kernel's journal.

While a program runs, the suite plays the rest of the machine: pages are written back at random, and
other programs sync, which commits the transactions of ext4's journal.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.crash import disk, logdisk, mounts, mutants, program, worker
from tests.crash.calls import Calls, die
from tests.crash.cells import Counts, How, collect, names_of_calls
from tests.crash.cuts import judge_cut, short
from tests.crash.logdisk import BLOCK, Event, sparse
from tests.crash.program import Log, Plan

FIRST = 2 * BLOCK  # bytes: the superblock and the list of groups
# How blocks of ext4's journal begin: a commit record, and the journal's own superblock.
COMMIT, SUPERBLOCK = bytes.fromhex("c03b3998 00000002"), bytes.fromhex("c03b3998 00000004")
Pieces = list[tuple[int, bytes]]
Say = Callable[[str, int], None]
Program = Callable[[Path, Say], object]  # of a mounted ext4


class Machine(Calls):
    """Before a call, write back pages at random, or sync another file, as a busy machine does.

    Parameters
    ----------
    top : Path
        The mount point.
    seed : int
    shut_down_at : int
        The number of the call before which the file system is shut down, and the process dies.
    """

    def __init__(self, top: Path, seed: int, shut_down_at: int = -1) -> None:
        super().__init__()
        self._top, self._shut_down_at = top, shut_down_at
        self._rng = np.random.default_rng(seed)
        self._other = os.open(top / "other", os.O_RDWR | os.O_CREAT)

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if number == self._shut_down_at:
            mounts.shut_down(self._other)
            die()
        choice = int(self._rng.integers(16))
        if choice < 4:
            self._write_back()
        elif choice == 4:
            os.pwrite(self._other, b"x", number)
            os.fsync(self._other)
        return make()

    def _write_back(self) -> None:
        files = sorted((self._top / "t.pyembed").glob("*"))
        if files:
            file = files[int(self._rng.integers(len(files)))]
            fd = os.open(file, os.O_RDONLY)
            mounts.write_back(fd)
            os.close(fd)


@functools.cache
def image() -> np.ndarray:
    """Return an empty ext4."""
    with tempfile.TemporaryDirectory() as folder:
        mounts.make_ext4(Path(folder) / "disk")
        return sparse((Path(folder) / "disk").read_bytes())


@functools.cache
def missing() -> str:
    """Name what this machine lacks for these sweeps, or ""."""
    if os.geteuid():
        return "needs root"
    for path in ("/dev/fuse", "/dev/loop-control"):
        if not Path(path).exists():
            return f"needs {path}"
    if shutil.which("mkfs.ext4", path=mounts.SBIN) is None:
        return "needs mkfs.ext4 (e2fsprogs)"

    def attempt() -> str:
        try:
            mounts.alone()
            with worker.scratch() as folder:
                _record(folder, image(), lambda top, say: say("ack", 0))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ENODEV):
                raise
            return f"needs the right to mount ext4 and FUSE ({error})"
        return ""

    ended = worker.in_child(attempt)
    if ended.error:
        raise AssertionError(ended.error)
    return str(ended.result)


def _record(
    root: Path,
    start: np.ndarray,
    run: Program,
    options: str = "",
    fail_at: int = -1,
) -> tuple[list[Event], worker.Ended]:
    """Run a program on a file system in a new process; return what reached the disk."""
    with (
        logdisk.serving(root / "fuse", start, fail_at) as events,
        mounts.Loop(root / "fuse" / "disk") as loop,
        mounts.mounted(loop.path, root / "ext4", "ext4", options) as top,
    ):
        ended = worker.in_child(lambda: run(top, Log(root / "fuse" / "said").say))
    return events, ended


def _trained(plan: Plan, mutant: str, shut_down_at: int = -1) -> Program:
    def run(top: Path, say: Say) -> None:
        machine = Machine(top, plan.seed, shut_down_at)

        def tell(word: str, number: int) -> None:
            machine.say(word, number)
            say(word, number)

        with mutants.installed(mutant, machine):
            program.train(top / "t.pyembed", plan, tell)

    return run


class Disk:
    """Replay events, build the possible states of the disk, and judge each one through the kernel.

    Parameters
    ----------
    root : Path
        A folder for the image and the mount.
    start : uint8 array
    plan : Plan
    mutant : str
    said : list of (str, int)
        Announcements before the first event.
    """

    def __init__(
        self, root: Path, start: np.ndarray, plan: Plan, mutant: str, said: list[Any] | None = None
    ) -> None:
        self._root, self._plan, self._mutant = root, plan, mutant
        self.safe = sparse(start)
        self.pending: list[Event] = []
        self.said: list[tuple[str, int]] = list(said or [])
        self._known: dict[Any, str] = {}  # problems since the last flush: many states are equal
        (root / "disk").write_bytes(start.tobytes())
        self._file: np.ndarray = np.memmap(root / "disk", np.uint8, "r+")

    def apply(self, event: Event) -> None:
        """Take the next event."""
        if event[0] == "say":
            self.said.append((event[1], event[2]))
        elif event[0] == "write":
            self.pending.append(event)
        elif event[0] == "flush":
            _put(self.safe, self.kept("all", 0))
            self.pending, self._known = [], {}

    def kept(self, mode: str, number: int) -> Pieces:
        """Draw the pieces of the writes since the last flush that are there."""
        if mode == "none":
            return []
        if mode == "all":
            return [(at, data) for _, at, data in self.pending]
        rng, found = np.random.default_rng([number, len(mode)]), []
        for _, at, data in self.pending:
            for start in range(at, at + len(data), BLOCK):
                block = ("write", start, data[start - at : start - at + BLOCK])
                if start < FIRST or block[2].startswith((COMMIT, SUPERBLOCK)):
                    found += [block] if rng.integers(2) else []
                else:
                    found += disk.parts(block, b"", mode, rng)
        return [(at, data) for _, at, data in found]

    def built(self, mode: str, number: int) -> np.ndarray:
        """Return the disk in a possible state."""
        whole = sparse(self.safe)
        _put(whole, self.kept(mode, number))
        return whole

    def problem(self, loop: mounts.Loop, pieces: Pieces) -> str:
        """Return the problem with a possible state, or ""."""
        key = hashlib.blake2b(pickle.dumps((pieces, program.allowed(self.said)))).digest()
        if key not in self._known:
            self._file[:] = self.safe
            _put(self._file, pieces)
            top = self._root / "ext4"
            self._known[key] = _look(loop, top, self._plan, self._mutant, self.said)
        return self._known[key]

    def look_everywhere(self, events: list[Event], how: How) -> list[list[str]]:
        """Return [case, problem] for each prefix of the events in each mode."""
        found = []
        with mounts.Loop(self._root / "disk") as loop:
            for number, event in enumerate(events):
                self.apply(event)
                if number % how.step != how.offset % how.step:
                    continue
                for mode in disk.MODES:
                    problem = self.problem(loop, self.kept(mode, number))
                    found.append([f"{self._plan}, event {number} {event[0]}, {mode}", problem])
                    if problem and how.until_bad:
                        return found
        return found

    def look_at_commits(self, events: list[Event], what: str) -> list[list[str]]:
        """Judge the commits after a failed write, and the end: with all that was written, or only
        what was flushed."""
        found, failed = [], False
        with mounts.Loop(self._root / "disk") as loop:
            for number, event in enumerate(events):
                self.apply(event)
                failed = failed or event[0] == "fail"
                if failed and (event[:2] == ("say", "ack") or number == len(events) - 1):
                    for mode in ("none", "all"):
                        problem = self.problem(loop, self.kept(mode, number))
                        found.append([f"{what}, cut after event {number}, {mode}", problem])
        return found


def _put(target: np.ndarray, pieces: Pieces) -> None:
    for at, data in pieces:
        target[at : at + len(data)] = np.frombuffer(data, np.uint8)


def _look(loop: mounts.Loop, top: Path, plan: Plan, mutant: str, said: list[Any]) -> str:
    """Mount the disk and open the table; return the problem, or ""."""

    def child() -> str:
        return judge_cut(top / "t.pyembed", plan, said, mutant)

    loop.forget()
    try:
        with mounts.mounted(loop.path, top, "ext4"):
            ended = worker.in_child(child)
    except OSError as error:
        return f"the file system: {error}"
    if ended.signal or ended.error:
        return f"signal {ended.signal} {ended.error}"
    return str(ended.result)


def _options(plan: Plan) -> str:
    """Return mount options: half of the programs run without ext4's care for replaced files."""
    return ("", "noauto_da_alloc")[(plan.seed + plan.seed // 2) % 2]


def _sweep(
    counts: Counts, plans: Iterable[Plan], how: How, one: Callable[[Path, Plan], list[list[str]]]
) -> Counts:
    """Run a sweep for each plan, in a new process with its own mounts."""
    counts.note = missing() and f"skipped: {missing()}"
    for plan in () if counts.note else plans:
        program.oracle(plan)
        image()
        with worker.scratch(how.root) as root:

            def child(root: Path = root, plan: Plan = plan) -> list[list[str]]:
                mounts.alone()
                return one(root, plan)

            collect(counts, child)
        if how.enough(counts):
            break
    return counts


def _ending(ended: worker.Ended, case: str) -> list[list[str]]:
    problem = f"signal {ended.signal} {ended.error}" if ended.signal or ended.error else ""
    return [[case, problem]]


def cuts(how: How, plans: Iterable[Plan]) -> Counts:
    """Cut the power after each write and flush of a run."""

    def one(root: Path, plan: Plan) -> list[list[str]]:
        events, ended = _record(root, image(), _trained(plan, how.mutant), _options(plan))
        found = [] if how.mutant else _ending(ended, f"{plan}, the run itself")
        return found + Disk(root, image(), plan, how.mutant).look_everywhere(events, how)

    return _sweep(Counts("power cut on ext4"), plans, how, one)


def cuts_in_recovery(how: How, plans: Iterable[Plan], every: int) -> Counts:
    """Cut the power while a table is recovered from an earlier cut, and in what follows."""

    def one(root: Path, plan: Plan) -> list[list[str]]:
        events, _ = _record(root, image(), _trained(plan, how.mutant), _options(plan))
        first, found = Disk(root, image(), plan, how.mutant), []
        for number, event in enumerate(events):
            first.apply(event)
            if number % every == every // 2 and first.said:
                start, said = first.built("half", number), first.said
                again = _trained(short(plan, said), how.mutant)
                more, _ = _record(root, start, again, _options(plan))
                second = Disk(root, start, plan, how.mutant, said)
                found += second.look_everywhere(more, how)
            if how.until_bad and any(problem for _, problem in found):
                break
        return found

    return _sweep(Counts("power cut in a recovery on ext4"), plans, how, one)


def failed_writes(how: How, plans: Iterable[Plan]) -> Counts:
    """Fail a write to the disk; the caller goes on as a caller may; cut the power at commits."""

    def one(root: Path, plan: Plan) -> list[list[str]]:
        found, run = [], _trained(plan, how.mutant)
        events, _ = _record(root, image(), run, _options(plan))
        kinds = [event[0] for event in events]
        first, count = kinds[: kinds.index("say")].count("write"), kinds.count("write")
        for n in list(range(first, count))[how.offset % how.step :: how.step]:
            events, ended = _record(root, image(), run, _options(plan), fail_at=n)
            if ended.signal or (ended.error and not ended.typed):
                found += _ending(ended, f"{plan}, write {n} fails")
            after = Disk(root, image(), plan, how.mutant)
            found += after.look_at_commits(events, f"{plan}, write {n} fails")
            if how.until_bad and any(problem for _, problem in found):
                break
        return found

    return _sweep(Counts("a write fails on ext4, then power cut"), plans, how, one)


def shutdowns(how: How, plans: Iterable[Plan], count: int) -> Counts:
    """Shut down the file system before each call of a run, and at random times."""

    def one(root: Path, plan: Plan) -> list[list[str]]:
        took = time.monotonic()
        number = len(names_of_calls(how, plan))
        took, rng = time.monotonic() - took, np.random.default_rng(plan.seed)
        moments = [("call", float(n)) for n in how.points(number)]
        moments += [("second", float(rng.uniform(0, 2 * took))) for _ in range(count)]
        found = []
        for kind, when in moments:
            problem = _shut_down(root, plan, how.mutant, kind, when)
            found.append([f"{plan}, shut down at {kind} {when:.4f}", problem])
            if problem and how.until_bad:
                break
        return found

    return _sweep(Counts("ext4 shut down"), plans, how, one)


def _shut_down(root: Path, plan: Plan, mutant: str, kind: str, when: float) -> str:
    log, top = root / "log", root / "ext4"
    log.unlink(missing_ok=True)
    (root / "disk").write_bytes(image().tobytes())
    with mounts.Loop(root / "disk") as loop:
        with mounts.mounted(loop.path, top, "ext4", _options(plan)):
            if kind == "call":
                worker.in_child(lambda: _trained(plan, mutant, int(when))(top, Log(log).say))
            else:
                plug = os.fork()
                if plug == 0:
                    time.sleep(when)
                    mounts.shut_down(os.open(top, os.O_RDONLY))
                    os._exit(0)
                worker.in_child(lambda: _trained(plan, mutant)(top, Log(log).say), when + 0.02)
                os.waitpid(plug, 0)
        return _look(loop, top, plan, mutant, program.read_log(log))
