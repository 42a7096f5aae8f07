"""The program that is run: training that draws everything from one seed and resumes at a commit.

The same program over a table in memory is the oracle: it says beforehand what each commit holds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyembed import Table, init
from pyembed.errors import ArgumentError
from pyembed.optim import Adagrad, Adam, Optimizer
from pyembed.storage.change_log import ChangedRows
from pyembed.storage.fs import Folder
from tests.crash.calls import CHANGE, Calls

RULES: dict[str, Callable[..., Optimizer]] = {"adagrad": Adagrad, "adam": Adam}
Said = list[tuple[str, int]]  # announcements: a word and a number
STARTS = init.uniform(-1.0, 1.0)
TRIES = 3
SMALL = 2000  # rows: the oracle keeps a copy of each commit of a table that has at most so many
PIECE = 4096  # rows


@dataclass(frozen=True)
class Plan:
    """The parameters of a program.

    Attributes
    ----------
    stubborn : bool
        Go on after an error as a caller may, instead of ending with it.
    """

    seed: int = 0
    rows: int = 300
    dim: int = 4
    optimizer: str = "adagrad"
    durability: str = "process"
    transactions: int = 6
    batch: int = 24
    stubborn: bool = False


def digest(table: Table) -> str:
    """Return a short text that depends on every row, on the optimizer state and on the meta."""
    sums = hashlib.blake2b(digest_size=16)
    for start in range(0, table.rows, PIECE):  # in little memory
        rows = np.arange(start, min(start + PIECE, table.rows))
        table.prefetch(rows)
        for name in table.columns:
            sums.update(table.column(name)[rows[0] : rows[-1] + 1].tobytes())
    sums.update(json.dumps(table.meta, sort_keys=True).encode())
    return f"{table.rows}:{sums.hexdigest()}"


class Trainer:
    """The program over one open table.

    Parameters
    ----------
    plan : Plan
    table : Table
    say : function of a word and a number
        Hears "change" after each change of rows, "begin" before a commit and "ack" after it.
    """

    def __init__(self, plan: Plan, table: Table, say: Callable[[str, int], None]) -> None:
        self.plan, self.table, self.say = plan, table, say
        self._saved = b""  # the last commit of a table in memory
        self._resume()

    def _resume(self) -> None:
        """Take step, generator state and optimizer state from the meta of the last commit."""
        meta = self.table.meta
        self.rng = np.random.default_rng(self.plan.seed)
        if meta:
            self.rng.bit_generator.state = meta["rng"]
        self.optimizer = RULES[self.plan.optimizer](self.table, lr=0.1)
        self.optimizer.steps = self._steps = meta.get("steps", 0)
        self.step = meta.get("step", 0)
        if self.table.path is None:
            self._saved = pickle.dumps(self.table)

    def rollback(self) -> None:
        """Return to the last commit."""
        if self.table.path is None:
            self.table = pickle.loads(self._saved)
            self.optimizer = RULES[self.plan.optimizer](self.table, lr=0.1)
        else:
            self.table.rollback()
        self.optimizer.steps = self._steps

    def _changes(self) -> Iterator[Callable[[], object]]:
        """Yield the changes of one transaction; each draws its arguments before it is made."""
        rng, plan = self.rng, self.plan
        for turn in range(int(rng.integers(3, 6))):
            ids = rng.integers(0, self.table.rows, plan.batch)
            grad = rng.standard_normal((plan.batch, plan.dim), np.float32)
            kind = int(rng.integers(8))
            self.table.prefetch(ids, wait=True)
            if kind == 5:
                yield lambda ids=ids, grad=grad: self.table.scatter_add(ids, grad)  # type: ignore
            elif kind == 6:
                yield lambda ids=ids: self.table.renorm(ids, 1.0)  # type: ignore[misc]
            elif kind == 7:
                yield lambda ids=ids[:5], grad=grad[:5]: self._write(ids, grad)  # type: ignore
            elif kind == 4 and turn and plan.durability != "none":
                yield self.rollback
            elif kind == 3:
                more = int(ids[0]) % 40
                yield lambda more=more: self.table.append(more, STARTS, plan.seed)  # type: ignore
            else:
                yield lambda ids=ids, grad=grad: self.optimizer.step(ids, grad)  # type: ignore

    def _write(self, ids: np.ndarray, values: np.ndarray) -> None:
        with self.table.writing(ids) as weight:
            weight[ids] = values

    def transaction(self) -> None:
        """Make changes, then commit the next generation."""
        for attempt in range(TRIES):
            try:
                for change in self._changes():
                    self._attempt(change)
                break
            except OSError:
                if not self.plan.stubborn or attempt == TRIES - 1:
                    raise
                self.table.rollback()
                self._resume()
        step = self.step + 1
        meta = {"step": step, "steps": self.optimizer.steps, "rng": self.rng.bit_generator.state}
        for attempt in range(TRIES):
            self.say("begin", step)
            try:
                self.table.commit(meta=meta)
                break
            except OSError:
                if not self.plan.stubborn or attempt == TRIES - 1:
                    raise
        self.say("ack", step)
        self.step, self._steps = step, self.optimizer.steps
        self._saved = pickle.dumps(self.table) if self.table.path is None else b""

    def _attempt(self, change: Callable[[], object]) -> None:
        """Make a change, and announce it. A change that failed changed nothing: it is repeated."""
        try:
            change()
        except OSError:
            if not self.plan.stubborn or change == self.rollback:
                raise
            change()
        self.say(CHANGE, self.step)


def contents(table: Table) -> np.ndarray | None:
    """Return all columns joined; None for a table that is too large to keep."""
    if table.rows > SMALL:
        return None
    return np.concatenate([table.column(name) for name in table.columns], axis=1)


def oracle(plan: Plan) -> tuple[str, ...]:
    """Return the digest of each generation."""
    return tuple(digest for digest, _ in history(plan))


@functools.lru_cache(maxsize=64)
def history(plan: Plan) -> tuple[tuple[str, np.ndarray | None], ...]:
    """Return digest and rows of each generation."""
    found = []
    table = Table.memory(plan.rows, plan.dim, plan.optimizer, init=STARTS, seed=plan.seed)
    trainer = Trainer(plan, table, lambda word, number: None)
    found.append((digest(trainer.table), contents(trainer.table)))
    for _ in range(plan.transactions):
        trainer.transaction()
        found.append((digest(trainer.table), contents(trainer.table)))
    return tuple(found)


def wrong_log(table: Table, plan: Plan, changed_rows: type[ChangedRows]) -> str:
    """Name a generation for which the change log leaves out a row that changed since, or ""."""
    held = [rows for _, rows in history(plan)]
    for generation in range(table.generation):
        old, new = held[generation], held[table.generation]
        if old is None or new is None or table.path is None:
            continue
        with contextlib.suppress(ArgumentError), Folder(table.path) as folder:
            # "Not known", an ArgumentError, is a right answer too.
            parts = changed_rows(folder, table.committed, generation).rows()
            found = [row for rows in parts for row in rows]
            changed = np.flatnonzero((old != new[: len(old)]).any(axis=1))
            missing = {*changed, *range(len(old), len(new))} - {*found}
            if missing:
                return f"the log since {generation} lacks rows {sorted(missing)[:5]}"
    return ""


def open_or_create(path: Path, plan: Plan, say: Callable[[str, int], None]) -> Table:
    """Open the table; create it if there is none."""
    if path.exists():
        return Table.open(path)
    say("begin", 0)
    table = Table.create(
        path,
        plan.rows,
        plan.dim,
        plan.optimizer,
        init=STARTS,
        seed=plan.seed,
        durability=plan.durability,
    )
    say("ack", 0)
    return table


def train(path: Path, plan: Plan, say: Callable[[str, int], None]) -> None:
    """Train from the last commit to the end; close the table after every third commit."""
    errors, done = 0, False
    while not done:
        try:
            with open_or_create(path, plan, say) as table:
                trainer = Trainer(plan, table, say)
                done = table.generation >= plan.transactions
                while not done:
                    trainer.transaction()
                    done = table.generation >= plan.transactions
                    if table.generation % 3 == 0:
                        break
        except OSError:
            errors += 1
            if not plan.stubborn or errors == TRIES:
                raise


class Log:
    """A file outside of the table: "begin 3" before a commit, "ack 3" after it.

    Parameters
    ----------
    path : Path
    calls : Calls, optional
        Hears everything first.
    """

    def __init__(self, path: Path, calls: Calls | None = None) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._calls = calls

    def say(self, word: str, number: int) -> None:
        """Write a line durably; changes are not written down."""
        if self._calls is not None:
            self._calls.say(word, number)
        if word != CHANGE:
            os.write(self._fd, f"{word} {number}\n".encode())
            os.fsync(self._fd)


def read_log(path: Path) -> Said:
    """Return the lines of a `Log`."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def allowed(said: Said) -> set[int]:
    """Return the generations that may be found: the last acknowledged one, and one under way."""
    acknowledged = max((number for word, number in said if word == "ack"), default=-1)
    return {acknowledged} | {number for _, number in said if number == acknowledged + 1}


def judge(
    path: Path,
    plan: Plan,
    said: Said,
    resume: bool,
    changed_rows: type[ChangedRows] = ChangedRows,
) -> dict[str, Any]:
    """Open the table as a reader and as a writer; then train to the end if `resume`.

    Returns
    -------
    dict
        "bad": the problem, or ""; "found": the generation.
    """
    may, digests = allowed(said), oracle(plan)
    if not path.exists():
        return {"bad": "" if -1 in may else "the table is gone", "found": -1}
    for mode in ("r", "r+"):
        table = Table.open(path, mode)
        number, found = table.generation, digest(table)
        problem = wrong_log(table, plan, changed_rows) if number in may else ""
        table.close()
        if number not in may:
            return {"bad": f"{mode}: generation {number}, allowed {sorted(may)}", "found": number}
        if found != digests[number]:
            return {"bad": f"{mode}: other rows than commit {number}", "found": number}
        if problem:
            return {"bad": f"{mode}: {problem}", "found": number}
    if resume:
        train(path, plan, lambda word, number: None)
        with Table.open(path, "r") as table:
            if digest(table) != digests[-1]:
                return {"bad": "resumed, it ended with other rows", "found": number}
    return {"bad": "", "found": number}
