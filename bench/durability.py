"""Durability: the cost of the journal for a step, for a commit, and for recovery.

*steps*: an Adagrad step on a table on disk that fits in the page cache, with a commit every 100
steps that is not counted. With "none" there is no journal; the other levels write a row to it
before the row's first change in a transaction. "model" is the time for which the caller computes
between steps (one thread sums an array again and again); it is counted. The levels take turns on
the same ids. Each runs two transactions without the model, and then one that is timed, because
later transactions overwrite the journal of earlier ones.
*commit*: the commit after one step, compared with fio, which makes as many random writes of 4 KiB
and one fsync, in a file of the same size on the same disk.
*recovery*: a process changes every row and is killed. The next open, from an empty page cache, is
compared with the rate at which four threads read the table's file with O_DIRECT.

Rows after recovery must equal the rows before the killed process.
Files go into PYEMBED_BENCH_DIR, or the temporary folder.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import workloads
from bench.harness import THREADS, Array, Row, Verdict, check, progress, show_time
from bench.limits_disk import Unavailable, empty_cache

QUESTION = "What do commits that survive a crash cost: a step, a commit, a recovery?"
DIM, N, ROWS = 64, 65536, 4_000_000
INTERVAL = 100  # steps between commits
CASES = (  # ids, seconds of model, level, highest cost of a step relative to "none"
    ("uniform", 0.0, "process", 1.7),
    ("uniform", 0.0, "power", None),
    ("zipf 1.05 hashed", 0.010, "process", 1.15),
    ("zipf 1.05 hashed", 0.100, "power", 1.15),
)


def _compute(seconds: float) -> None:
    """Keep one thread busy with an array that fits into its cache."""
    array, end = np.ones(1 << 16, np.float32), time.perf_counter() + seconds
    while time.perf_counter() < end:
        array.sum()


def _steps(path: Path, level: str, batches: list[Array], model: float) -> tuple[float, float]:
    """Return the mean seconds of a step with its model, and those of the commit."""
    import pyembed

    grad = np.full((N, DIM), 1e-3, np.float32)
    with pyembed.Table.open(path, durability=level, num_threads=THREADS) as table:
        for first in range(0, table.rows, N):  # bring all rows into memory
            table.gather(np.arange(first, min(first + N, table.rows)))
        optimizer = pyembed.optim.Adagrad(table, lr=1e-3)
        for _ in range(2):  # transactions, until both files of the journal have their size
            for ids in batches:
                optimizer.step(ids, grad)
            table.commit()
        start = time.perf_counter()
        for ids in batches:
            _compute(model)
            optimizer.step(ids, grad)
        middle = time.perf_counter()
        table.commit()
        return (middle - start) / len(batches), time.perf_counter() - middle


def _cost(path: Path, quick: bool, emit: Callable[[Row], None]) -> None:
    rounds, interval = (2, 20) if quick else (5, INTERVAL)
    for kind, model, level, most in CASES:
        batches = list(workloads.batches(kind, ROWS, N, interval))
        seconds: dict[str, list[float]] = {"none": [], level: []}
        for _ in range(rounds):
            for name, found in seconds.items():
                found.append(_steps(path, name, batches, model)[0])
        share = median(b / a for a, b in zip(seconds["none"], seconds[level], strict=True))
        verdicts: list[Verdict] = []
        if most is not None:
            word = "met" if share <= most else "**missed**"
            verdicts = [(f"{share:.2f}× none (bar at most {most}×) {word}", share <= most)]
        case = {"ids": kind, "N": N, "model": show_time(model) if model else "none"}
        cells = {name: show_time(median(found)) for name, found in seconds.items()}
        cells = {"level": level, "none": cells["none"], "with it": cells[level]}
        cells["with / none"] = f"{share:.2f}×"
        emit(Row("steps", dict(case), cells, verdicts, {"seconds": seconds}))


def _fio_writes(path: Path, size: int, pages: int) -> float:
    """Return the seconds of fio for random writes of 4 KiB into the page cache and one fsync."""
    if not shutil.which("fio"):
        raise Unavailable("fio is not installed")
    command = ["fio", "--name=commit", f"--filename={path}", f"--size={size}", "--bs=4k"]
    command += ["--rw=randwrite", "--randrepeat=0", f"--io_size={4096 * pages}", "--end_fsync=1"]
    command += ["--ioengine=psync", "--fallocate=none", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    except (ValueError, LookupError):
        raise Unavailable(f"fio failed: {done.stderr.strip()[:80]}") from None
    return float(found["job_runtime"]) / 1e3


def _commits(path: Path, quick: bool, emit: Callable[[Row], None]) -> None:
    import pyembed

    scratch = path.with_name("fio.bin")
    shutil.copyfile(path / "rows.npy", scratch)
    grad = np.full((N, DIM), 1e-3, np.float32)
    ratios, ours, theirs = [], [], []
    batches = list(workloads.batches("uniform", ROWS, N, 3 if quick else 7))
    with pyembed.Table.open(path, num_threads=THREADS) as table:
        optimizer = pyembed.optim.Adagrad(table, lr=1e-3)
        for ids in batches:
            table.gather(ids)
            optimizer.step(ids, grad)
            pages = np.unique(ids * 2 * DIM * 4 // 4096).size
            start = time.perf_counter()
            table.commit()
            ours.append(time.perf_counter() - start)
            try:
                theirs.append(_fio_writes(scratch, scratch.stat().st_size, pages))
            except Unavailable as why:
                emit(Row("commit", {}, {"commit": show_time(median(ours)), "fio": str(why)}))
                return
            ratios.append(ours[-1] / theirs[-1])
    share = median(ratios)
    word = "met" if share <= 1.3 else "**missed**"
    verdicts: list[Verdict] = [(f"{share:.2f}× fio (bar at most 1.3×) {word}", share <= 1.3)]
    cells = {"commit": show_time(median(ours)), "fio": show_time(median(theirs))}
    case = {"ids": "uniform", "changed rows": N, "pages": f"{pages:,}"}
    emit(Row("commit", dict(case), cells, verdicts, {"commit": ours, "fio": theirs}))


CHILD = """
import os, signal, sys, numpy, pyembed
table = pyembed.Table.open(sys.argv[1], num_threads=2)
for first in range(0, table.rows, 65536):
    ids = numpy.arange(first, min(first + 65536, table.rows))
    table.scatter_add(ids, numpy.ones((ids.size, table.dim), numpy.float32))
