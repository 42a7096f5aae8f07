"""The command: run every sweep and hunt every mutant, and report a table of counts.

python -m tests.crash.torture            everything: about 25 minutes       (make torture)
python -m tests.crash.torture --short    a thin slice of each sweep, for the tests
python -m tests.crash.torture --write    also write the counts to docs/durability.md

Each sweep runs in a process of its own, as many at once as there are processors.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["PYEMBED_NUM_THREADS"] = "1"  # before the import: a fork finds no threads

from tests.crash import cells, cuts, exports, ext4, hunts, worker
from tests.crash.cells import DEATHS, ROOT, Counts, How
from tests.crash.hunts import plans

PAGE = Path(__file__).parents[2] / "docs" / "durability.md"
BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"
SHORT_HUNT = 2  # every other point
LONGEST = (
    "random-kills",
    "ext4-cuts",
    "ext4-cuts-recovery",
    "failures-gone-on",
    "failures",
    "ext4-failed-writes",
    "kill-points",
    "ext4-shutdowns",
    "recovery-kills",
    "little-memory",
    "ext4-cuts-process",
    "recovery-failures",
)


def sweeps(short: bool) -> dict[str, Callable[[], Counts]]:
    """Return every cell by name."""

    def how(step: int) -> How:
        return How(step=step, offset=5) if short else How()

    process, power = plans("process", 0, 1), plans("power", 1, 1)
    both, none = [*process, *power], plans("none", 2, 1)
    patient, stubborn = process[:1], plans("power", 3, 1, stubborn=True)
    many = [*plans("process", 0, 8), *plans("power", 8, 8), *plans("none", 16, 1)]
    failed = plans("process", 1, 1 if short else 2, stubborn=True)
    return {
        "kill-points": lambda: cells.faults(how(61), [*both, *none], DEATHS),
        "random-kills": lambda: cells.random_kills(how(1), many, 20 if short else 2000),
        "little-memory": lambda: cells.kills_with_little_memory(how(1), 0 if short else 20),
        "resumed": lambda: cells.resumed(how(1), many[:16], 3 if short else 100),
        "recovery-kills": lambda: cells.recovery_points(how(47), both, DEATHS),
        "recovery-failures": lambda: cells.recovery_points(
            how(97), patient, ["EIO", "ENOSPC", "short", "interrupt after"]
        ),
        "failures": lambda: cells.faults(how(101), patient),
        "failures-gone-on": lambda: cells.faults(how(101), stubborn),
        "failed-syncs": lambda: cuts.failed_syncs(how(17), [*failed, *stubborn]),
        "power-cuts": lambda: cuts.power_cuts(how(11), plans("power", 0, 2 if short else 8)),
        "power-cuts-process": lambda: cuts.power_cuts(how(11), process),
        "power-cuts-recovery": lambda: cuts.power_cuts_in_recovery(
            how(23), plans("power", 4, 1 if short else 4), 150 if short else 40
        ),
        "exports": lambda: exports.killed_exports(how(29), both),
        "damage": lambda: cells.damage(how(37), process if short else both),
        "ext4-cuts": lambda: ext4.cuts(how(43), plans("power", 0, 1 if short else 4)),
        "ext4-cuts-process": lambda: ext4.cuts(how(61), plans("process", 1, 1 if short else 2)),
        "ext4-cuts-recovery": lambda: ext4.cuts_in_recovery(
            how(47), plans("power", 2, 1 if short else 2), 300 if short else 60
        ),
        "ext4-failed-writes": lambda: ext4.failed_writes(how(97), stubborn),
        "ext4-shutdowns": lambda: ext4.shutdowns(
            how(61), plans("power", 0, 1 if short else 2), 2 if short else 200
        ),
    }


TITLES = {
    "kill-points": "killed before and after every system call and change of a run",
    "random-kills": "killed from outside at a random time",
    "little-memory": "the same, 150 MB of rows in 96 MiB of memory",
    "resumed": "killed again and again, resumed to the end: bits of a run left alone",
    "recovery-kills": "a recovery is killed before and after every call",
    "recovery-failures": "a call of a recovery fails",
    "failures": "a call fails (EIO, ENOSPC, EINTR, short, Ctrl-C); the caller ends",
    "failures-gone-on": "the same with durability power; the caller goes on",
    "failed-syncs": "a sync fails and loses what it had; the caller goes on; power cut at commits",
    "power-cuts": "power cut after every event × 4 modes, durability power",
    "power-cuts-process": "the same, durability process: refused, or right",
    "power-cuts-recovery": "power cut in a recovery and the transaction after it",
    "exports": "a copy, a delta, or its application is killed at, or has a failing, call",
    "damage": "a byte of manifest, header of the rows or of a frame is another",
    "ext4-cuts": "on ext4: power cut after every write and flush × 4 modes, durability power",
    "ext4-cuts-process": "the same, durability process: refused, or right",
    "ext4-cuts-recovery": "on ext4: power cut in a recovery and the transaction after it",
    "ext4-failed-writes": "on ext4: a write fails (EIO); the caller goes on; power cut at commits",
    "ext4-shutdowns": "ext4 shut down before every call of a run, and at random times",
}


class Task(NamedTuple):
    """A sweep, or a hunt of a mutant."""

    kind: str
    name: str
    short: bool


def work(task: Task) -> dict[str, Any]:
    """Run a task in a new process with little memory; return the fields of its counts."""
    if task.kind == "cell":
        function = sweeps(task.short)[task.name]
    else:
        function = partial(hunts.hunt, task.name, How(step=SHORT_HUNT if task.short else 1))
    start = time.monotonic()
    with worker.memory_group(cells.LITTLE) as group:
        # The cell with a group of its own computes the content of a large table beforehand.
        joined = None if task.name == "little-memory" else group
        ended = worker.in_child(lambda: vars(function()), cells.LONG, joined)
    none = {"cell": task.name, "bad": [f"signal {ended.signal} {ended.error}"]}
    return {**(ended.result or none), "seconds": time.monotonic() - start}


def report(task: Task, counts: Counts) -> tuple[str, int]:
    """Return a line of the page, and the number of bad states or missed mutants."""
    if task.kind == "cell":
        line = f"| {TITLES[task.name]} | {counts.cases:,} | {counts.note or len(counts.bad)} |"
        return line, 0 if counts.note else len(counts.bad) + (not counts.cases)
    found = bool(counts.cases and counts.bad)
    how = f"found by “{counts.cell}”, case {counts.cases}" if found else "NOT FOUND"
    return f"| {task.name} | {counts.note or how} |", int(not found and not counts.note)


def run(tasks: list[Task]) -> tuple[list[str], list[str], int]:
    """Return the lines of cells and of mutants, and the number of bad states or missed mutants."""
    lines, wrong = {}, 0
    with get_context("fork").Pool(os.cpu_count()) as pool:
        pairs = [(task, pool.apply_async(work, [task])) for task in sorted(tasks, key=_longest)]
        for task, answer in pairs:
            counts = Counts(**answer.get())
            lines[task], more = report(task, counts)
            wrong += more
            print(f"{lines[task]}  {counts.seconds:.0f} s", flush=True)
            for problem in counts.bad[:3] if more else []:
                print(problem[-2000:], file=sys.stderr)
    return (
        [lines[task] for task in tasks if task.kind == "cell"],
        [lines[task] for task in tasks if task.kind == "mutant"],
        wrong,
    )


def _longest(task: Task) -> int:
    """Sort long tasks first, so that no processor waits for them at the end."""
    return LONGEST.index(task.name) if task.name in LONGEST else len(LONGEST)


def where() -> str:
    """Return date, commit, kernel and file system of the counts."""
    commit = _output("git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD")
    system = _output("stat", "-f", "-c", "%T", str(How().root or "/tmp"))
    with worker.memory_group(cells.LITTLE) as group:
        memory = "" if group is None else f", each sweep in {cells.LITTLE >> 20} MiB of memory"
    return (
        f"{datetime.date.today()}, commit {commit or 'unknown'}, "
        f"Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, tables on {system or 'an unknown file system'}"
        f"{' (those of little memory on the disk)' if ROOT.is_dir() else ''}{memory}."
    )


def _output(*command: str) -> str:
    """Return the output of a program; nothing if the machine does not have it, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def write_page(place: str, cell_lines: list[str], mutant_lines: list[str]) -> None:
    """Replace the counts in docs/durability.md."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    body = [
        f"\n{place}\n",
        "| what | states | bad |",
        "|---|---|---|",
        *cell_lines,
        "",
        "| mutant | |",
        "|---|---|",
        *mutant_lines,
        "",
    ]
    PAGE.write_text(head + BEGIN + "\n".join(body) + END + tail)


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cell", action="append", default=[], choices=list(TITLES))
    parser.add_argument("--mutant", action="append", default=[], choices=hunts.names())
    options = parser.parse_args()
    worker.remove_leftovers(ROOT)
    place, some = where(), bool(options.cell or options.mutant)
    chosen = [Task("cell", name, options.short) for name in options.cell or TITLES]
    if some:
        chosen = chosen if options.cell else []
        chosen += [Task("mutant", name, options.short) for name in options.mutant]
    else:
        chosen += [Task("mutant", name, options.short) for name in hunts.names()]
    cell_lines, mutant_lines, wrong = run(chosen)
    if options.write and not some:
        write_page(place, cell_lines, mutant_lines)
    print(f"{wrong} bad states or mutants missed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
