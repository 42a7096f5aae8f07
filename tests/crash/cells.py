"""The sweeps. Each returns how many cases there were, and which were bad.

`step` thins a sweep out: every step-th point. `mutant` breaks what is run.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crash import disk, mutants, program, worker
from crash.calls import Calls, Fault
from crash.program import Plan
from pyembed import Table, store
from pyembed.errors import DirtyError, PyembedError

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
ROOT = Path("/dev/shm")  # what a dead process leaves does not depend on a disk


@dataclass
class Counts:
    """One line of the page of counts."""

    cell: str
    cases: int = 0
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, case: str, problem: str) -> None:
        self.cases += 1
        if problem:
            self.bad.append(f"{self.cell}, {case}: {problem}")


@dataclass(frozen=True)
class How:
    """What a sweep is run with. `root`: where the tables lie; None is the usual temporary folder."""

    root: Path | None = ROOT if ROOT.is_dir() else None
    step: int = 1
    offset: int = 0
    mutant: str = ""
    until_bad: bool = False

    def points(self, count: int) -> Iterator[int]:
        return iter(range(self.offset % self.step, count, self.step))

    def enough(self, counts: Counts) -> bool:
        return self.until_bad and bool(counts.bad)


def _calls_of(how: How, plan: Plan) -> int:
    with worker.scratch(how.root) as folder:
        ended = worker.run(folder, plan, Calls(), how.mutant)
        return len(ended.result) if ended.result else 0


def kill_points(how: How, plans: Iterable[Plan]) -> Counts:
    """The process kills itself before, and after, the n-th call, for every n."""
    counts = Counts("killed at a call")
    for plan in plans:
        for n, action in itertools.product(how.points(_calls_of(how, plan)), DEATHS):
            with worker.scratch(how.root) as folder:
                ended = worker.run(folder, plan, Fault(n, action), how.mutant)
                problem = "" if ended.signal == 9 else f"it did not die: {ended.error}"
                problem = problem or worker.judge(folder, plan, how.mutant, resume=n % 8 == 0)
                counts.add(f"{plan}, {action} call {n}", problem)
            if how.enough(counts):
                return counts
    return counts


def random_kills(how: How, plans: Iterable[Plan], count: int) -> Counts:
    """Killed from outside, at any time."""
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
    """Killed again and again, resumed each time: the end is that of a run that was left alone."""
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
        mutants.apply(mutant)
        calls.install()
        Table.open(folder / "t.pyembed").close()
        return len(calls.names)

    return worker.in_child(child)


def dirty_tables(how: How, plan: Plan, every: int) -> Iterator[Path]:
    """Folders with a table whose writer died in the middle of an interval."""
    for n in range(every // 2, _calls_of(how, plan), every):
        with worker.scratch(how.root) as folder:
            worker.run(folder, plan, Fault(n, "kill after"), how.mutant)
            manifest = folder / "t.pyembed" / "manifest.json"
            if manifest.exists() and b'"dirty"' in manifest.read_bytes():
                yield folder


def recovery_points(how: How, plans: Iterable[Plan], actions: Iterable[str]) -> Counts:
    """While a dead writer's table is recovered: killed at every call, or the call fails."""
    actions = list(actions)
    counts = Counts(f"recovery {'killed at' if actions == list(DEATHS) else 'with a failing'} call")
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
    """A run that met a failure ends well or with an error of a type that is promised."""
    if ended.signal:
        return "" if "kill" in action else f"signal {ended.signal}"
    return ended.error if ended.error and not ended.typed else ""


def failures(how: How, plans: Iterable[Plan], actions: Iterable[str] = FAILURES) -> Counts:
    """The n-th call fails once, for every n; the caller ends, or goes on as he may."""
    counts, actions = Counts("a call fails"), list(actions)
    for plan in plans:
        for n, action in itertools.product(how.points(_calls_of(how, plan)), actions):
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


# --- power cuts ---------------------------------------------------------------------------------


def _cut_everywhere(
    root: Path, start: disk.Node, recorder: disk.Recorder, plan: Plan, how: How, said: list[Any]
) -> list[list[str]]:
    """[case, problem] for each prefix of the events in each mode."""
    other = Path("/proc/self")  # any other start of the machine
    store.BOOT_ID = other / "sessionid"
    now = disk.Disk(recorder.root, start)
    now.said = list(said)
    found = []
    for number, event in enumerate([("say", "", -9), *recorder.events]):
        now.apply(event)
        if event[0] == "sync" or number % how.step != how.offset % how.step:
            continue  # after a sync there is less that can be there than before it
        for mode in disk.MODES:
            target = root / "cut"
            now.build(target, mode, np.random.default_rng([number, len(mode)]))
            problem = _judge_cut(target / "t.pyembed", plan, now.said)
            found.append([f"{plan}, cut after event {number} {event[0]}, {mode}", problem])
            shutil.rmtree(target)
            if problem and how.until_bad:
                return found
    return found


