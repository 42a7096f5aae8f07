"""The command: every sweep, in full or thinned out, and every mutant; a table of counts.

python -m crash.torture            all of it, about fifteen minutes     (make torture)
python -m crash.torture --short    a thin slice of each, for the tests
python -m crash.torture --write    and put the counts into docs/durability.md
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
from pathlib import Path

if __name__ == "__main__":
    os.environ["PYEMBED_NUM_THREADS"] = "1"  # before pyembed is asked: a fork must find no threads

from crash import cells, cuts, exports, hunts
from crash.cells import DEATHS, ROOT, Counts, How
from crash.hunts import plans

PAGE = Path(__file__).parents[2] / "docs" / "durability.md"
BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"


def sweeps(short: bool) -> dict[str, Callable[[], Counts]]:
    """Every cell by name."""

    def how(step: int) -> How:
        return How(step=step, offset=5) if short else How()

    process, power = plans("process", 0, 1), plans("power", 1, 1)
    both, none = [*process, *power], plans("none", 2, 1)
    patient, stubborn = process[:1], plans("power", 3, 1, stubborn=True)
    many = [*plans("process", 0, 8), *plans("power", 8, 8), *plans("none", 16, 1)]
    failed = plans("process", 1, 1 if short else 2, stubborn=True)
    return {
        "kill-points": lambda: cells.kill_points(how(61), [*both, *none]),
        "random-kills": lambda: cells.random_kills(how(1), many, 20 if short else 2000),
        "little-memory": lambda: cells.kills_with_little_memory(how(1), 0 if short else 10),
        "resumed": lambda: cells.resumed(how(1), many[:16], 3 if short else 100),
        "recovery-kills": lambda: cells.recovery_points(how(47), both, DEATHS),
        "recovery-failures": lambda: cells.recovery_points(
            how(97), patient, ["EIO", "ENOSPC", "short", "interrupt after"]
        ),
        "failures": lambda: cells.failures(how(101), patient),
        "failures-gone-on": lambda: cells.failures(how(101), stubborn),
        "failed-syncs": lambda: cuts.failed_syncs(how(17), [*failed, *stubborn]),
        "power-cuts": lambda: cuts.power_cuts(how(11), plans("power", 0, 2 if short else 8)),
        "power-cuts-process": lambda: cuts.power_cuts(how(11), process),
        "power-cuts-recovery": lambda: cuts.power_cuts_in_recovery(
            how(23), plans("power", 4, 1 if short else 4), 150 if short else 40
        ),
        "exports": lambda: exports.killed_exports(how(29), both),
        "damage": lambda: cells.damage(how(37), process if short else both),
    }


TITLES = {
    "kill-points": "killed before and after every system call and kernel of a run",
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
    "power-cuts-recovery": "power cut in a recovery and the interval after it",
    "exports": "a copy, a delta, or its application is killed at, or has a failing, call",
    "damage": "a byte of manifest, header of the rows or of a frame is another",
}


def report(name: str, counts: Counts) -> str:
    title = TITLES.get(name, name)
    return f"| {title} | {counts.cases:,} | {counts.note or len(counts.bad)} |"


def run_sweeps(names: list[str], short: bool) -> tuple[list[str], int]:
    lines, bad, known = [], 0, sweeps(short)
    for name in names or known:
        start = time.monotonic()
        counts = known[name]()
        bad += len(counts.bad) + (not counts.cases and not counts.note)
        lines.append(report(name, counts))
        print(f"{lines[-1]}  {time.monotonic() - start:.0f} s", flush=True)
        for problem in counts.bad[:3]:
            print(problem[-2000:], file=sys.stderr)
    return lines, bad


def run_mutants(names: list[str], short: bool) -> tuple[list[str], int]:
    """Each has to be found."""
    lines, missed = [], 0
    for name in names or hunts.HUNTS:
        counts = hunts.hunt(name, How(step=2 if short else 1))
        missed += not counts.bad
        how = f"found by “{counts.cell}”, case {counts.cases}" if counts.bad else "NOT FOUND"
        lines.append(f"| {name} | {how} |")
        print(lines[-1], flush=True)
    return lines, missed


def where() -> str:
    """Date, commit, kernel, file system: what the counts are of."""
    git = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    folder = str(How().root or "/tmp")
    kind = ["stat", "-f", "-c", "%T", folder]
    system = subprocess.run(kind, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{datetime.date.today()}, commit {commit or 'unknown'}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, tables on {system or 'an unknown file system'}"
        f"{' (those of little memory on the disk)' if ROOT.is_dir() else ''}."
    )


def write_page(place: str, cell_lines: list[str], mutant_lines: list[str]) -> None:
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cell", action="append", default=[], choices=list(TITLES))
    parser.add_argument("--mutant", action="append", default=[], choices=list(hunts.HUNTS))
    options = parser.parse_args()
    place = where()
    some = bool(options.cell or options.mutant)
    cell_lines, mutant_lines, bad, missed = [], [], 0, 0
    if options.cell or not some:
        cell_lines, bad = run_sweeps(options.cell, options.short)
    if options.mutant or not some:
        mutant_lines, missed = run_mutants(options.mutant, options.short)
    if options.write and not some:
        write_page(place, cell_lines, mutant_lines)
    print(f"{bad} bad states, {missed} mutants missed")
    return int(bad + missed > 0)


if __name__ == "__main__":
    sys.exit(main())
