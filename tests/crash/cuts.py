"""The sweeps of power cuts: `disk` builds what may be there, and each of that is opened."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pyembed.errors import DirtyError, PyembedError
from pyembed.storage import recovery
from tests.crash import disk, mutants, program, worker
from tests.crash.cells import Counts, How, collect, dirty_tables, names_of_calls
from tests.crash.program import Plan


def _cut_everywhere(
    root: Path, start: disk.Node, recorder: disk.Recorder, plan: Plan, how: How, said: list[Any]
) -> list[list[str]]:
    """[case, problem] for each prefix of the events in each mode."""
    other = Path("/proc/self")  # any other start of the machine
    recovery.BOOT_ID = other / "sessionid"
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
            problem = judge_cut(target / "t.pyembed", plan, now.said)
            found.append([f"{plan}, cut after event {number} {event[0]}, {mode}", problem])
            shutil.rmtree(target)
            if problem and how.until_bad:
                return found
    return found


def judge_cut(path: Path, plan: Plan, said: list[tuple[str, int]]) -> str:
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

            collect(counts, child)
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
                program.train(root / "t.pyembed", short(plan, said), recorder.say)
                recorder.uninstall()
                return _cut_everywhere(root, start, recorder, plan, how, said)

            collect(counts, child)
            if how.enough(counts):
                return counts
    return counts


def short(plan: Plan, said: list[tuple[str, int]]) -> Plan:
    """The same program, up to the commit after the one that is there."""
    numbers = [number for word, number in said if word == "ack"]
    return Plan(**{**vars(plan), "intervals": min(plan.intervals, max(numbers, default=0) + 1)})


def failed_syncs(how: How, plans: Iterable[Plan]) -> Counts:
    """A sync fails and loses what it should have saved; the caller goes on as he may; power cut."""
    counts = Counts("a sync fails, then power cut")
    for plan in plans:
        program.oracle(plan)
        syncs = [n for n, name in enumerate(names_of_calls(how, plan)) if name == "fsync"]
        for n in syncs[how.offset % how.step :: how.step]:
            with worker.scratch(how.root) as root:

                def child(root: Path = root, plan: Plan = plan, n: int = n) -> list[list[str]]:
                    mutants.apply(how.mutant)
                    (root / "run").mkdir()
                    recorder = disk.Recorder(root / "run", fail_at=n)
                    start = disk.load(root / "run")
                    recorder.install()
                    program.train(root / "run" / "t.pyembed", plan, recorder.say)
                    recorder.uninstall()
                    return _cut_at_commits(root, start, recorder, plan)

                collect(counts, child)
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
            problem = judge_cut(root / "cut" / "t.pyembed", plan, now.said)
            found.append([f"{plan}, sync {recorder.fail_at} fails, cut at {number}", problem])
            shutil.rmtree(root / "cut")
    return found