os.sync()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _read_rate(file: Path) -> float:
    """Return the bytes/s of four threads that read a file in pieces of 4 MB with O_DIRECT."""
    fd, piece = os.open(file, os.O_RDONLY | os.O_DIRECT), 4 << 20
    buffers = [mmap.mmap(-1, piece) for _ in range(4)]

    def read(k: int) -> int:
        return sum(
            os.preadv(fd, [buffers[k]], at)
            for at in range(k * piece, 1 << 30, len(buffers) * piece)
        )

    start = time.perf_counter()
    with ThreadPoolExecutor(len(buffers)) as pool:
        size = sum(pool.map(read, range(len(buffers))))
    os.close(fd)
    return size / (time.perf_counter() - start)


def _recovery(path: Path, quick: bool, emit: Callable[[Row], None]) -> None:
    import pyembed

    with pyembed.Table.open(path, "r") as table:
        sample = np.random.default_rng(0).integers(0, table.rows, 1000)
        before = table.gather(sample)
    rates, shares = [], []
    for _ in range(1 if quick else 3):
        done = subprocess.run([sys.executable, "-c", CHILD, str(path)], check=False)
        check("a killed process", done.returncode == -signal.SIGKILL)
        size = sum(file.stat().st_size for file in path.glob("undo?"))
        empty_cache(path)
        disk = _read_rate(path / "rows.npy")
        empty_cache(path)
        start = time.perf_counter()
        table = pyembed.Table.open(path, num_threads=THREADS)
        seconds = time.perf_counter() - start
        check("recovery", np.array_equal(table.gather(sample), before))
        table.close()
        rates.append(size / seconds)
        shares.append(rates[-1] / disk)
    share = median(shares)
    word = "met" if share >= 0.5 else "**missed**"
    verdicts: list[Verdict] = [(f"{share:.2f} of the disk (bar 0.5) {word}", share >= 0.5)]
    cells = {"rate": f"{median(rates) / 1e6:.0f} MB/s", "recovery / disk": f"{share:.2f}"}
    case = {"journal": f"{size / 1e9:.2f} GB", "rows": f"{ROWS / 1e6:.0f} M"}
    emit(Row("recovery", dict(case), cells, verdicts, {"rates": rates, "shares": shares}))


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Create a table, then measure each part in turn."""
    import pyembed

    with tempfile.TemporaryDirectory(dir=os.environ.get("PYEMBED_BENCH_DIR")) as name:
        path = Path(name) / "table.pyembed"
        progress("building")
        recipe = pyembed.init.uniform(-1, 1)
        pyembed.Table.create(path, ROWS, DIM, "adagrad", init=recipe).close()
        _cost(path, quick, emit)
        _commits(path, quick, emit)
        _recovery(path, quick, emit)
