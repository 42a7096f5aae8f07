"""What `outofcore` runs on: how large things are, the files of a phase, a process a measurement.

Files go into a folder of their own below PYEMBED_BENCH_DIR, or the temporary folder. A phase makes
its tables and deletes them, so that no more than twice the size of one lies on the disk at once. A
table of weights serves those who keep state apart too: all its floats begin between 0 and 1.

What cannot be measured here (no cgroup, no disk, a peer that is missing) is a text in place of a
result. It refuses to go on when a process of ours fails, or anybody's result is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from bench import disk_tables, limits_disk
from bench.disk_tables import COLUMNS, DIM, FBGEMM, LMDB, OURS, ROCKS, ROW, STATES, THREE, VALUE
from bench.harness import CheckFailed, progress
from bench.limits_disk import Unavailable
from bench.outofcore_child import Result, Spec, arguments

TIMES = 8  # the file is this many times the memory, where nothing else is said
DATABASES = (LMDB, ROCKS)
PLAIN, THREE_FILES = "plain", "three"  # folders; the others are called like the optimizer
Measured = Result | str  # or why there is none


@dataclass(frozen=True)
class Size:
    """How large and how long. `n`: ids of a batch."""

    file: int = 8 << 30
    smaller: int = 4  # databases have this part of the bytes and the memory: they fill slowly
    n: int = 65536
    n_cold_peer: int = 512
    n_lookahead: int = 16384
    n_stalls: int = 4096
    n_by_size: int = 16384
    seconds: float = 8.0
    seconds_by_size: float = 2.0
    seconds_stalls: float = 240.0
    seconds_fio: float = 3.0
    rounds: int = 5
    ratios: tuple[float, ...] = (0.25, 1, 2, 4, 16)  # table / memory
    ratios_step: tuple[float, ...] = (0.25, 2, 16)


FULL = Size()
QUICK = Size(
    file=1 << 30,
    smaller=1,  # with less than 64 MB RocksDB is killed
    n=8192,  # whose pages are a quarter of the memory, as in the full run
    n_cold_peer=64,
    n_lookahead=2048,
    n_by_size=2048,
    seconds=2.0,
    seconds_by_size=0.5,
    seconds_stalls=15.0,
    seconds_fio=1.0,
    rounds=3,
    ratios=(0.25, 16),
    ratios_step=(16,),
)


class Run:
    """A run of the benchmark: its sizes, its folder, its processes."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.limit = size.file // TIMES
        self.why = ""  # nothing can be measured
        try:
            limits_disk.require_disk(folder)
            with limits_disk.memory_group(self.limit):
                pass
        except Unavailable as error:
            self.why = str(error)

    @contextmanager
    def files(self, name: str) -> Iterator[None]:
        """The files of a phase: PLAIN with the databases, THREE_FILES, or an optimizer's table."""
        try:
            if not self.why:
                progress(f"building {name}")
                self._build(name)
            yield
        finally:
            for made in self.folder.iterdir():
                shutil.rmtree(made)

    def _build(self, name: str) -> None:
        size, free = self.size.file, shutil.disk_usage(self.folder).free
        if free < 2 * size:
            raise SystemExit(
                f"{self.folder} has {free >> 20} MB free, the run needs {2 * size >> 20} MB; set "
                "PYEMBED_BENCH_DIR to a folder with room"
            )
        if name == THREE_FILES:
            (self.folder / name).mkdir()
            for state in STATES:
                self._table(f"{name}/{state}", size // VALUE, None)
        elif name != PLAIN:
            self._table(name, size // (ROW * COLUMNS[name]), name.lower())
        else:
            self._table(name, size // ROW, None)
            for who in DATABASES:
                if not disk_tables.absent(who):
                    source, rows = (
                        self.folder / name / "rows.npy",
                        size // self.size.smaller // VALUE,
                    )
                    disk_tables.fill(who, self.folder / who, source, rows)

    def _table(self, name: str, rows: int, optimizer: str | None) -> None:
        import pyembed

        init = pyembed.init.uniform(0.0, 1.0)
        path = self.folder / name
        pyembed.Table.create(path, rows, DIM, optimizer=optimizer, init=init).close()

    def spec(
        self, who: str, what: str, optimizer: str, n: int, times: float = TIMES, limit: int = 0
    ) -> Spec:
        """A process's task, but for its group: a table `times` as large as the memory."""
        limit = (limit or self.limit) // (self.size.smaller if who in DATABASES else 1)
        columns = COLUMNS.get(optimizer, 1)
        folder = {OURS: optimizer or PLAIN, THREE: THREE_FILES, LMDB: LMDB, ROCKS: ROCKS}
        path = self.folder / folder.get(who, PLAIN)
        row = VALUE if who in DATABASES else ROW if who == FBGEMM else ROW * columns
        source, stride = path / "rows.npy", row if who == OURS else ROW
        if who == THREE:
            source = path / STATES[0] / "rows.npy"
        elif who in DATABASES:  # what they were filled with, until they were trained
            source, stride = self.folder / PLAIN / "rows.npy", VALUE
        return Spec(
            who=who,
            path=str(path),
            what=what,
            optimizer=optimizer,
            rows=int(times * limit) // row,
            n=n,
            limit=limit,
            source="" if who in DATABASES and optimizer else str(source),
            stride=stride,
            seconds=self.size.seconds,
            rounds=self.size.rounds,
        )

    def child(self, spec: Spec) -> Measured:
        """Measure in a process of its own."""
        reason = self.why or disk_tables.absent(spec.who, spec.optimizer)
        if reason:
            return reason
        progress(f"  {spec.who}: {spec.what} {spec.optimizer or 'gather'} of {spec.rows:,} rows")
        with limits_disk.memory_group(spec.limit) as group:
            done = subprocess.run(
                arguments(replace(spec, group=str(group))),
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).parents[1],
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # the model of lookahead
                timeout=20 * spec.seconds + 600,
            )
        if done.returncode == -9 and spec.who not in (OURS, THREE):
            return "killed: out of memory"
        if done.returncode:
            raise SystemExit(f"{spec} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        result: Result = json.loads(done.stdout.splitlines()[-1])
        if "wrong" in result:
            if spec.who in (OURS, THREE):
                raise CheckFailed(result["wrong"])
            return "gives a wrong result"
        return str(result["unavailable"]) if "unavailable" in result else result

    def disk(self, spec: Spec) -> float | str:
        """fio's rate on the file of a task."""
        if self.why:
            return self.why
        try:
            return limits_disk.fio_rate(Path(spec.source), self.size.seconds_fio)
        except Unavailable as error:
            return str(error)

    def beside_disk(self, spec: Spec) -> tuple[Measured, float | str]:
        """A process's result, and fio's rate: the mean of before and after."""
        before, result, after = self.disk(spec), self.child(spec), self.disk(spec)
        if isinstance(before, str) or isinstance(after, str):
            return result, before
        return result, mean((before, after))


@contextmanager
def opened(size: Size) -> Iterator[Run]:
    """A run in a folder of its own."""
    place = os.environ.get("PYEMBED_BENCH_DIR")
    with tempfile.TemporaryDirectory(prefix="pyembed-bench-", dir=place) as folder:
        yield Run(size, Path(folder))
