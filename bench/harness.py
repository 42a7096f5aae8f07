"""Timing, bars and reports, which all benchmarks share.

Contenders take turns (A B C A B C ...) in one process, so that a drift of the machine affects all
of them. Times are medians over rounds. A ratio is the median of the rounds' ratios, which cancels
most of the remaining drift. The harness sleeps between contenders, because idle OpenMP threads spin
for a few milliseconds. Bars are data, printed as met or missed.

Each benchmark calls ``check`` on a result before it times it. A peer that cannot run keeps its
column, and the cell gives the reason.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

README = Path(__file__).with_name("README.md")
THREADS = len(os.sched_getaffinity(0))
PAUSE = 0.010  # seconds: libgomp's idle threads spin for a few milliseconds before they sleep
FLOOR = 0.005  # seconds: the shortest sample, against which the cost of the clock is negligible
Samples = dict[str, list[float]]
Array = NDArray[Any]
Verdict = tuple[str, bool | None]


@dataclass(frozen=True)
class Contender:
    """A library to time: ``call(x)`` for every x of ``inputs``, or ``run(loops)``, which loops.

    ``absent`` is the reason why the library cannot run; the report shows it instead of a time.
    """

    name: str
    call: Callable[[Any], object] | None = None
    inputs: Sequence[Any] = ()
    run: Callable[[int], None] | None = None
    absent: str = ""


@dataclass(frozen=True)
class Bar:
    """A promise: in ``table``, where the case matches, ``peer / ours >= ratio`` in time.

    ``peer`` is a contender, ``"best peer"``, or a number of seconds.
    """

    table: str
    where: dict[str, Collection[object]]
    ours: str
    peer: str | float
    ratio: float

    def applies(self, table: str, case: dict[str, object]) -> bool:
        """Return whether the bar is about this case."""
        return table == self.table and all(case[k] in allowed for k, allowed in self.where.items())


@dataclass
class Row:
    """One line of a report. A verdict is a text and whether the bar was met (None: not judged)."""

    table: str
    case: dict[str, object]
    cells: dict[str, str]
    verdicts: list[Verdict] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)


class CheckFailed(Exception):
    """The result of a contender is wrong, so its time would mean nothing."""


def check(name: str, ok: bool | np.bool_) -> None:
    """Raise `CheckFailed` unless ``ok``."""
    if not ok:
        raise CheckFailed(f"{name} gives a wrong result, so it is not timed")


def aligned(shape: tuple[int, ...]) -> Array:
    """Return an uninitialised float32 array that starts on a page: rows share no cache line."""
    size = math.prod(shape) * 4
    raw = np.empty(size + 4096, np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + size].view(np.float32).reshape(shape)


def _sample(contender: Contender, loops: int) -> float:
    """Return seconds per call, over ``loops`` passes through the inputs.

    One untimed call precedes the clock. It wakes the thread pool and leaves a freed result for the
    allocator to reuse. Without that call, a virtual machine returns this memory to its host while
    the other contenders run, and the host's page faults dominate: 117 ms instead of 11 ms for
    256 MB.
    """
    call, inputs = contender.call, contender.inputs
    if call is not None:
        call(inputs[0])
    start = time.perf_counter_ns()
    if contender.run is not None:
        contender.run(loops)
    elif call is not None:
        for _ in range(loops):
            for x in inputs:
                call(x)
    return (time.perf_counter_ns() - start) / (loops * len(inputs)) / 1e9


def measure(contenders: Sequence[Contender], rounds: int) -> Samples:
    """Return seconds per call, one number per round, for each contender that is present."""
    present = [c for c in contenders if not c.absent]
    loops = {}
    for c in present:
        _sample(c, 1)  # warms up: page faults, code caches, thread pools
        loops[c.name] = max(1, math.ceil(FLOOR / (_sample(c, 1) * len(c.inputs))))
    samples: Samples = {c.name: [] for c in present}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for c in present:
                time.sleep(PAUSE)
                samples[c.name].append(_sample(c, loops[c.name]))
    finally:
        gc.enable()
    return samples


def show_time(seconds: float) -> str:
    """Format a time with three significant digits and a fitting unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def ratio(samples: Samples, slower: str, faster: str) -> float:
    """Return how many times longer ``slower`` takes: the median of the rounds' ratios."""
    return median(s / f for s, f in zip(samples[slower], samples[faster], strict=True))


