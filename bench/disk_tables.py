"""Tables on disk, ours and the peers', with one interface: gather, step, read, close.

All tables have rows of 64 floats and train by one rule. They store their bytes in different places:

- pyembed: a table folder, in which a row contains its weight and its state. *three files* shows the
  alternative: one pyembed table per column, each gathered by the engine, and the rule in numpy.
- np.memmap and torch.from_file, used in the usual way: one mapping per column, with the system's
  readahead. The columns follow each other in one file, as far apart as in separate files. torch's
  optimizers would create their state in memory, so the rule is written out.
- FBGEMM: bags of one id over torch.from_file. Its row-wise Adagrad keeps one float per row in
  memory.
- LMDB and RocksDB: one value per row, with the weight and two states; ids are big-endian keys. Both
  are tuned for such a table: no readahead, and no sync for LMDB.

The numpy rule accesses each row twice, to read and to write it. It sorts the ids, which favours the
peers: the usual `np.add.at` is slower. `absent` gives the reason why a peer cannot take part.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import peers, update
from bench.harness import Array

DIM, LR = 64, peers.LR
HEADER = 4096  # bytes before the first row
ROW = 4 * DIM
VALUE = 3 * ROW  # of LMDB and RocksDB: weight and two states
COLUMNS = update.COLUMNS
STATES = ("weight", "exp_avg", "exp_avg_sq")
OURS, THREE = "pyembed", "pyembed, three files"
MEMMAP, FROM_FILE, FBGEMM, LMDB, ROCKS = (
    "np.memmap", "torch.from_file", "FBGEMM", "LMDB", "RocksDB",
)  # fmt: skip
MODULES = {LMDB: "lmdb", ROCKS: "rocksdict"}
FILLS = "fills"  # in place of an optimizer
PUT = 1 << 14  # rows written into a database at once
CACHE_SHARE = 0.25  # the part of the limit for RocksDB's own cache; the page cache has the rest
BUFFER_SHARE = 1 / 32  # the part of the limit for one buffer of RocksDB's new values


@dataclass(frozen=True)
class Where:
    """A table to open: its contender, path, optimizer ("" only gathers) and memory limit."""

    contender: str
    path: str
    optimizer: str = ""
    limit: int = 0


def absent(contender: str, optimizer: str = "") -> str:
    """Return the reason why a contender cannot take part, or an empty string."""
    if contender == FROM_FILE:
        torch = peers.torch()
        return torch if isinstance(torch, str) else ""
    if contender == FBGEMM:
        lacks = optimizer and optimizer not in update.FBGEMM
        return f"has no {optimizer}" if lacks else peers.why_no_fbgemm()
    try:
        if contender in MODULES:
            _module(contender)
    except ImportError:
        return "not installed"
    return ""


def _module(contender: str) -> Any:
    """Import the Python package of a database."""
    return importlib.import_module(MODULES[contender])


def rule(name: str, parts: list[Any], g: Any, t: int) -> list[Any]:
    """Return weight and states after step `t` (the first is 1), as numpy arrays or tensors."""
    w, *states = parts
    if name == "Adagrad":
        s = states[0] + g * g
        return [w - LR * g / (s**0.5 + 1e-10), s]
    m = states[0] + 0.1 * (g - states[0])
    v = 0.999 * states[1] + 0.001 * (g * g)
    scale = LR * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
    return [w - scale * m / (v**0.5 + 1e-8), m, v]


class Pyembed:
    """pyembed's table, which detects by itself that it is cold."""

    def __init__(self, where: Where) -> None:
        import pyembed

        name = where.optimizer
        self.table = pyembed.Table.open(where.path, "r+" if name else "r", durability="none")
        self.optimizer = getattr(pyembed.optim, name)(self.table, lr=LR) if name else None
        self.out = np.empty((0, DIM), np.float32)

    @property
    def steps(self) -> int:
        return int(self.optimizer.steps)  # type: ignore[union-attr]

    def gather(self, ids: Array) -> Array:
        if len(self.out) != len(ids):
            self.out = np.empty((len(ids), DIM), np.float32)
        return self.table.gather(ids, out=self.out)

    def apply(self, ids: Array, grad: Array) -> None:
        self.optimizer.step(ids, grad)  # type: ignore[union-attr]

    def step(self, ids: Array, grad: Array) -> None:
        self.gather(ids)
        self.apply(ids, grad)

    def read(self, rows: Array) -> list[Array]:
        return [self.table.column(c)[rows].astype(np.float64) for c in self.table.columns]

    def close(self) -> None:
        self.table.close()


