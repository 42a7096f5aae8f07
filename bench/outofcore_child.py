"""One measured process of `outofcore`: ``python -m bench.outofcore_child SPEC`` prints JSON.

The process imports its modules and prepares the ids. Then it joins the memory group, empties the
page cache of the table, opens the table and compares results: gathered rows with the bytes on the
disk, and a step with float64. Only then it measures one of these:

- *cold*: empty the cache, open, gather one batch, close; a few rounds.
- *steady*: batches until memory has been filled and replaced once: until twice the limit was read
  from the disk, or, for a table that fits, until batches hardly read. Then batches for seconds.
- *lookahead*: steps alone, a model alone, then both in turn without and with `pyembed.lookahead`.

Peers that are hundreds of times slower get smaller batches: in `steady` they start with 32 ids, and
the size doubles while a batch takes less than 50 ms.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import disk_tables, limits_disk, update, workloads
from bench.disk_tables import DIM, HEADER, OURS, THREE
from bench.harness import Array, CheckFailed, check

FIRST, SHORT = 32, 0.05  # ids of a peer's first batch; seconds of one that may double
FULL = 2  # a table counts as steady once this many times the limit was read
FEW = 0.001  # pages read per id, below which the table is in memory
WARM_SECONDS = 45.0  # after which the table counts as steady
STREAM = 192  # batches of a prepared stream, used in turn
EDGE = 3  # steps at both ends of a loop, which lookahead does not fill
PATIENCE = 15.0  # seconds of cold batches after which there is no further round


@dataclass(frozen=True)
class Spec:
    """The task of a process."""

    contender: str
    path: str  # the table of the contender
    what: str  # "cold", "steady" or "lookahead"
    optimizer: str  # "" for gathers alone
    rows: int  # ids are below this number
    n: int  # ids of a batch
    limit: int  # bytes of memory
    group: str = ""  # the memory group to join
    source: str = ""  # the file with the expected rows, unless the table was trained
    stride: int = 4 * DIM  # bytes from row to row in `source`
    ids: str = "uniform"
    seconds: float = 10.0
    rounds: int = 5


Result = dict[str, Any]
Stream = Callable[[int], Array]


def stream(spec: Spec) -> Stream:
    """Return a function of a size that draws batches; costly ones are prepared with size `n`."""
    if spec.ids == "uniform":
        rng = np.random.default_rng(1)
        return lambda n: rng.integers(0, spec.rows, n)
    ready = workloads.batches(spec.ids, spec.rows, spec.n, STREAM)
    turn = iter(range(1 << 62))
    return lambda n: ready[next(turn) % STREAM][:n]


def gradient(n: int) -> Array:
    """Return odd multiples of 1/64: their sums are exact in any order."""
    odd = np.random.default_rng(3).integers(-4, 4, (n, DIM), dtype=np.int8) * 2 + 1
    return (odd / 64).astype(np.float32)


def pages_per_id(ids: Array, stride: int) -> float:
    """Return pages per id of a batch: rows of `stride` bytes follow the header."""
    first = (HEADER + ids * stride) // limits_disk.PAGE
    last = (HEADER + (ids + 1) * stride - 1) // limits_disk.PAGE
    return len(np.unique(np.concatenate([first, last]))) / len(ids)


def check_table(table: Any, spec: Spec) -> None:
    """Compare a gather with the bytes on the disk, and a step with float64."""
    ids = np.random.default_rng(2).integers(0, spec.rows, 12)
    ids = np.concatenate([ids, ids[:4]])
    if spec.source:
        found = np.asarray(table.gather(ids))
        wanted = limits_disk.rows_direct(Path(spec.source), HEADER, spec.stride, ids, DIM)
        check(f"{spec.contender} gather", np.array_equal(found, wanted))
    if not spec.optimizer:
        return
    grad = gradient(len(ids))
    rows, place = np.unique(ids, return_inverse=True)
    summed = np.zeros((len(rows), DIM))
    np.add.at(summed, place, grad.astype(np.float64))
    before = table.read(rows)
    table.step(ids, grad)
    wanted = update.oracle(getattr(table, "rule", spec.optimizer), before, summed, table.steps)
    close = np.allclose(table.read(rows)[0], wanted, rtol=1e-5, atol=1e-6)
    check(f"{spec.contender} {spec.optimizer}", close)


def timed(call: Callable[..., object], *arguments: Any) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def call_of(table: Any, spec: Spec) -> Callable[[Array], object]:
    """Return the call to time: a gather, or gather and step."""
    if not spec.optimizer:
        gather: Callable[[Array], object] = table.gather
        return gather
    grad = gradient(spec.n)
    return lambda ids: table.step(ids, grad[: len(ids)])


class Filling:
    """Whether memory has filled, which `done` decides after every batch."""

    def __init__(self, spec: Spec) -> None:
        self.need, self.start = FULL * spec.limit, time.monotonic()
        self.first = self.last = limits_disk.bytes_read()
        self.ids = 0

    def done(self, n: int) -> bool:
        """Count a batch of `n` ids and return whether memory has filled."""
        now = limits_disk.bytes_read()
        if now - self.first > self.need or time.monotonic() - self.start > WARM_SECONDS:
            return True
        self.ids += n
        if self.ids < 1 << 15:  # too few for a decision
            return False
        few = now - self.last < FEW * self.ids * limits_disk.PAGE
        self.last, self.ids = now, 0
        return few


def warm(call: Callable[[Array], object], draw: Stream, spec: Spec) -> int:
    """Call until memory has filled; return a size of batch that suits the contender."""
    n = spec.n if spec.contender in (OURS, THREE) else min(FIRST, spec.n)
    filling = Filling(spec)
    while True:
        seconds = timed(call, draw(n))
        full = filling.done(n)
        if seconds < SHORT and n < spec.n:
            n = min(2 * n, spec.n)
        elif full:
            return n


def cold(opened: Callable[[], Any], draw: Stream, spec: Spec) -> Result:
    """Measure one batch on a table that was just opened, with an empty cache; a few rounds."""
    seconds = []
    for _ in range(spec.rounds):
        limits_disk.empty_cache(Path(spec.path))
        table = opened()
        seconds.append(timed(call_of(table, spec), draw(spec.n)))
        table.close()
        del table
        if sum(seconds) > PATIENCE:
            break
    return {"n": spec.n, "seconds": seconds}


def steady(opened: Callable[[], Any], draw: Stream, spec: Spec) -> Result:
    """Fill memory, then measure batches for some seconds, and at least three."""
    table = opened()
    call = call_of(table, spec)
    n = warm(call, draw, spec)
    seconds: list[float] = []
    before, end = limits_disk.bytes_read(), time.monotonic() + spec.seconds
    while time.monotonic() < end or len(seconds) < 3:
        seconds.append(timed(call, draw(n)))
    read = limits_disk.bytes_read() - before
    held = limits_disk.anonymous(spec.group)
    table.close()
    return {"n": n, "seconds": seconds, "read": read, "anonymous": held}


def _model() -> Callable[[int], None]:
    """Return work for one thread: matrix products in its cache, about 1 ms each."""
    a = np.random.default_rng(4).random((256, 256), np.float32)
    out = np.empty_like(a)

    def compute(count: int) -> None:
        for _ in range(count):
            np.matmul(a, a, out=out)

    return compute


def lookahead(opened: Callable[[], Any], draw: Stream, spec: Spec) -> Result:
    """Measure steps alone, the model alone, both in turn, and both with lookahead."""
    import pyembed

    table, compute = opened(), _model()
    grad = gradient(spec.n)
    warm(lambda ids: table.step(ids, grad), draw, spec)
    product = min(timed(compute, 8) / 8 for _ in range(8))
    length = 2 * EDGE + max(6, round(spec.seconds / timed(table.step, draw(spec.n), grad)))
    result: Result = {"n": spec.n, "steps": [], "model": [], "in turn": [], "lookahead": []}

    def loop(name: str, batches: Any, count: int) -> None:
        marks = []
        for ids in batches:
            marks.append(time.perf_counter())
            table.gather(ids)
            compute(count)
            table.apply(ids, grad)
        result[name].append((marks[-EDGE] - marks[EDGE]) / (len(marks) - 2 * EDGE))

    for _ in range(spec.rounds):
        loop("steps", [draw(spec.n) for _ in range(length)], 0)
        count = max(1, round(result["steps"][-1] / product))
        result["model"].append(median(timed(compute, count) for _ in range(3)))
        loop("in turn", [draw(spec.n) for _ in range(length)], count)
        batches = [draw(spec.n) for _ in range(length)]
        loop("lookahead", pyembed.lookahead(batches, table.table, depth=2), count)
    table.close()
    return result


def measure(spec: Spec) -> Result:
    """Measure the task in the memory group that it names."""
    where = disk_tables.Where(spec.contender, spec.path, spec.optimizer, spec.limit)
    disk_tables.absent(spec.contender, spec.optimizer)  # imports the library outside the group
    draw = stream(spec)
    limits_disk.join(spec.group)

    def opened() -> Any:
        return disk_tables.OPEN[spec.contender](where)

    table = opened()
    check_table(table, spec)
    table.close()
    del table
    limits_disk.empty_cache(Path(spec.path))
    result = {"cold": cold, "steady": steady, "lookahead": lookahead}[spec.what](opened, draw, spec)
    return result | {"what": spec.what, "pages per id": pages_per_id(draw(spec.n), spec.stride)}


def main() -> int:
    """Measure the task of the command line and print the result as JSON."""
    spec = Spec(**json.loads(sys.argv[1]))
    try:
        result = measure(spec)
    except CheckFailed as error:
        result = {"wrong": str(error)}
    except limits_disk.Unavailable as error:
        result = {"unavailable": str(error)}
    print(json.dumps(result))
    return 0


def arguments(spec: Spec) -> list[str]:
    """Return the command that measures a task."""
    text = json.dumps(dataclasses.asdict(spec))
    return [sys.executable, "-m", "bench.outofcore_child", text]


if __name__ == "__main__":
    sys.exit(main())
