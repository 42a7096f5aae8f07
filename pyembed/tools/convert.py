"""Make a table from another: the same rows, with columns added or dropped, in fixed memory.

Rows are read from the file and written, not mapped, a few megabytes at a time. The vocabulary, the
id map, the meta, and the steps of the optimizers whose state is kept come along. The new table
appears under its name complete or not at all; the old table stays as it is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pyembed import _core
from pyembed._checks import F32
from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError, FormatError
from pyembed.storage import create, fs, id_map, npy
from pyembed.storage.columns import CHUNK_FLOATS, require_rule, state_widths
from pyembed.storage.manifest import check_columns
from pyembed.table import Table
from pyembed.words import vocab

__all__ = ["convert"]


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
        The folder to make; it must not exist.
    optimizer : str, optional
        Reserve columns for this optimizer's state, see `Table.create`; columns of it that the
        table has already are kept.
    add : mapping of str to int, optional
        More columns and their widths. All new columns are zero.
    drop : iterable of str
        Names of columns to leave out; all but ``weight`` can be dropped.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Raises
    ------
    ArgumentError
        If a column cannot be added or dropped, or `optimizer` is unknown.
    FileExistsError, LockedError, TableError, FormatError
        If something has the name `output` already, if the table cannot be opened or is cut short,
        or if the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Table.create(f"{folder}/old", rows=3, dim=2).close()
    ...     convert(f"{folder}/old", f"{folder}/new", optimizer="rowwise_adagrad")
    ...     with Table.open(f"{folder}/new") as table:
    ...         table.columns
    {'weight': 2, 'row_sum': 1}
    """
    with open_committed(path) as table:
        columns = _new_columns(table, optimizer, add or {}, drop)
        source, bare = Path(path), not Path(path).is_dir()
        with progress_bar("convert", table.nbytes, "B", progress) as bar:
            create.create(
                Path(output),
                columns,
                copied_rows(source if bare else source / "rows.npy", table, columns, bar),
                table.rows,
                None if bare else lambda folder: copy_files(source, folder.path),
                "process" if bare else table.durability,
                {"meta": table.meta, "optimizer": _kept_state(table, columns)},
            )


def _kept_state(table: Table, columns: Mapping[str, int]) -> dict[str, Any]:
    """The steps of the optimizers whose columns are all in the new table."""
    rules = {name: rule for name, rule in _core.RULES.items() if columns.keys() >= rule[1].keys()}
    return {name: state for name, state in table.optimizer.items() if name in rules}


def open_committed(path: str | os.PathLike[str]) -> Table:
    """Open a table to read its file; if its last writer died, recover the last commit first."""
    table = Table.open(path, "r")
    if table.state == "dirty":
        table.close()
        Table.open(path, "r+").close()
        table = Table.open(path, "r")
    return table


def _new_columns(
    table: Table, optimizer: str | None, add: Mapping[str, int], drop: Iterable[str]
) -> dict[str, int]:
    """The columns of the new table: the old ones in their order, then the new ones."""
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
            raise ArgumentError(f"column {name!r} exists already; drop it to get a new one")
        columns[name] = width
    return check_columns(columns)


def copied_rows(
    file: Path, table: Table, columns: Mapping[str, int], bar: tqdm[Any]
) -> Iterator[F32]:
    """Yield chunks of the new rows, of the kept columns and zeros; the buffer is reused."""
    old, new = _spans(table.columns), _spans(columns)
    stride, new_stride = sum(table.columns.values()), sum(columns.values())
    step = max(1, CHUNK_FLOATS // max(stride, new_stride))
    read, made = np.empty((step, stride), np.float32), np.zeros((step, new_stride), np.float32)
    with file.open("rb") as opened:
        opened.seek(npy.read(opened.read(npy.HEAD_BYTES), file).offset)
        for first in range(0, table.rows, step):
            n = min(step, table.rows - first)
            fill_rows(opened, read[:n])
            for name in old.keys() & new.keys():
                made[:n, new[name]] = read[:n, old[name]]
            yield made[:n]
            bar.update(read[:n].nbytes)


def fill_rows(file: BufferedReader, rows: F32) -> F32:
    """Read an array of rows from a file, and return it.

    Raises
    ------
    FormatError
        If the file ends too early.
    """
    if file.readinto(rows.data) != rows.nbytes:
        raise FormatError(f"{file.name}: it ends too early; was it cut short?")
    return rows


def _spans(columns: Mapping[str, int]) -> dict[str, slice]:
    """The place of each column in a row."""
    ends = accumulate(columns.values())
    return {name: slice(end - columns[name], end) for name, end in zip(columns, ends, strict=True)}


def copy_files(source: Path, folder: Path) -> None:
    """Copy the id map and the vocabulary, which do not depend on columns, and sync them."""
    for name in (id_map.FILE, *vocab.FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
            with (folder / name).open("rb") as copied:
                fs.sync(copied.fileno())