def _judge_cut(path: Path, plan: Plan, said: list[tuple[str, int]]) -> str:
    """With durability "process" a table may be refused after a power cut, but never be wrong."""
    try:
        return str(program.judge(path, plan, said, resume=False)["bad"])
    except DirtyError as error:
        return "" if plan.durability == "process" else f"refused: {error}"
    except (OSError, PyembedError) as error:
        return f"{type(error).__name__}: {error}"


def power_cuts(how: How, plans: Iterable[Plan]) -> Counts:
    """The power goes after each event of a run; what was not synced is there, in parts, or not."""
    counts = Counts("power cut")
    for plan in plans:
        program.oracle(plan)
        with worker.scratch(how.root) as root:

            def child(root: Path = root, plan: Plan = plan) -> list[list[str]]:
                mutants.apply(how.mutant)
                (root / "run").mkdir()
                recorder, start = disk.Recorder(root / "run"), disk.load(root / "run")
                recorder.install()
                program.train(root / "run" / "t.pyembed", plan, recorder.say)
                recorder.uninstall()
                return _cut_everywhere(root, start, recorder, plan, how, [])

            _collect(counts, child)
        if how.enough(counts):
            break
    return counts


def power_cuts_in_recovery(how: How, plans: Iterable[Plan], every: int = 40) -> Counts:
    """The power goes while a table is recovered, of a writer that died or of an earlier cut."""
    counts = Counts("power cut in a recovery")
    for plan in plans:
        program.oracle(plan)
        for folder in dirty_tables(how, plan, every):
            said = program.read_log(folder / "log")

            def child(root: Path = folder, plan: Plan = plan, said: Any = said) -> Any:
                mutants.apply(how.mutant)
                recorder, start = disk.Recorder(root), disk.load(root)
                recorder.install()
                program.train(root / "t.pyembed", _short(plan, said), recorder.say)
                recorder.uninstall()
                return _cut_everywhere(root, start, recorder, plan, how, said)

            _collect(counts, child)
            if how.enough(counts):
                return counts
    return counts


def _short(plan: Plan, said: list[tuple[str, int]]) -> Plan:
    """The same program, up to the commit after the one that is there."""
    numbers = [number for word, number in said if word == "ack"]
    return Plan(**{**vars(plan), "intervals": min(plan.intervals, max(numbers, default=0) + 1)})


def failed_syncs(how: How, plans: Iterable[Plan]) -> Counts:
    """A sync fails and loses what it should have saved; the caller goes on as he may; power cut."""
    counts = Counts("a sync fails, then power cut")
    for plan in plans:
        program.oracle(plan)
        for n in how.points(_calls_of(how, plan)):
            with worker.scratch(how.root) as root:

                def child(root: Path = root, plan: Plan = plan, n: int = n) -> list[list[str]]:
                    mutants.apply(how.mutant)
                    (root / "run").mkdir()
                    recorder = disk.Recorder(root / "run", fail_at=n)
                    start = disk.load(root / "run")
                    recorder.install()
                    program.train(root / "run" / "t.pyembed", plan, recorder.say)
                    recorder.uninstall()
                    if "fsync" != recorder.names[n]:
                        return []
                    return _cut_at_commits(root, start, recorder, plan)

                _collect(counts, child)
            if how.enough(counts):
                return counts
    return counts


def _cut_at_commits(
    root: Path, start: disk.Node, recorder: disk.Recorder, plan: Plan
) -> list[list[str]]:
    now, found, lost = disk.Disk(recorder.root, start), [], False
    for number, event in enumerate(recorder.events):
        now.apply(event)
        lost = lost or event[0] == "lose"
        if lost and event[:2] == ("say", "ack"):
            now.build(root / "cut", "none", np.random.default_rng(0))
            problem = _judge_cut(root / "cut" / "t.pyembed", plan, now.said)
            found.append([f"{plan}, sync {recorder.fail_at} fails, cut at {number}", problem])
            shutil.rmtree(root / "cut")
    return found


def _collect(counts: Counts, child: Callable[[], list[list[str]]]) -> None:
    ended = worker.in_child(child, kill_after=300)
    if ended.signal or ended.error:
        counts.add("the run itself", f"signal {ended.signal} {ended.error}")
    for case, problem in ended.result or []:
        counts.add(case, problem)
