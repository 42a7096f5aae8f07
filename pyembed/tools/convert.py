"""Make a table from another: the same rows, with columns added or dropped, in fixed memory.

Rows are read from the file and written, not mapped, a few megabytes at a time. What belongs to the
table comes along: vocabulary, id map, meta, and the steps of the optimizers whose state is kept.
The new table appears under its name complete or not at all; the old one stays as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pyembed import _core
from pyembed._checks import F32
from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError, FormatError
from pyembed.storage import create, fs, id_map
from pyembed.storage.columns import CHUNK_FLOATS, require_rule, state_widths
from pyembed.storage.manifest import check_columns
from pyembed.table import Table
from pyembed.words import vocab


def convert(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    optimizer: str | None = None,
    add: Mapping[str, int] | None = None,
    drop: Iterable[str] = (),
    progress: bool | None = False,
) -> None:
    """Stream a table into a new one with other columns.

    Parameters
    ----------
    path : path-like
        A table, or a bare .npy of float32 rows.
    output : path-like
        A folder that must not exist.
    optimizer : str, optional
        The rule whose state the rows shall carry; what they carry of it already is kept. See
        `Table.create`.
    add : mapping of str to int, optional
        More columns and their widths. All new columns are zero.
    drop : names of columns, optional
        All but ``weight`` can be dropped.
    progress : bool or None
        Show a bar; None shows it when stderr is a terminal.

    Raises
    ------
    FileExistsError, TableError, ArgumentError, FormatError, LockedError

    Examples
    --------
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> Table.create(folder / "a", rows=3, dim=2).close()
    >>> convert(folder / "a", folder / "b", optimizer="rowwise_adagrad")
    >>> with Table.open(folder / "b") as t:
    ...     t.columns
    {'weight': 2, 'row_sum': 1}
    """
    with open_committed(path) as table:
        columns = _new_columns(table, optimizer, add or {}, drop)
        source, target = Path(path), Path(output)
        bare = not source.is_dir()
        kept = {
            rule: state
            for rule, state in table.optimizer.items()
            if rule in _core.RULES and columns.keys() >= _core.RULES[rule][1].keys()
        }
        with progress_bar("convert", table.nbytes, "B", progress) as bar:
            create.create(
                target,
                columns,
                copied_rows(source if bare else source / "rows.npy", table, columns, bar),
                table.rows,
                None if bare else lambda folder: copy_files(source, folder),
                "process" if bare else table.durability,
                {"meta": table.meta, "optimizer": kept},
            )


def open_committed(path: str | os.PathLike[str]) -> Table:
    """Open a table to read its file: where a writer died, its last commit is brought back first."""
    table = Table.open(path, "r")
    if table.state == "dirty":
        table.close()
        Table.open(path, "r+").close()
        table = Table.open(path, "r")
    return table


def _new_columns(
    table: Table, optimizer: str | None, add: Mapping[str, int], drop: Iterable[str]
) -> dict[str, int]:
    """The columns of the new table: the old ones in their order, then the new."""
    columns = table.columns
    for name in drop:
        if name not in columns or name == "weight":
            droppable = ", ".join(list(table.columns)[1:]) or "none"
            raise ArgumentError(f"column {name!r} cannot be dropped; allowed: {droppable}")
        del columns[name]
    state = {} if optimizer is None else state_widths(require_rule(optimizer), table.dim)
    for name, width in state.items():
        if columns.setdefault(name, width) != width:
            raise ArgumentError(
                f"column {name!r} has width {columns[name]}, and {optimizer} needs {width}; drop it"
            )
    for name, width in add.items():
        if name in columns:
            raise ArgumentError(f"column {name!r} is there already; drop it to get a new one")
        columns[name] = width
    return check_columns(columns)


def copied_rows(
    file: Path, table: Table, columns: Mapping[str, int], bar: tqdm[Any]
) -> Iterator[F32]:
    """Chunks of the new rows. The buffers are reused."""
    old, new = table.columns, dict(columns)
    stride, new_stride = sum(old.values()), sum(new.values())
    step = max(1, CHUNK_FLOATS // max(stride, new_stride))
    read, made = np.empty((step, stride), np.float32), np.zeros((step, new_stride), np.float32)
    moves = [(_span(old, name), _span(new, name)) for name in new if name in old]
    with file.open("rb", buffering=0) as opened:
        _, _, offset = fs.read_npy_header(file, opened.fileno())
        opened.seek(offset)
        for first in range(0, table.rows, step):
            n = min(step, table.rows - first)
            left = read[:n].data.cast("B")
            while left:
                got = opened.readinto(left)
                if not got:
                    raise FormatError(f"{file}: it ends in row {first + n - 1}; was it cut short?")
                left = left[got:]
            for here, there in moves:
                made[:n, there] = read[:n, here]
            yield made[:n]
            bar.update(n * stride * 4)


def _span(columns: Mapping[str, int], name: str) -> slice:
    at = 0
    for each, width in columns.items():
        if each == name:
            return slice(at, at + width)
        at += width
    raise KeyError(name)


def copy_files(source: Path, folder: Path) -> None:
    """What lies beside the rows and does not depend on their columns."""
    for name in (id_map.FILE, *vocab.FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
            with (folder / name).open("rb") as copied:
                fs.sync(copied.fileno())
