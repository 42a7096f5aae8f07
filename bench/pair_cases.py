"""Cases that compare two checkouts of pyembed: each trains or reads rows by the public API alone.

`bench.pairs` starts this module once for each checkout, with only that checkout's `pyembed` on the
path, and drives it over stdin and stdout: ``prepare CASE``, then ``sample CALLS`` many times. This
module therefore imports numpy and `bench.workloads`, and no other part of the benchmarks.

A case is small: its table has a million rows of 64 floats, so that rows come from memory and not
from a cache, and a round of all cases takes well under two minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import workloads

THREADS = len(os.sched_getaffinity(0))
ROWS, DIM, LR = 1_000_000, 64, 1e-3
WALK = 128 << 20  # bytes of rows that the batches of a case read together
SIZES = (4096, 65536)
STATES = {
    "SGD": "sgd", "Adagrad": "adagrad", "Adam": "adam", "RowwiseAdagrad": "rowwise_adagrad",
    "LAMB": "lamb", "FTRL": "ftrl",
}  # fmt: skip
ONLY_STEP = ("RowwiseAdagrad", "LAMB", "FTRL")  # one row each, of the largest size
TABLES = (
    1460, 583, 200_000, 200_000, 305, 24, 12517, 633, 3, 93145, 5683, 200_000, 3194,
    27, 14992, 200_000, 10, 5652, 2173, 4, 200_000, 18, 15, 200_000, 105, 142_572,
)  # fmt: skip
DISK_ROWS, DISK_N = 250_000, 16384
Array = NDArray[Any]
Cases = dict[str, Callable[[], "Subject"]]


class Subject:
    """A call to time, the inputs that it cycles through, and a view of what it changed."""

    def __init__(
        self, call: Callable[[Any], object], inputs: Sequence[Any], result: Callable[[], Array]
    ) -> None:
        self.call, self.inputs, self.result = call, inputs, result
        self.turn = 0

    def next_input(self) -> Any:
        """Return the next input in turn."""
        self.turn += 1
        return self.inputs[self.turn % len(self.inputs)]

    def sample(self, calls: int) -> float:
        """Return seconds a call."""
        self.call(self.next_input())  # wakes the pool
        batch = [self.next_input() for _ in range(calls)]
        start = time.perf_counter()
        for x in batch:
            self.call(x)
        return (time.perf_counter() - start) / calls


class Interrupted(Subject):
    """A call with work around it that is not timed, such as the commit after some steps."""

    def __init__(
        self,
        call: Callable[[Any], object],
        inputs: Sequence[Any],
        result: Callable[[], Array],
        before: Callable[[Any], object] = lambda x: None,
        after: Callable[[], object] = lambda: None,
        most_calls: int = 1,
    ) -> None:
        super().__init__(call, inputs, result)
        self.before, self.after, self.most_calls = before, after, most_calls

    def sample(self, calls: int) -> float:
        """Return seconds a call, of at most ``most_calls`` between `before` and `after`."""
        batch = [self.next_input() for _ in range(min(calls, self.most_calls))]
        self.before(batch[0])
        start = time.perf_counter()
        for x in batch:
            self.call(x)
        seconds = time.perf_counter() - start
        self.after()
        return seconds / len(batch)


def _batches(n: int, rows: int = ROWS, kind: str = "uniform") -> list[Array]:
    return list(workloads.batches(kind, rows, n, min(512, max(1, WALK // (n * DIM * 4)))))


def _gradient(n: int, dim: int = DIM) -> Array:
    """Odd multiples of 1/64: their sums are exact in any order."""
    odd = np.random.default_rng(3).integers(-4, 4, (n, dim)) * 2 + 1
    return (odd / 64).astype(np.float32)


@lru_cache(maxsize=1)
def _weight(rows: int = ROWS) -> Array:
    return np.random.default_rng(0).random((rows, DIM), np.float32)


@lru_cache(maxsize=1)
def _layer(rule: str) -> Any:
    """A trainable layer over a table in memory that has the state of ``rule``."""
    import pyembed

    start = pyembed.init.uniform(-1.0, 1.0)
    table = pyembed.Table.memory(ROWS, DIM, STATES[rule], init=start, num_threads=THREADS)
    return pyembed.Embedding.from_pretrained(table, freeze=False)


def _step(rule: str, n: int, kind: str = "uniform", gather: bool = False) -> Subject:
    import pyembed

    layer, grad, batches = _layer(rule), _gradient(n), _batches(n, kind=kind)
    optimizer = getattr(pyembed.optim, rule)(layer, lr=LR)

    def both(ids: Array) -> None:
        layer(ids)
        optimizer.step(ids, grad)

    call = both if gather else partial(optimizer.step, grad=grad)
    return Subject(call, batches, lambda: layer.table.gather(batches[0]))


def _step64() -> Cases:
    return {f"{rule}, 64 ids": partial(_step, rule, 64) for rule in ("SGD", "Adagrad", "Adam")}


def _update() -> Cases:
    found: Cases = {}
    for rule in STATES:
        if rule in ONLY_STEP:
            found[f"{rule}, 65536 ids, step"] = partial(_step, rule, 65536)
            continue
        for n in SIZES:
            found[f"{rule}, {n} ids, step"] = partial(_step, rule, n)
            found[f"{rule}, {n} ids, gather + step"] = partial(_step, rule, n, gather=True)
        found[f"{rule}, 65536 ids of Zipf 1.05, step"] = partial(
            _step, rule, 65536, "zipf 1.05 hashed"
        )
    return found


def _gather_rows(n: int, fresh: bool, kind: str = "uniform") -> Subject:
    import pyembed

    table = pyembed.Table.from_array(_weight(), num_threads=THREADS)
    out, batches = np.empty((n, DIM), np.float32), _batches(n, kind=kind)
    call = table.gather if fresh else partial(table.gather, out=out)
    return Subject(call, batches, lambda: table.gather(batches[0]))


def _gather() -> Cases:
    found: Cases = {}
    for n in (1, 64, *SIZES, 1_000_000):
        for fresh in (False, True):
            kind = "fresh" if fresh else "out="
            found[f"{n} ids, {kind}"] = partial(_gather_rows, n, fresh)
    found["65536 ids of Zipf 1.05, out="] = partial(_gather_rows, 65536, False, "zipf 1.05 hashed")
    return found


def _renorm() -> Subject:
    import pyembed

    weight, norms = _weight().copy(), (0.9995**k for k in count())
    table = pyembed.Table.from_array(weight, num_threads=THREADS)
    batches = _batches(65536)
    return Subject(
        lambda ids: table.renorm(ids, next(norms)), batches, lambda: table.gather(batches[0])
    )


def _bags(mode: str, padding: int | None) -> Subject:
    import pyembed

    table = pyembed.Table.from_array(_weight(), num_threads=THREADS)
    layer = pyembed.EmbeddingBag.from_pretrained(table, mode=mode, padding_idx=padding)
    batches, offsets = _batches(2048 * 20), np.arange(2048) * 20
    if padding is not None:
        padded = np.random.default_rng(4).random(2048 * 20) < 0.1
        batches = [np.where(padded, padding, ids) for ids in batches]
    return Subject(
        partial(layer, offsets=offsets), batches, lambda: np.asarray(layer(batches[0], offsets))
    )


def _bag_step(mode: str) -> Subject:
    import pyembed

    table, grad, offsets = _layer("Adagrad").table, _gradient(4096), np.arange(4096) * 16
    layer = pyembed.EmbeddingBag.from_pretrained(table, freeze=False, mode=mode)
    optimizer, batches = pyembed.optim.Adagrad(layer, lr=LR), _batches(65536)

    def call(ids: Array) -> None:
        optimizer.step(layer.bags(ids, offsets), grad)

    return Subject(call, batches, lambda: table.gather(batches[0]))


def _backward(sparse: bool) -> Subject:
    import pyembed

    table = pyembed.Table.from_array(_weight(), num_threads=THREADS)
    layer = pyembed.Embedding.from_pretrained(table, freeze=False, sparse=sparse)
    batches, grad = _batches(65536), _gradient(65536)

    def result() -> Array:
        found: Any = layer.backward(batches[0], grad)
        return np.asarray(found[1] if sparse else found)

    return Subject(partial(layer.backward, grad=grad), batches, result)


def _init(name: str) -> Subject:
    import pyembed

    array = np.empty((ROWS // 4, DIM), np.float32)
    fill = partial(getattr(pyembed.init, name)(0.0, 1.0).fill, array, num_threads=THREADS)
    return Subject(fill, (1,), lambda: array)


def _layers() -> Cases:
    found: Cases = {"renorm": _renorm}
    for mode, padding in (("sum", None), ("mean", None), ("max", None), ("sum", 7), ("mean", 7)):
        name = f"bags, {mode}" + (", padding" if padding else "")
        found[name] = partial(_bags, mode, padding)
    for mode in ("sum", "mean"):
        found[f"bag step, {mode}"] = partial(_bag_step, mode)
    for sparse in (False, True):
        found[f"backward, {'sparse' if sparse else 'dense'}"] = partial(_backward, sparse)
    return found | {f"init, {name}": partial(_init, name) for name in ("normal", "uniform")}


def _many_tables(rule: str, dim: int, at_once: bool) -> Subject:
    import pyembed

    start = pyembed.init.uniform(-0.1, 0.1)
    tables = [
        pyembed.Table.memory(rows, dim, STATES[rule], init=start, seed=at, num_threads=THREADS)
        for at, rows in enumerate(TABLES)
    ]
    optimizers = [getattr(pyembed.optim, rule)(table, lr=LR) for table in tables]
    rng, grad = np.random.default_rng(1), _gradient(2048, dim)
    batches = [[rng.integers(0, rows, 2048) for rows in TABLES] for _ in range(8)]

    def many(ids: list[Array]) -> None:
        pyembed.optim.step_many([(o, part, grad) for o, part in zip(optimizers, ids, strict=True)])

    def single(ids: list[Array]) -> None:
        for optimizer, part in zip(optimizers, ids, strict=True):
            optimizer.step(part, grad)

    return Subject(many if at_once else single, batches, lambda: np.asarray(tables[9].weight))


def _tables() -> Cases:
    return {
        f"{rule}, dim {dim}, {'step_many' if at_once else 'one by one'}": partial(
            _many_tables, rule, dim, at_once
        )
        for rule in ("SGD", "Adagrad")
        for dim in (16, 64)
        for at_once in (True, False)
    }


def _torch_call(parameter: bool) -> Subject:
    import torch

    import pyembed.torch

    make = None if parameter else partial(pyembed.optim.SGD, lr=LR)
    weight = torch.from_numpy(_weight(1000))
    layer = pyembed.torch.Embedding.from_pretrained(weight, freeze=False, optimizer=make)
    ids = list(torch.arange(64).reshape(64, 1))
    return Subject(layer, ids, lambda: np.asarray(layer(ids[0]).detach().numpy()))


def _torch_train(rule: str, n: int) -> Subject:
    import torch

    import pyembed.torch

    table, make = _layer(rule).table, partial(getattr(pyembed.optim, rule), lr=LR)
    layer = pyembed.torch.Embedding(ROWS, DIM, table=table, optimizer=make)
    grad, batches = torch.from_numpy(_gradient(n)), _batches(n)
    return Subject(
        lambda ids: layer(ids).backward(grad),
        [torch.from_numpy(ids) for ids in batches],
        lambda: table.gather(batches[0]),
    )


def _torch_step() -> Cases:
    found: Cases = {
        "one id": partial(_torch_call, False),
        "one id, a Parameter": partial(_torch_call, True),
    }
    for rule in ("SGD", "Adagrad", "Adam"):
        for n in SIZES:
            found[f"{rule}, {n} ids"] = partial(_torch_train, rule, n)
    return found


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(dir=os.environ.get("PYEMBED_BENCH_DIR"))


def _on_disk(level: str, timed: str) -> Subject:
    """Time ``step``, ``commit`` or ``rollback`` of a table on disk."""
    import pyembed

    path, start = Path(_folder().name, f"{level}-{timed}"), pyembed.init.uniform(-1, 1)
    table = pyembed.Table.create(
        path, DISK_ROWS, DIM, "adagrad", init=start, durability=level, num_threads=THREADS
    )
    optimizer, grad = pyembed.optim.Adagrad(table, lr=LR), _gradient(DISK_N)
    batches = list(workloads.batches("uniform", DISK_ROWS, DISK_N, 32))
    step = partial(optimizer.step, grad=grad)

    def result() -> Array:
        return table.gather(batches[0])

    if timed == "step":
        return Interrupted(step, batches, result, after=table.commit, most_calls=16)
    end: Callable[[], object] = getattr(table, timed)
    return Interrupted(lambda _: end(), batches, result, before=step)


def _reopen() -> Subject:
    import pyembed

    path, start = Path(_folder().name, "reopen"), pyembed.init.uniform(-1, 1)
    pyembed.Table.create(path, DISK_ROWS, DIM, init=start).close()

    def result() -> Array:
        with pyembed.Table.open(path, "r") as table:
            return table.gather(np.arange(100))

    return Subject(lambda _: pyembed.Table.open(path).close(), (1,), result)


def _durability() -> Cases:
    found: Cases = {
        f"{level}, {timed}": partial(_on_disk, level, timed)
        for level, timed in (
            ("none", "step"),
            ("process", "step"),
            ("power", "step"),
            ("process", "commit"),
            ("power", "commit"),
            ("process", "rollback"),
        )
    }
    return found | {"open and close": _reopen}


def _created(call: Callable[[Path], object]) -> Subject:
    path = Path(_folder().name, "built")

    def result() -> Array:
        call(path)
        rows = np.fromfile(path / "rows.npy", np.float32, 64 * DIM, offset=4096)
        shutil.rmtree(path)
        return rows

    return Interrupted(lambda _: call(path), (1,), result, after=lambda: shutil.rmtree(path))


def _create() -> Subject:
    import pyembed

    start = pyembed.init.normal()
    create = partial(pyembed.Table.create, rows=DISK_ROWS, dim=DIM, optimizer="adagrad", init=start)
    return _created(lambda path: create(path).close())


def _command() -> Subject:
    options = f"--rows {DISK_ROWS} --dim {DIM} --init normal --optimizer adagrad --seed 1"
    command = [sys.executable, "-m", "pyembed", "build", "-q", *options.split(), "-o"]

    def call(path: Path) -> None:
        subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)

    return _created(call)


def _import() -> Subject:
    command = [sys.executable, "-c", "import pyembed"]
    return Subject(lambda _: subprocess.run(command, check=True), (1,), lambda: np.zeros(1))


def _build() -> Cases:
    return {"Table.create": _create, "the command": _command, "import": _import}


BENCHES: dict[str, Callable[[], Cases]] = {
    "step64": _step64,
    "gather": _gather,
    "update": _update,
    "layers": _layers,
    "tables": _tables,
    "torch_step": _torch_step,
    "durability": _durability,
    "build": _build,
}


def _serve(lines: Iterator[str], cases: Cases) -> Iterator[str]:
    """Answer each command; ``prepare`` with a checksum of what the first call made."""
    subject: Subject | None = None
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "prepare":
            subject = None  # frees the table of the case before
            subject = cases[rest]()
            if not isinstance(subject, Interrupted):
                subject.call(subject.inputs[0])
            yield str(zlib.crc32(np.ascontiguousarray(subject.result()).data))
        elif subject is not None:
            yield repr(subject.sample(int(rest)))


def main() -> None:
    """Say where pyembed comes from, then serve the cases of the benchmark that argv names."""
    import pyembed

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may print between the answers
    print(Path(pyembed.__file__).resolve().parents[1], file=answers, flush=True)
    for answer in _serve(iter(sys.stdin), BENCHES[sys.argv[1]]()):
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
