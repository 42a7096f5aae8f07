"""Sweeps over kills, failures and damage. Each returns its number of cases and the bad ones."""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyembed import Table
from pyembed.errors import PyembedError
from pyembed.storage.journal import FIELDS, MAGIC, UNIT, file_name
from tests.crash import mutants, program, worker
from tests.crash.calls import Calls, Fault
from tests.crash.program import Plan, digest

DEATHS = ("kill before", "kill after")
FAILURES = (
    "EIO",
    "ENOSPC",
    "EINTR",
    "short",
    "interrupt before",
    "interrupt after",
    "ENOSPC then kill",
)
LITTLE = 96 << 20  # bytes of memory
BIG_BATCH = 6000  # each in a page of its own: 24 MB of them a step
LONG = 1800.0  # seconds: a whole sweep takes less
ROOT = Path("/dev/shm")  # what a dead process leaves does not depend on a disk


@dataclass
class Counts:
    """One line of the page of counts."""

    cell: str
    cases: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""

    def add(self, case: str, problem: str) -> None:
        self.cases += 1
        if problem:
            self.bad.append(f"{self.cell}, {case}: {problem}")


@dataclass(frozen=True)
class How:
    """How a sweep is run.

    Attributes
    ----------
    root : Path or None
        The folder for tables; None is the usual temporary folder.
    step, offset : int
        Take every step-th point, from `offset` on.
    mutant : str
        The mutant that is run; none if empty.
    until_bad : bool
        Stop at the first bad case.
    """

    root: Path | None = ROOT if ROOT.is_dir() else None
    step: int = 1
    offset: int = 0
    mutant: str = ""
    until_bad: bool = False

    def points(self, count: int) -> Iterator[int]:
        """Yield the points of 0..count-1 that are taken."""
        return iter(range(self.offset % self.step, count, self.step))

    def enough(self, counts: Counts) -> bool:
        """Whether the sweep may stop."""
        return self.until_bad and bool(counts.bad)


def names_of_calls(how: How, plan: Plan) -> list[str]:
    """Return the names of the calls of a run: of one without the mutant, if the mutant fails."""
    for mutant in (how.mutant, ""):
        with worker.scratch(how.root) as folder:
            ended = worker.run(folder, plan, Calls(), mutant)
            if ended.result:
                return list(ended.result)
    raise AssertionError(ended.error)


def random_kills(how: How, plans: Iterable[Plan], count: int) -> Counts:
    """Kill the process from outside, at a random time."""
    counts, rng = Counts("killed at a random time"), np.random.default_rng(how.offset)
    plans = list(plans)
    took = {}
    for plan in plans:
        with worker.scratch(how.root) as folder:
            start = time.monotonic()
            worker.run(folder, plan, mutant=how.mutant)
            took[plan] = time.monotonic() - start
    for number in range(count):
        plan = plans[number % len(plans)]
        delay = float(rng.uniform(0, took[plan]))
        with worker.scratch(how.root) as folder:
            worker.run(folder, plan, mutant=how.mutant, kill_after=delay)
            problem = worker.judge(folder, plan, how.mutant)
            counts.add(f"{plan}, after {delay:.4f} s", problem)
        if how.enough(counts):
            break
    return counts


def resumed(how: How, plans: Iterable[Plan], count: int) -> Counts:
    """Kill a run again and again and resume it: it must end as a run that was left alone."""
    counts, rng = Counts("resumed until the end"), np.random.default_rng(how.offset + 1)
    plans = list(plans)
    for number in range(count):
        plan = plans[number % len(plans)]
        with worker.scratch(how.root) as folder:
            ended, kills = worker.run(folder, plan, mutant=how.mutant, kill_after=0.01), 1
            while ended.signal:
                longer = float(rng.uniform(0.005, 0.05)) * (1 + kills / 20)
                ended = worker.run(folder, plan, mutant=how.mutant, kill_after=longer)
                kills += bool(ended.signal)
            problem = ended.error or worker.judge(folder, plan, how.mutant, resume=True)
            counts.add(f"{plan}, {kills} kills", problem)
    return counts


def _recover(folder: Path, calls: Calls, mutant: str) -> worker.Ended:
    def child() -> int:
        with mutants.installed(mutant, calls):
            Table.open(folder / "t.pyembed").close()
        return len(calls.made)

    return worker.in_child(child)


