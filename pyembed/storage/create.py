"""Make a new table: write it whole under another name, then rename it.

A table appears complete or not at all. Its space is allocated before it is filled, where its size
is known. It gets checksums of its rows, which are valid until rows change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyembed._checks import F32
from pyembed.errors import TableError
from pyembed.storage import checksums, manifest
from pyembed.storage.direct_writer import DirectWriter
from pyembed.storage.fs import Folder
from pyembed.storage.manifest import Manifest
from pyembed.storage.npy import HEADER_BYTES, rows_header


def create(
    path: Path,
    columns: dict[str, int],
    chunks: Iterable[F32],
    rows: int | None,
    finish: Callable[[Folder], None] | None = None,
    durability: str = "process",
    carried: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole new table from chunks of rows, in the memory of one chunk.

    Parameters
    ----------
    path : Path
        Must not exist. On any exception nothing is left there.
    columns : dict
        Names and widths; their sum is the width of a chunk.
    chunks : iterable of float32 arrays of shape (any, stride)
    rows : int or None
        Number of rows, if it is known: the space is then allocated first.
    finish : function of the folder, optional
        Writes other files of the table (a vocabulary), before the table appears.
    durability : {"process", "power", "none"}
    carried : mapping, optional
        Further fields of the manifest: ``meta`` and ``optimizer``.

    Raises
    ------
    FileExistsError
    TableError
        If the disk is full.
    """
    with appearing(path) as folder:
        written, sums = write_rows(folder, sum(columns.values()), chunks, rows)
        folder.open("lock", os.O_WRONLY | os.O_CREAT).close()
        if finish is not None:
            finish(folder)
        more = {"commit": secrets.token_hex(8), **(carried or {}), "seal": sums}
        state = Manifest(written, columns, durability=durability, **more)
        folder.replace("manifest.json", [manifest.encode(state)])


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Folder]:
    """Yield a folder to be filled, and rename it to `path` at the end of the block.

    The block has to write its last file with `Folder.replace`, which syncs the folder. On an
    exception the folder is removed.

    Raises
    ------
    FileExistsError
    """
    with Folder(path.parent) as parent:
        if not path.name or parent.exists(path.name):  # "." and "/" have no name, and exist
            raise FileExistsError(
                errno.EEXIST, "the name exists already; choose a new name", str(path)
            )
        temporary = f"{path.name}.creating-{secrets.token_hex(4)}"
        parent.mkdir(temporary)
        try:
            with parent.subfolder(temporary) as folder:
                yield folder
            parent.rename(temporary, path.name)
            try:
                parent.sync()
            except BaseException:
                parent.rename(path.name, temporary)
                raise
        except BaseException:
            _remove(parent, temporary)
            raise


def _remove(parent: Folder, name: str) -> None:
    """Remove a folder of files, as far as the system lets it."""
    with contextlib.suppress(OSError), parent.subfolder(name) as folder:
        for file in folder.names():
            folder.unlink(file, missing_ok=True)
        parent.rmdir(name)


def write_rows(
    folder: Folder, stride: int, chunks: Iterable[F32], rows: int | None
) -> tuple[int, str]:
    """Write ``rows.npy`` and its checksums.

    Returns
    -------
    int
        Number of rows.
    str
        The text that a manifest keeps of the checksums.
    """
    with folder.open("rows.npy", os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
        try:
            if rows is not None:
                file.allocate(0, HEADER_BYTES + 4 * rows * stride)
            written = 0
            with DirectWriter(folder, file) as writer:
                writer.write(rows_header(rows or 0, stride))
                for chunk in chunks:
                    writer.write(np.ascontiguousarray(chunk, np.float32))
                    written += chunk.shape[0]
            if rows is None:
                file.write_at([rows_header(written, stride)], 0)
            elif written != rows:
                raise ValueError(f"{written} rows were made instead of {rows}")
            file.sync()
            return written, checksums.save(folder, writer.sums)
        except OSError as error:
            if error.errno == errno.ENOSPC and not isinstance(error, TableError):
                what = f"{error.strerror}: make room"
                raise TableError(error.errno, what, str(file.path)) from None
            raise
