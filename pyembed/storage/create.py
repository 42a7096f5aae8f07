"""A new table: written whole under another name, then given its own.

It appears complete or not at all; its space is allocated before it is filled, where it is known.
It is sealed: checksums of its rows lie beside them until they change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyembed._checks import F32
from pyembed.errors import TableError
from pyembed.storage import checksums
from pyembed.storage import manifest as manifests
from pyembed.storage.fs import (
    HEADER_BYTES,
    DirectWriter,
    allocate,
    npy_header,
    replace_file,
    sync,
    sync_folder,
)
from pyembed.storage.manifest import Manifest


def create(
    path: Path,
    columns: dict[str, int],
    chunks: Iterable[F32],
    rows: int | None,
    finish: Callable[[Path], None] | None = None,
    durability: str = "process",
    carried: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole new table from chunks of rows, in the memory of one chunk.

    Parameters
    ----------
    path : Path
        Must not exist. It appears complete or not at all; on any exception nothing is left.
    columns : dict
        Names and widths; their sum is the width of a chunk.
    chunks : iterable of float32 arrays of shape (any, stride)
    rows : int or None
        How many there will be, if that is known: the space is then allocated first.
    finish : function of the folder, optional
        Writes what else belongs to the table (a vocabulary), before the table appears.
    durability : {"process", "power", "none"}
    carried : mapping, optional
        More of the manifest: ``meta`` and ``optimizer``.

    Raises
    ------
    FileExistsError
    TableError
        If the disk is full.
    """
    with appearing(path) as folder:
        written, sums = write_rows(folder, sum(columns.values()), chunks, rows)
        (folder / "lock").touch()
        if finish is not None:
            finish(folder)
        more = {"commit": secrets.token_hex(8), **(carried or {}), "seal": sums}
        state = Manifest(written, columns, durability=durability, **more)
        replace_file(folder / "manifest.json", [manifests.encode(state)])


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A folder to be filled, that gets its name at the end of the block; on an exception it goes.

    The last file of it is put there by `replace_file`, which syncs the folder.

    Raises
    ------
    FileExistsError
    """
    if os.path.lexists(path):
        raise FileExistsError(
            errno.EEXIST, "there is something already; choose a new name", str(path)
        )
    temporary = path.with_name(f"{path.name}.creating-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
        try:
            sync_folder(path.parent)
        except BaseException:
            path.rename(temporary)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_rows(
    folder: Path, stride: int, chunks: Iterable[F32], rows: int | None
) -> tuple[int, str]:
    """Write ``rows.npy`` and its seal; returns how many rows there were, and the seal's name."""
    path = folder / "rows.npy"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if rows is not None:
            allocate(fd, 0, HEADER_BYTES + 4 * rows * stride, path)
        written = 0
        with DirectWriter(fd, path) as writer:
            writer.write(npy_header(rows or 0, stride))
            for chunk in chunks:
                writer.write(np.ascontiguousarray(chunk, np.float32))
                written += chunk.shape[0]
        if rows is None:
            os.pwrite(fd, npy_header(written, stride), 0)
        elif written != rows:
            raise ValueError(f"{written} rows were made instead of {rows}")
        sync(fd)
        return written, checksums.save(folder, writer.sums)
    except OSError as error:
        if error.errno == errno.ENOSPC and not isinstance(error, TableError):
            raise TableError(error.errno, f"{error.strerror}: make room", str(path)) from None
        raise
    finally:
        os.close(fd)