def dirty_tables(how: How, plan: Plan, every: int) -> Iterator[Path]:
    """Yield folders with a table whose writer died in the middle of a transaction."""
    for n in range(every // 2, len(names_of_calls(how, plan)), every):
        with worker.scratch(how.root) as folder:
            worker.run(folder, plan, Fault(n, "kill after"), how.mutant)
            manifest = folder / "t.pyembed" / "manifest.json"
            if manifest.exists() and b'"dirty"' in manifest.read_bytes():
                yield folder


def recovery_points(how: How, plans: Iterable[Plan], actions: Sequence[str]) -> Counts:
    """Recover the table of a dead writer; at every call, the process dies or the call fails."""
    counts = Counts(f"recovery {'killed at' if actions == DEATHS else 'with a failing'} call")
    for plan in plans:
        for folder in dirty_tables(how, plan, 25):
            with worker.scratch(how.root) as other:
                shutil.copytree(folder, other, dirs_exist_ok=True)
                number = _recover(other, Calls(), how.mutant).result or 0
            for n, action in itertools.product(how.points(number), actions):
                with worker.scratch(how.root) as other:
                    shutil.copytree(folder, other, dirs_exist_ok=True)
                    ended = _recover(other, Fault(n, action), how.mutant)
                    problem = _ending(ended, action)
                    problem = problem or worker.judge(other, plan, how.mutant, resume=n % 8 == 0)
                    counts.add(f"{plan}, {action} call {n}", problem)
                if how.enough(counts):
                    return counts
    return counts


def _ending(ended: worker.Ended, action: str) -> str:
    """Return the problem with a run that met a failure, unless its error is a promised one."""
    if action in DEATHS:
        return "" if ended.signal == signal.SIGKILL else f"it did not die: {ended.error}"
    if ended.signal:
        return "" if "kill" in action else f"signal {ended.signal}"
    return ended.error if ended.error and not ended.typed else ""


def faults(how: How, plans: Iterable[Plan], actions: Sequence[str] = FAILURES) -> Counts:
    """Kill the process at the n-th call, or fail that call, for every n.

    After a failure the caller ends, or goes on as a caller may.
    """
    counts = Counts("killed at a call" if actions == DEATHS else "a call fails")
    for plan in plans:
        for n, action in itertools.product(how.points(len(names_of_calls(how, plan))), actions):
            with worker.scratch(how.root) as folder:
                ended = worker.run(folder, plan, Fault(n, action), how.mutant)
                problem = _ending(ended, action)
                if not problem and plan.stubborn and ended.error and "interrupt" not in action:
                    problem = f"it did not get over one failure: {ended.error}"
                problem = problem or worker.judge(folder, plan, how.mutant, resume=n % 8 == 0)
                counts.add(f"{plan}, {action} at call {n}", problem)
            if how.enough(counts):
                return counts
    return counts


def kills_with_little_memory(how: How, count: int) -> Counts:
    """Kill a writer whose table is larger than its memory: the system writes dirty pages."""
    counts = Counts("killed at a random time, 150 MB of rows in 96 MiB of memory")
    plan = Plan(rows=300_000, dim=64, durability="process", transactions=4, batch=BIG_BATCH)
    rng = np.random.default_rng(how.offset)
    if not count:
        counts.note = "not in the short form"
        return counts
    with worker.memory_group(LITTLE) as group:
        if group is None:
            counts.note = "skipped: needs root and a memory control group"
            return counts
        with worker.scratch() as folder:
            start = time.monotonic()
            ended = worker.run(folder, plan, group=group)
            took = time.monotonic() - start
            problem = ended.error or worker.judge(folder, plan, group=group)
            counts.add("the run itself", problem)
        for _ in range(count):
            delay = float(rng.uniform(0.1, 1.0)) * took
            with worker.scratch() as folder:
                worker.run(folder, plan, kill_after=delay, group=group)
                problem = worker.judge(folder, plan, group=group)
                counts.add(f"{plan}, after {delay:.3f} s", problem)
    return counts


# --- damage -------------------------------------------------------------------------------------


def damage(how: How, plans: Iterable[Plan]) -> Counts:
    """Change a byte of the manifest, of the header of the rows, or of a journal header."""
    counts = Counts("a byte is another")
    for plan in plans:
        for folder in dirty_tables(how, plan, 60):
            collect(counts, functools.partial(_damage, folder / "t.pyembed", plan, how))
        with worker.scratch(how.root) as folder:
            worker.run(folder, plan)
            collect(counts, functools.partial(_damage, folder / "t.pyembed", plan, how))
    return counts


def _damage(path: Path, plan: Plan, how: How) -> list[list[str]]:
    found = []
    with Table.open(path, "r") as table:
        number = table.generation
        dirty = table.state == "dirty"
    places = [(path / "manifest.json", at) for at in range((path / "manifest.json").stat().st_size)]
    if dirty:
        frames = path / file_name(number)
        places += [(frames, at) for at in _header_bytes(frames)]
    else:
        # Few blanks are changed, because numpy takes half a second to refuse some headers.
        places += [(path / "rows.npy", at) for at in (*range(80), *range(80, 4096, 502), 4095)]
    for file, at in places[how.offset % how.step :: how.step]:
        whole = file.read_bytes()
        for flip in (0x01, 0x10, 0xFF):
            with file.open("r+b") as stream:
                stream.seek(at)
                stream.write(bytes([whole[at] ^ flip]))
            try:
                with Table.open(path, "r") as table:
                    right = digest(table) == program.oracle(plan)[number]
                problem = "" if right else "other rows"
            except PyembedError:
                problem = ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            found.append([f"{plan}, {file.name} byte {at} ^ {flip}", problem])
        file.write_bytes(whole)
    return found


def _header_bytes(path: Path) -> Iterator[int]:
    """Yield the offsets of the headers of frames that a later one says are safe.

    Damage to any other frame looks like a write that a crash cut short.
    """
    data, at, headers = path.read_bytes(), 0, []
    salt = data[8:16]
    while data[at : at + 8] == MAGIC and data[at + 8 : at + 16] == salt:
        header = FIELDS.unpack_from(data, at)
        headers.append((at, header[4]))
        at += header[5]
    settled = headers[-1][1]
    for at, _ in headers[:settled]:
        yield from range(at, at + UNIT)


def collect(counts: Counts, child: Callable[[], list[list[str]]]) -> None:
    """Add the cases that a child process has judged."""
    ended = worker.in_child(child, kill_after=LONG)
    if ended.signal or ended.error:  # the sweep itself is broken, not the table
        raise AssertionError(f"{counts.cell}: signal {ended.signal} {ended.error}")
    for case, problem in ended.result or []:
        counts.add(case, problem)