class _Columns:
    """A step in three parts: read the columns of the rows, apply the rule, write them back."""

    rule: str
    steps = 0

    def gather(self, ids: Array) -> Any:
        raise NotImplementedError

    def values(self, rows: Any) -> list[Any]:
        raise NotImplementedError

    def write(self, rows: Any, parts: list[Any]) -> None:
        raise NotImplementedError

    def summed(self, ids: Array, grad: Array) -> tuple[Any, Any]:
        """Return the unique rows, and the sum of the gradients of each."""
        order = np.argsort(ids, kind="stable")
        rows, starts = np.unique(ids[order], return_index=True)
        return rows, np.add.reduceat(grad[order], starts, axis=0)

    def step(self, ids: Array, grad: Array) -> None:
        self.gather(ids)
        rows, g = self.summed(ids, grad)
        self.steps += 1
        self.write(rows, rule(self.rule, self.values(rows), g, self.steps))

    def read(self, rows: Array) -> list[Array]:
        return [np.asarray(part, np.float64) for part in self.values(rows)]


class ThreeFiles(_Columns):
    """pyembed without state in the row: one table per column."""

    def __init__(self, where: Where) -> None:
        import pyembed

        self.rule = where.optimizer
        names = STATES[: COLUMNS[self.rule]]
        self.tables = [
            pyembed.Table.open(Path(where.path, n), "r+", durability="none") for n in names
        ]
        self.layer = pyembed.Embedding.from_pretrained(self.tables[0], freeze=False, sparse=True)

    def gather(self, ids: Array) -> Array:
        return self.tables[0].gather(ids)

    def summed(self, ids: Array, grad: Array) -> tuple[Array, Array]:
        rows, g = self.layer.backward(ids, grad)
        return rows, g

    def values(self, rows: Array) -> list[Array]:
        return [table.gather(rows) for table in self.tables]

    def write(self, rows: Array, parts: list[Array]) -> None:
        for table, part in zip(self.tables, parts, strict=True):
            with table.writing(rows) as weight:
                weight[rows] = part

    def close(self) -> None:
        for table in self.tables:
            table.close()


class Memmap(_Columns):
    def __init__(self, where: Where) -> None:
        self.rule = where.optimizer
        columns, file = COLUMNS.get(self.rule, 1), Path(where.path, "rows.npy")
        rows = (file.stat().st_size - HEADER) // ROW // columns
        mode: Any = "r+" if self.rule else "r"
        at = [HEADER + c * rows * ROW for c in range(columns)]
        self.columns = [np.memmap(file, np.float32, mode, a, (rows, DIM)) for a in at]

    def gather(self, ids: Array) -> Array:
        found: Array = self.columns[0][ids]
        return found

    def values(self, rows: Array) -> list[Array]:
        return [column[rows] for column in self.columns]

    def write(self, rows: Array, parts: list[Array]) -> None:
        for column, part in zip(self.columns, parts, strict=True):
            column[rows] = part

    def close(self) -> None:
        del self.columns


class FromFile(_Columns):
    def __init__(self, where: Where) -> None:
        self.rule = where.optimizer
        self.columns = from_file(Path(where.path, "rows.npy"), COLUMNS.get(self.rule, 1))

    def gather(self, ids: Array) -> Any:
        return peers.torch().nn.functional.embedding(peers.tensor(ids), self.columns[0])

    def summed(self, ids: Array, grad: Array) -> tuple[Any, Any]:
        torch = peers.torch()
        rows, place = torch.unique(peers.tensor(ids), return_inverse=True)
        return rows, torch.zeros(len(rows), DIM).index_add_(0, place, peers.tensor(grad))

    def values(self, rows: Any) -> list[Any]:
        return [column[rows] for column in self.columns]

    def write(self, rows: Any, parts: list[Any]) -> None:
        for column, part in zip(self.columns, parts, strict=True):
            column[rows] = part

    def close(self) -> None:
        del self.columns


