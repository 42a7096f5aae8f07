"""Sweeps over power cuts: every state of the disk that `disk` builds is opened and judged."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyembed.errors import DirtyError, PyembedError
from tests.crash import disk, mutants, program, worker
from tests.crash.calls import Layer
from tests.crash.cells import Counts, How, collect, dirty_tables, names_of_calls
from tests.crash.program import Plan, Said


def _cut_everywhere(
    root: Path, recorder: disk.Recorder, plan: Plan, how: How, said: Said
) -> list[list[str]]:
    """Return [case, problem] for each prefix of the events in each mode."""
    now, found = disk.Disk(recorder), []
    now.said = list(said)
    for number, event in enumerate([("say", "", -9), *recorder.events]):
        now.apply(event)
        if event[0] == "sync" or number % how.step != how.offset % how.step:
            continue  # every state after a sync was possible before it
        for mode in disk.MODES:
            target = root / "cut"
            now.build(target, mode, np.random.default_rng([number, len(mode)]))
            problem = judge_cut(target / "t.pyembed", plan, now.said, how.mutant)
            found.append([f"{plan}, cut after event {number} {event[0]}, {mode}", problem])
            shutil.rmtree(target)
            if problem and how.until_bad:
                return found
    return found


class Rebooted(Layer):
    """The same machine after another start."""

    def boot_id(self) -> str:
        return "another start of the machine"


def judge_cut(path: Path, plan: Plan, said: Said, mutant: str) -> str:
    """Return the problem with a table after a power cut, or "".

    With durability "process" it may be refused, but never be wrong.
    """
    try:
        with mutants.installed(mutant, Rebooted()) as broken:
            return str(program.judge(path, plan, said, False, broken.changed_rows)["bad"])
    except DirtyError as error:
        return "" if plan.durability == "process" else f"refused: {error}"
    except (OSError, PyembedError) as error:
        return f"{type(error).__name__}: {error}"


def _record(root: Path, plan: Plan, how: How, fail_at: int = -1) -> disk.Recorder:
    root.mkdir(exist_ok=True)
    recorder = disk.Recorder(root, fail_at)
    with mutants.installed(how.mutant, recorder):
        program.train(root / "t.pyembed", plan, recorder.say)
    return recorder


def power_cuts(how: How, plans: Iterable[Plan]) -> Counts:
    """Cut the power after each event of a run; unsynced changes are there, in part, or not."""
    counts = Counts("power cut")
    for plan in plans:
        program.oracle(plan)
        with worker.scratch(how.root) as root:

            def child(root: Path = root, plan: Plan = plan) -> list[list[str]]:
                return _cut_everywhere(root, _record(root / "run", plan, how), plan, how, [])

            collect(counts, child)
        if how.enough(counts):
            break
    return counts


def power_cuts_in_recovery(how: How, plans: Iterable[Plan], every: int = 40) -> Counts:
    """Cut the power while the table of a dead writer is recovered, and in what follows."""
    counts = Counts("power cut in a recovery")
    for plan in plans:
        program.oracle(plan)
        for folder in dirty_tables(how, plan, every):
            said = program.read_log(folder / "log")

            def child(root: Path = folder, plan: Plan = plan, said: Said = said) -> Any:
                recorder = _record(root, short(plan, said), how)
                return _cut_everywhere(root, recorder, plan, how, said)

            collect(counts, child)
            if how.enough(counts):
                return counts
    return counts


def short(plan: Plan, said: Said) -> Plan:
    """Return the same program, up to the next commit."""
    numbers = [number for word, number in said if word == "ack"]
    return replace(plan, transactions=min(plan.transactions, max(numbers, default=0) + 1))


def failed_syncs(how: How, plans: Iterable[Plan]) -> Counts:
    """Fail a sync, which loses its data; the caller goes on as a caller may; cut the power."""
    counts = Counts("a sync fails, then power cut")
    for plan in plans:
        program.oracle(plan)
        syncs = [n for n, name in enumerate(names_of_calls(how, plan)) if name == "sync"]
        for n in syncs[how.offset % how.step :: how.step]:
            with worker.scratch(how.root) as root:

                def child(root: Path = root, plan: Plan = plan, n: int = n) -> list[list[str]]:
                    return _cut_at_commits(root, _record(root / "run", plan, how, n), plan, how)

                collect(counts, child)
            if how.enough(counts):
                return counts
    return counts


def _cut_at_commits(root: Path, recorder: disk.Recorder, plan: Plan, how: How) -> list[list[str]]:
    now, found, lost = disk.Disk(recorder), [], False
    for number, event in enumerate(recorder.events):
        now.apply(event)
        lost = lost or event[0] == "lose"
        if lost and event[:2] == ("say", "ack"):
            now.build(root / "cut", "none", np.random.default_rng(0))
            problem = judge_cut(root / "cut" / "t.pyembed", plan, now.said, how.mutant)
            found.append([f"{plan}, sync {recorder.fail_at} fails, cut at {number}", problem])
            shutil.rmtree(root / "cut")
    return found
