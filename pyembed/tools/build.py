"""Make a table of any size in fixed memory, from an initialiser or from a file of vectors.

Rows are made in chunks of a few megabytes and written, not mapped, so the memory used does not
depend on the size of the table. Only a vocabulary and an id map are kept in memory until they are
written. The table appears under its name complete or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from pyembed import _threads
from pyembed import init as initialisers
from pyembed._checks import F32, require_count
from pyembed._progress import progress_bar
from pyembed.errors import FormatError, PyembedError
from pyembed.formats import VectorSource, open_vectors
from pyembed.init import Initializer
from pyembed.storage import create, id_map, manifest
from pyembed.storage.columns import fresh_rows, row_columns
from pyembed.storage.fs import Folder
from pyembed.words.vocab import Vocab


def from_initializer(
    path: str | os.PathLike[str],
    rows: int,
    dim: int,
    init: Initializer | None = None,
    *,
    optimizer: str | None = None,
    seed: int = 0,
    counts: ArrayLike | None = None,
    num_threads: int | None = None,
    progress: bool | None = False,
) -> None:
    """Make a table of fresh rows.

    Parameters
    ----------
    path : path-like
        The folder to make; it must not exist.
    rows, dim : int
        The number of rows, and the floats of each row's weight.
    init : Initializer, optional
        Fills the weight; zeros by default.
    optimizer : str, optional
        Reserve columns of zeros for this optimizer's state, see `Table.create`.
    seed : int
        The seed of `init`.
    counts : array of integers, shape (rows,), optional
        How often each id occurs, see `pyembed.id_map`. The most frequent id gets row 0, and so
        on; look ids up with `Table.rows_of`. A fresh value belongs to its row, not to its id.
    num_threads : int, optional
        See `Table.create`.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Raises
    ------
    FileExistsError, TableError
        If something has this name already, or the disk is full.
    ArgumentError, DTypeError
        If a size, `optimizer`, `counts` or `num_threads` is not allowed.

    Examples
    --------
    >>> import tempfile
    >>> from pyembed import Table, init
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     from_initializer(f"{folder}/a", 1000, 16, init.normal(), optimizer="adagrad")
    ...     with Table.open(f"{folder}/a", "r") as table:
    ...         table.rows, table.columns
    (1000, {'weight': 16, 'sum': 16})
    """
    columns = row_columns(dim, optimizer, None)
    rows = require_count(rows, "rows", 0, manifest.MAX_ROWS)
    new_map = None if counts is None else id_map.by_frequency(counts, rows)
    finish = None if new_map is None else partial(id_map.save, id_map=new_map)
    num_threads = _threads.resolve(num_threads)
    chunks = fresh_rows(columns, 0, rows, init or initialisers.zeros(), seed, num_threads)
    nbytes = 4 * rows * sum(columns.values())
    with progress_bar("build", nbytes, "B", progress) as bar:
        create.create(Path(path), columns, _counted(chunks, bar), rows, finish)


def from_vectors(
    path: str | os.PathLike[str],
    vectors: str | os.PathLike[str],
    *,
    format: str = "auto",
    optimizer: str | None = None,
    progress: bool | None = False,
) -> None:
    """Make a table and its vocabulary from a file of word2vec or GloVe vectors.

    Rows keep the order of the file, which most tools sort by frequency.

    Parameters
    ----------
    path : path-like
        The folder to make; it must not exist.
    vectors : path-like
        The file of vectors, see `pyembed.formats.open_vectors`.
    format : {"auto", "word2vec", "word2vec-binary", "glove"}
        The format of `vectors`; "auto" decides from its content.
    optimizer : str, optional
        Reserve columns of zeros for this optimizer's state, see `Table.create`.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Raises
    ------
    FormatError
        If the file is not what its format says; the message names the line or byte.
    FileExistsError
        If something has the name `path` already.
    TableError
        If the disk is full.
    ArgumentError
        If `format` or `optimizer` is not allowed.
    """
    source = open_vectors(vectors, format)
    columns = row_columns(source.dim, optimizer, None)
    tokens: list[str] = []

    def save_vocab(folder: Folder) -> None:
        try:
            Vocab(tokens).save(folder.path)
        except PyembedError as error:
            raise FormatError(f"{source.path}: {error}") from None

    with progress_bar("build", source.bytes_total, "B", progress) as bar:
        rows = _vector_rows(source, sum(columns.values()), tokens, bar)
        create.create(Path(path), columns, rows, source.declared_rows, save_vocab)


def _vector_rows(
    source: VectorSource, stride: int, tokens: list[str], bar: tqdm[Any]
) -> Iterator[F32]:
    """Yield chunks of whole rows, and append the token of each row to `tokens`."""
    for names, values in source:
        tokens += [name.decode("utf-8", "surrogateescape") for name in names]
        rows = np.zeros((len(names), stride), np.float32)
        rows[:, : source.dim] = values
        yield rows
        bar.update(source.bytes_read - bar.n)


def _counted(chunks: Iterator[F32], bar: tqdm[Any]) -> Iterator[F32]:
    for chunk in chunks:
        yield chunk
        bar.update(chunk.nbytes)
