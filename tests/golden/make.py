"""Write the golden files of the current version of the format, and what they contain.

::

    python tests/golden/make.py tests/golden/v1

The script uses the public interface alone. It is kept as the documentation of the files: files that
are committed are never written again, because they prove that files of an old release still open.
A new version of the format gets a folder of its own.

Tables that are left in the middle of a transaction are written by a child process that kills
itself. The space that a journal reserves behind its last frame is cut off, except for the zeros
that mark the end: a journal that is read ends there, and the files stay small.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import pyembed
from pyembed import Table, Vocab

ROWS, DIM, BATCH = 40, 4, 12
APPENDED = 3  # rows
COPY_GENERATION = 1  # the commit that `copy` holds, and that `delta` starts from
COUNTS = [(5 * row) % 17 for row in range(ROWS)]
BLOCK, UNIT = 4096, 64  # bytes: what a journal's frames are aligned to, and its end mark
TOKENS = ["the", "of", "", "naïve", "\udcff", "a b\r"]  # empty, not UTF-8, with spaces
VECTORS = "3 4\none 1 2 3 4\ntwo -1 0.5 0 8\nthree 0 0 0 0.25\n"
RULES = {
    "adagrad": pyembed.optim.Adagrad,
    "adam": pyembed.optim.Adam,
    "ftrl": pyembed.optim.FTRL,
    "rowwise_adagrad": pyembed.optim.RowwiseAdagrad,
}


def digest(table: Table) -> str:
    """Return a checksum of all columns, with their names and shapes."""
    total = hashlib.blake2b(digest_size=16)
    for name in table.columns:
        column = np.ascontiguousarray(table.column(name))
        total.update(f"{name} {column.shape}".encode())
        total.update(column.tobytes())
    return total.hexdigest()


def train(table: Table, rule: str, steps: int) -> None:
    """Take steps whose ids and gradients depend only on the number of steps so far."""
    optimizer = RULES[rule](table, lr=0.125)
    for step in range(optimizer.steps, optimizer.steps + steps):
        ids = (7 * step + 3 * np.arange(BATCH)) % table.rows
        grad = (37 * np.arange(BATCH * DIM) + 11 * step) % 64 - 32
        optimizer.step(ids, (grad / 32).astype(np.float32).reshape(BATCH, DIM))


def _create(path: Path, rule: str, durability: str) -> Table:
    start = pyembed.init.uniform(-1.0, 1.0)
    return Table.create(path, ROWS, DIM, rule, init=start, seed=7, durability=durability)


def _make_committed(folder: Path) -> None:
    """Make `committed`, a copy of one of its commits, and the delta that leads to the last."""
    with _create(folder / "committed", "adam", "process") as table:
        for generation in range(1, 4):
            train(table, "adam", generation)
            if generation == 2:
                table.append(APPENDED)
            table.commit(meta={"epoch": generation, "names": ["ä", None, 0.5]})
            if generation == COPY_GENERATION:
                pyembed.export.export(table, folder / "copy")
    pyembed.export.export(folder / "committed", folder / "delta", since=COPY_GENERATION)


def _leave(path: Path, rule: str, durability: str, dirty: bool) -> None:
    """Make a table with two commits and die, in the middle of a transaction if `dirty`."""
    table = _create(path, rule, durability)
    for generation in range(1, 3):
        train(table, rule, 2)
        table.commit(meta={"epoch": generation})
    if dirty:
        train(table, rule, 2)
        table.append(APPENDED)
        train(table, rule, 1)
    os.kill(os.getpid(), signal.SIGKILL)


LEFT = {  # name: the arguments of `_leave`
    "killed": ("adagrad", "process", False),
    "process": ("adam", "process", True),
    "power": ("rowwise_adagrad", "power", True),
    "none": ("ftrl", "none", True),
}


def _trim_journals(folder: Path) -> None:
    for path in folder.glob("*/undo*"):
        used = len(path.read_bytes().rstrip(b"\0"))
        os.truncate(path, min(path.stat().st_size, -(-used // BLOCK) * BLOCK + UNIT))


def _describe(path: Path, rule: str) -> dict[str, Any]:
    """Open a copy of a table, and say what it holds and what three more steps make of it."""
    found: dict[str, Any] = {"rule": rule}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(path, copy)
        if json.loads((path / "manifest.json").read_text())["state"] == "dirty":
            with Table.open(copy, "r", salvage=True) as table:
                found |= {"salvaged_rows": table.rows, "salvaged": digest(table)}
        with Table.open(copy, salvage=path.name == "none") as table:
            for name in ("rows", "columns", "generation", "durability", "meta", "optimizer"):
                found[name] = json.loads(json.dumps(getattr(table, name)))  # a snapshot
            found["digest"] = digest(table)
            train(table, rule, 3)
            table.commit()
            found["continued"] = digest(table)
    return found


def main(folder: Path) -> None:
    """Write every file."""
    folder.mkdir()
    _make_committed(folder)
    for name in LEFT:
        subprocess.run([sys.executable, __file__, str(folder / name)], check=False)
    start = pyembed.init.uniform(-1.0, 1.0)
    pyembed.build.from_initializer(
        folder / "sealed", ROWS, DIM, start, optimizer="adagrad", seed=3, counts=COUNTS
    )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as text:
        text.write(VECTORS)
        text.flush()
        pyembed.build.from_vectors(folder / "words", text.name, optimizer="adagrad")
    (folder / "vocabulary").mkdir()
    Vocab(TOKENS, range(len(TOKENS), 0, -1)).save(folder / "vocabulary")
    np.save(folder / "bare.npy", np.arange(ROWS * DIM, dtype="<f4").reshape(ROWS, DIM) / 8)
    _trim_journals(folder)
    rules = {"committed": "adam", "copy": "adam", "sealed": "adagrad", "words": "adagrad"}
    rules |= {name: rule for name, (rule, _, _) in LEFT.items()}
    tables = {name: _describe(folder / name, rule) for name, rule in rules.items()}
    (folder / "expected.json").write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if given.name in LEFT:
        _leave(given, *LEFT[given.name])
    main(given)
