"""Build: the command line writes a table from an initialiser, compared with the rate of the disk.

The time includes the whole command and a final fsync of the file, in case the command left data to
sync. The rate of the disk is measured before and after each build, in the same folder, by O_DIRECT
writes of 16 MB, one and four at a time; the fastest is the limit. Files go into the temporary
folder (``TMPDIR``) and are deleted. Without room for the table the benchmark does not start.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from bench.harness import Row, Verdict, check
from bench.limit import disk_write_rate

QUESTION = (
    "How fast is a table built from an initialiser, compared with the disk, and in how much memory?"
)
DIM = 64
ROW_BYTES = 2 * DIM * 4  # weight and Adagrad's sum
MIN_SHARE_OF_DISK = 0.5
MAX_PEAK = 300e6  # bytes


def _build(path: Path, rows: int) -> tuple[float, int]:
    """Return the seconds until the file is on the disk, and the command's peak resident bytes."""
    command = [sys.executable, "-m", "pyembed", "build", "-o", str(path), "--rows", str(rows)]
    command += ["--dim", str(DIM), "--init", "normal", "--optimizer", "adagrad"]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
        fd = os.open(path / "rows.npy", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return time.perf_counter() - start, usage.ru_maxrss * 1024


def _checked(path: Path, rows: int) -> int:
    """Check the size of the file and samples of both columns; return its bytes."""
    # Read, not mapped: the peak of a child starts at that of its parent.
    file = path / "rows.npy"
    check("pyembed build", file.stat().st_size == 4096 + rows * ROW_BYTES)
    for row in np.random.default_rng(0).integers(0, rows - 64, 32):
        sample = np.fromfile(file, np.float32, 64 * 2 * DIM, offset=4096 + int(row) * ROW_BYTES)
        sample = sample.reshape(64, 2 * DIM)
        check("pyembed build", abs(sample[:, :DIM].std() - 1) < 0.1 and not sample[:, DIM:].any())
    return (path / "rows.npy").stat().st_size


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Build, measure the disk around it, repeat; emit one row."""
    rows = 2_000_000 if quick else 12_000_000
    size = rows * ROW_BYTES
    disk_bytes = (512 << 20) if quick else (2 << 30)
    with tempfile.TemporaryDirectory(prefix="pyembed-bench-") as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < size + disk_bytes:
            raise SystemExit(f"{folder} has {free >> 20} MB free, the build needs {size >> 20} MB")

        def disk() -> float:
            return max(disk_write_rate(folder, disk_bytes, writers) for writers in (1, 4))

        rates, shares, peaks, before = [], [], [], disk()
        for _ in range(1 if quick else 3):
            seconds, peak = _build(folder / "table.pyembed", rows)
            written = _checked(folder / "table.pyembed", rows)
            shutil.rmtree(folder / "table.pyembed")
            after = disk()
            rates.append(written / seconds)
            shares.append(rates[-1] / max(before, after))
            peaks.append(peak)
            before = after
    share, peak, rate = median(shares), max(peaks), median(rates)
    verdicts: list[Verdict] = []
    for text, met in (
        (f"{share:.2f} of the disk (bar {MIN_SHARE_OF_DISK})", share >= MIN_SHARE_OF_DISK),
        (f"peak {peak / 1e6:.0f} MB (bar {MAX_PEAK / 1e6:.0f} MB)", peak < MAX_PEAK),
    ):
        verdicts.append((f"{text} {'met' if met else '**missed**'}", met))
    case = {"rows": f"{rows / 1e6:.3g} M", "dim": DIM, "optimizer": "adagrad"}
    cells = {
        "file": f"{written / 1e9:.2f} GB",
        "pyembed build": f"{rate / 1e6:.0f} MB/s",
        "limit: disk": f"{rate / share / 1e6:.0f} MB/s",
        "pyembed / disk": f"{share:.2f}",
        "peak memory": f"{peak / 1e6:.0f} MB",
    }
    data: dict[str, object] = {"rates": rates, "shares": shares, "peaks": peaks, "bytes": written}
    emit(Row("build", dict(case), cells, verdicts, data))
