"""The sweep over exports: a copy, a delta and its application are killed, or fail, at each call."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from pyembed import Table
from pyembed.tools.export import apply, export
from tests.crash import mutants, program, worker
from tests.crash.calls import Calls, Fault
from tests.crash.cells import DEATHS, Counts, How
from tests.crash.program import Plan, digest

ACTIONS = (*DEATHS, "EIO", "ENOSPC", "interrupt after")
EARLIER = 3  # the generation of the copies
JOBS: dict[str, Callable[[Path], object]] = {
    "copy": lambda folder: export(folder / "t.pyembed", folder / "new"),
    "delta": lambda folder: export(folder / "t.pyembed", folder / "new", since=EARLIER),
    "apply": lambda folder: apply(folder / "delta", folder / "copy"),
}


def killed_exports(how: How, plans: Iterable[Plan]) -> Counts:
    """Require that an export appears whole or not at all, and that a copy is at a commit."""
    counts = Counts("an export killed at, or with a failing, call")
    for plan in plans:
        program.oracle(plan)
        with worker.scratch(how.root) as folder:
            ended = worker.in_child(lambda folder=folder, plan=plan: _prepare(folder, plan))  # type: ignore[misc]
            assert not ended.error, ended.error
            for job in JOBS:
                number = _run(folder, how, job, Calls()).result
                for n, action in itertools.product(how.points(number), ACTIONS):
                    _, problem = _case(folder, how, plan, job, Fault(n, action))
                    counts.add(f"{plan}, {job}, {action} at call {n}", problem)
                    if how.enough(counts):
                        return counts
    return counts


def _prepare(folder: Path, plan: Plan) -> None:
    """Make a trained table, a copy of an earlier commit, and the delta between them."""
    path = folder / "t.pyembed"
    with mutants.installed(""):
        program.train(path, replace(plan, transactions=EARLIER), lambda word, number: None)
        export(path, folder / "copy")
        program.train(path, plan, lambda word, number: None)
        export(path, folder / "delta", since=EARLIER)


def _case(folder: Path, how: How, plan: Plan, job: str, calls: Calls) -> tuple[worker.Ended, str]:
    """Do a job on a copy of the prepared folder; return how it ended, and the problem or ""."""
    with worker.scratch(how.root) as other:
        shutil.copytree(folder, other, dirs_exist_ok=True)

        def child() -> int:
            with mutants.installed(how.mutant, calls):
                JOBS[job](other)
            return len(calls.made)

        ended = worker.in_child(child)
        if ended.error and not ended.typed:
            return ended, ended.error
        judged = worker.in_child(lambda: _judge(other, plan))
        return ended, judged.error or str(judged.result)


def _run(folder: Path, how: How, job: str, calls: Calls) -> worker.Ended:
    ended, problem = _case(folder, replace(how, mutant=""), Plan(), job, calls)
    assert ended.result, problem
    return ended


def _judge(folder: Path, plan: Plan) -> str:
    copy, new = folder / "copy", folder / "new"
    problem = _is_commit(copy, plan, (EARLIER, plan.transactions))
    if not problem and (new / "manifest.json").exists():
        return _is_commit(new, plan, (plan.transactions,))
    for delta in (folder / "delta", new):
        if not problem and delta.exists():
            shutil.copytree(copy, folder / "further")
            apply(delta, folder / "further")
            problem = _is_commit(folder / "further", plan, (plan.transactions,))
            shutil.rmtree(folder / "further")
    return problem


def _is_commit(path: Path, plan: Plan, may: tuple[int, ...]) -> str:
    for mode in ("r", "r+"):
        table = Table.open(path, mode)
        number, found = table.generation, digest(table)
        table.close()
        if number not in may or found != program.oracle(plan)[number]:
            return f"{path.name}: generation {number}, or other rows"
    return ""
