"""The runs of `outofcore`: sizes, the files of a phase, and one process per measurement.

Files go into a new folder in PYEMBED_BENCH_DIR, or in the temporary folder. A phase creates its
tables and deletes them, so that the disk never holds more than twice the size of a table. A table
of weights also serves the peers with separate state, because all its floats start between 0 and 1.

If something cannot be measured (no cgroup, no disk, a missing peer), a text takes the place of the
result. A process of pyembed that fails, or a wrong result of pyembed, stops the benchmark.
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

TIMES = 8  # the default size of the file as a multiple of the memory
DATABASES = (LMDB, ROCKS)
PLAIN, THREE_FILES = "plain", "three"  # folders; the others have the names of optimizers
Measured = Result | str  # a string gives the reason for a missing result


@dataclass(frozen=True)
class Size:
    """The sizes and times of a run. `n` is the number of ids in a batch."""

    file: int = 8 << 30
    smaller: int = 4  # divides the bytes and the memory of databases, which fill slowly
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
    n=8192,  # its pages are a quarter of the memory, as in the full run
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
        self.why = ""  # the reason why nothing can be measured
        try:
            limits_disk.require_disk(folder)
            with limits_disk.memory_group(self.limit):
                pass
        except Unavailable as error:
            self.why = str(error)

    @contextmanager
    def files(self, name: str) -> Iterator[None]:
        """Create and remove the files of a phase: PLAIN, THREE_FILES or an optimizer's table."""
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
            for contender in DATABASES:
                if not disk_tables.absent(contender):
                    source, rows = (
                        self.folder / name / "rows.npy",
                        size // self.size.smaller // VALUE,
                    )
                    disk_tables.fill(contender, self.folder / contender, source, rows)

    def _table(self, name: str, rows: int, optimizer: str | None) -> None:
        import pyembed

        init = pyembed.init.uniform(0.0, 1.0)
        path = self.folder / name
        pyembed.Table.create(path, rows, DIM, optimizer=optimizer, init=init).close()

    def spec(
        self,
        contender: str,
        what: str,
        optimizer: str,
        n: int,
        times: float = TIMES,
        limit: int = 0,
    ) -> Spec:
        """Return a task without its group: the table is `times` as large as the memory."""
        limit = (limit or self.limit) // (self.size.smaller if contender in DATABASES else 1)
        columns = COLUMNS.get(optimizer, 1)
        folder = {OURS: optimizer or PLAIN, THREE: THREE_FILES, LMDB: LMDB, ROCKS: ROCKS}
        path = self.folder / folder.get(contender, PLAIN)
        row = VALUE if contender in DATABASES else ROW if contender == FBGEMM else ROW * columns
        source, stride = path / "rows.npy", row if contender == OURS else ROW
        if contender == THREE:
            source = path / STATES[0] / "rows.npy"
        elif contender in DATABASES:  # their values come from there until they are trained
            source, stride = self.folder / PLAIN / "rows.npy", VALUE
        return Spec(
            contender=contender,
            path=str(path),
            what=what,
            optimizer=optimizer,
            rows=int(times * limit) // row,
            n=n,
            limit=limit,
            source="" if contender in DATABASES and optimizer else str(source),
            stride=stride,
            seconds=self.size.seconds,
            rounds=self.size.rounds,
        )

    def child(self, spec: Spec) -> Measured:
        """Measure in a new process."""
        reason = self.why or disk_tables.absent(spec.contender, spec.optimizer)
        if reason:
            return reason
        progress(
            f"  {spec.contender}: {spec.what} {spec.optimizer or 'gather'} of {spec.rows:,} rows"
        )
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
        if done.returncode == -9 and spec.contender not in (OURS, THREE):
            return "killed: out of memory"
        if done.returncode:
            raise SystemExit(f"{spec} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        result: Result = json.loads(done.stdout.splitlines()[-1])
        if "wrong" in result:
            if spec.contender in (OURS, THREE):
                raise CheckFailed(result["wrong"])
            return "gives a wrong result"
        return str(result["unavailable"]) if "unavailable" in result else result

    def disk(self, spec: Spec) -> float | str:
        """Return the rate of fio on the file of a task."""
        if self.why:
            return self.why
        try:
            return limits_disk.fio_rate(Path(spec.source), self.size.seconds_fio)
        except Unavailable as error:
            return str(error)

    def with_disk(self, spec: Spec) -> tuple[Measured, float | str]:
        """Return the result of a process, and the rate of fio: the mean of before and after."""
        before, result, after = self.disk(spec), self.child(spec), self.disk(spec)
        if isinstance(before, str) or isinstance(after, str):
            return result, before
        return result, mean((before, after))


@contextmanager
def opened(size: Size) -> Iterator[Run]:
    """Yield a run in a new folder, which is removed at the end."""
    place = os.environ.get("PYEMBED_BENCH_DIR")
    with tempfile.TemporaryDirectory(prefix="pyembed-bench-", dir=place) as folder:
        yield Run(size, Path(folder))