def judge(bar: Bar, samples: Samples, best: str | None, complete: bool) -> Verdict:
    """Judge a bar. The best peer is known only if every peer could run (``complete``)."""
    peer = bar.peer if bar.peer != "best peer" else best if complete else None
    if isinstance(peer, float):
        reached, label = peer / median(samples[bar.ours]), f"as fast as {show_time(peer)}"
    elif peer in samples:
        reached, label = ratio(samples, peer, bar.ours), str(bar.peer)
    else:
        return f"{bar.ours} against {bar.peer}: not judged", None
    met = reached >= bar.ratio
    word = "met" if met else "**missed**"
    return f"{bar.ours} {reached:.2f}× {label} (bar {bar.ratio:.3g}×) {word}", met


def timed_row(
    table: str,
    case: dict[str, object],
    contenders: Sequence[Contender],
    bars: Sequence[Bar],
    rounds: int,
) -> Row:
    """Time the contenders on one case. The first is pyembed; the peers have other names."""
    samples = measure(contenders, rounds)
    ours = contenders[0].name
    peers = [c.name for c in contenders if not c.name.startswith(("pyembed", "limit"))]
    present = [name for name in peers if name in samples]
    best = min(present, key=lambda name: median(samples[name]), default=None)
    row = Row(table, case, {})
    for c in contenders:
        row.cells[c.name] = c.absent or show_time(median(samples[c.name]))
    row.cells["best peer / pyembed"] = f"{ratio(samples, best, ours):.2f}×" if best else "no peer"
    if "limit" in row.cells:
        timed = "limit" in samples
        row.cells["limit / pyembed"] = f"{ratio(samples, 'limit', ours):.2f}×" if timed else ""
    complete = present == peers
    row.verdicts = [judge(b, samples, best, complete) for b in bars if b.applies(table, case)]
    row.data["seconds"] = {
        name: {"median": median(s), "low": min(s), "high": max(s)} for name, s in samples.items()
    }
    return row


def _read(path: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(README.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """Return the machine, the commit and the versions, without which a time means nothing."""
    import pyembed

    config = pyembed.show_config()
    dirty = "+dirty" if _git("status", "--porcelain") else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": date.today().isoformat(),
        "commit": (_git("rev-parse", "--short", "HEAD") or "none") + dirty,
        "CPU": _read("/proc/cpuinfo", r"model name\s*: (.*)"),
        "threads": f"{THREADS} of {os.cpu_count()} cores",
        "memory": f"{memory / 2**30:.0f} GiB",
        "THP": _read("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "kernel": platform.release(),
        "load at start": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
        "pyembed": config["pyembed"],
        "SIMD": config["simd"],
        "OpenMP": config["openmp"],
        "numpy": np.__version__,
        "torch": version("torch"),
        "fbgemm_gpu": version("fbgemm-gpu-cpu"),
    }


def markdown(question: str, facts: dict[str, str], rows: Sequence[Row]) -> str:
    """Format the report: question, machine, one table per kind of row, and the bars."""
    lines = [f"*{question}*", "", " · ".join(f"{k} {v}" for k, v in facts.items()), ""]
    for table in dict.fromkeys(row.table for row in rows):
        chosen = [row for row in rows if row.table == table]
        cases = list(chosen[0].case)
        columns = list(dict.fromkeys(name for row in chosen for name in row.cells))
        lines += [f"**{table}**", "", "| " + " | ".join([*cases, *columns, "bars"]) + " |"]
        lines.append("|---" * (len(cases) + len(columns) + 1) + "|")
        for row in chosen:
            cells = [str(row.case[name]) for name in cases]
            cells += [row.cells.get(name, "") for name in columns]
            lines.append(
                "| " + " | ".join([*cells, "; ".join(text for text, _ in row.verdicts)]) + " |"
            )
        lines.append("")
    met = [met for row in rows for _, met in row.verdicts]
    lines.append(
        f"Bars: {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not judged."
    )
    return "\n".join(lines)


def json_lines(file: TextIO, name: str, facts: dict[str, str], rows: Sequence[Row]) -> None:
    """Write one JSON object per line: first the environment, then each row."""
    file.write(json.dumps({"bench": name, "environment": facts}) + "\n")
    for row in rows:
        bars = [{"bar": text, "met": met} for text, met in row.verdicts]
        record = {"bench": name, "table": row.table, "case": row.case, "bars": bars, **row.data}
        file.write(json.dumps(record) + "\n")


def write_readme(name: str, text: str) -> None:
    """Replace the text between the two markers of ``name`` in ``bench/README.md``."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
    page = README.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{README.name} lacks the markers {begin} and {end}")
    head, _, rest = page.partition(begin)
    README.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def progress(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)