def from_file(file: Path, columns: int) -> list[Any]:
    """Map a file of float32 with torch, and cut it into columns of (rows, DIM)."""
    torch, size = peers.torch(), file.stat().st_size // 4
    flat = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32)
    rows = (size - HEADER // 4) // DIM // columns
    body = flat[HEADER // 4 :].view(-1, DIM)
    return [body[c * rows : (c + 1) * rows] for c in range(columns)]


class Fbgemm:
    """FBGEMM's table over the mapping of `from_file`, by ``preallocated_host_buffers``."""

    def __init__(self, where: Where) -> None:
        (weight,) = from_file(Path(where.path, "rows.npy"), 1)
        self.inner = update.Fbgemm("FBGEMM bag", where.optimizer or "Adagrad", weight.numpy())
        self.rule = self.inner.rule
        self.steps = 0  # the rule does not count steps

    def gather(self, ids: Array) -> Any:
        with peers.torch().no_grad():
            return self.inner.table(*peers.fbgemm_inputs([ids])[0])

    def step(self, ids: Array, grad: Array) -> None:
        self.inner.grad = peers.tensor(grad)
        self.inner.train(peers.fbgemm_inputs([ids])[0])

    def read(self, rows: Array) -> list[Array]:
        return self.inner.read(rows)

    def close(self) -> None:
        del self.inner
        gc.collect()


class _Database(_Columns):
    """A database whose values are the three columns of a row."""

    def fetch(self, keys: list[bytes]) -> list[bytes]:
        raise NotImplementedError

    def store(self, keys: list[bytes], values: list[bytes]) -> None:
        raise NotImplementedError

    def _rows(self, ids: Array) -> Array:
        found = self.fetch(_keys(ids))
        return np.frombuffer(b"".join(found), np.float32).reshape(-1, VALUE // 4)

    def gather(self, ids: Array) -> Array:
        return np.ascontiguousarray(self._rows(ids)[:, :DIM])

    def values(self, rows: Array) -> list[Array]:
        self.whole = self._rows(rows).copy()
        return [self.whole[:, c * DIM : (c + 1) * DIM] for c in range(COLUMNS[self.rule])]

    def write(self, rows: Array, parts: list[Array]) -> None:
        self.whole[:, : len(parts) * DIM] = np.concatenate(parts, axis=1)
        self.store(_keys(rows), _pieces(self.whole.tobytes(), VALUE))


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _keys(ids: Array) -> list[bytes]:
    return _pieces(ids.astype(">u8").tobytes(), 8)


class Lmdb(_Database):
    def __init__(self, where: Where) -> None:
        self.rule = where.optimizer
        self.reads = not self.rule
        space = 1 << 40  # of the address space, not of the disk
        options = {"map_size": space, "readahead": False, "sync": False, "metasync": False}
        self.env = _module(LMDB).open(where.path, **options, readonly=self.reads)

    def fetch(self, keys: list[bytes]) -> list[bytes]:
        # Key by key, because getmulti creates tuples and is not faster.
        with self.env.begin() as transaction:
            return [transaction.get(key) for key in keys]

    def store(self, keys: list[bytes], values: list[bytes], append: bool = False) -> None:
        with self.env.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(list(zip(keys, values, strict=True)), append=append)

    def close(self) -> None:
        if not self.reads:
            self.env.sync(True)
        self.env.close()


class Rocks(_Database):
    def __init__(self, where: Where) -> None:
        rocksdict, self.rule = _module(ROCKS), where.optimizer
        options, blocks = rocksdict.Options(raw_mode=True), rocksdict.BlockBasedOptions()
        blocks.set_block_size(4096)
        blocks.set_block_cache(rocksdict.Cache(int(CACHE_SHARE * where.limit)))
        blocks.set_cache_index_and_filter_blocks(False)  # index blocks stay in memory
        options.set_block_based_table_factory(blocks)
        options.set_compression_type(rocksdict.DBCompressionType.none())  # the floats are random
        options.set_advise_random_on_open(True)
        options.set_write_buffer_size(int(BUFFER_SHARE * where.limit))
        self.db = rocksdict.Rdict(where.path, options)
        reading = rocksdict.ReadOptions()
        reading.set_async_io(True)
        self.db.set_read_options(reading)

    def fetch(self, keys: list[bytes]) -> list[bytes]:
        found: list[bytes] = self.db.get(keys)
        return found

    def store(self, keys: list[bytes], values: list[bytes], append: bool = False) -> None:
        batch = _module(ROCKS).WriteBatch(raw_mode=True)
        for key, value in zip(keys, values, strict=True):
            batch.put(key, value)
        self.db.write(batch)

    def close(self) -> None:
        self.db.close()


def fill(contender: str, path: Path, source: Path, rows: int) -> None:
    """Create a database of the first `rows` values of a file of rows."""
    path.mkdir()
    database: Any = OPEN[contender](Where(contender, str(path), FILLS, 1 << 30))
    with source.open("rb") as file:
        file.seek(HEADER)
        for start in range(0, rows, PUT):
            ids = np.arange(start, min(start + PUT, rows))
            values = _pieces(file.read(VALUE * len(ids)), VALUE)
            database.store(_keys(ids), values, append=True)
    if contender == ROCKS:
        database.db.flush()
        database.db.compact_range(None, None)
    database.close()


OPEN: dict[str, Callable[[Where], Any]] = {
    OURS: Pyembed,
    THREE: ThreeFiles,
    MEMMAP: Memmap,
    FROM_FILE: FromFile,
    FBGEMM: Fbgemm,
    LMDB: Lmdb,
    ROCKS: Rocks,
}
