"""Make a table from a source of any size in fixed memory: an initialiser, or a file of vectors.

Rows are made in chunks of a few megabytes and written, not mapped, so the memory used does not
depend on the size of the table (a vocabulary and an id map aside, which are kept until they are
written). The table appears under its name complete or not at all.
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
        A folder that must not exist.
    rows, dim : int
    init : Initializer, optional
        Fills the weight; zeros if not given.
    optimizer : str, optional
        Whose state the rows shall carry, see `Table.create`; it starts as zeros.
    seed : int
    counts : integers of shape (rows,), optional
        How often each id occurs. The most frequent id gets row 0, and so on, and the table keeps
        the map: look ids up with `Table.rows_of`. A fresh value belongs to its row, so another
        order gives an id another one. See `pyembed.storage.id_map` for where counts come from.
    num_threads : int, optional
    progress : bool or None
        Show a bar; None shows it when stderr is a terminal.

    Raises
    ------
    FileExistsError, TableError, ArgumentError, DTypeError
    """
    columns = row_columns(dim, optimizer, None)
    rows = require_count(rows, "rows", 0, manifest.MAX_ROWS)
    finish = None
    if counts is not None:
        finish = partial(id_map.save, id_map=id_map.by_frequency(counts, rows))
    workers = _threads.resolve(num_threads)
    chunks = fresh_rows(columns, 0, rows, init or initialisers.zeros(), seed, workers)
    row_bytes = 4 * sum(columns.values())
    with progress_bar("build", rows * row_bytes, "B", progress) as bar:
        create.create(Path(path), columns, _counted(chunks, bar), rows, finish)


def from_vectors(
    path: str | os.PathLike[str],
    vectors: str | os.PathLike[str],
    *,
    format: str = "auto",
    optimizer: str | None = None,
    progress: bool | None = False,
) -> None:
    """Make a table, with its vocabulary, from a file of word2vec or GloVe vectors.

    Rows keep the order of the file, which most tools write by frequency already.

    Parameters
    ----------
    path : path-like
        A folder that must not exist.
    vectors : path-like
        See `pyembed.formats.open_vectors`.
    format : {"auto", "word2vec", "word2vec-binary", "glove"}
    optimizer : str, optional
        Whose state the rows shall carry, see `Table.create`; it starts as zeros.
    progress : bool or None
        Show a bar; None shows it when stderr is a terminal.

    Raises
    ------
    FormatError
        Naming the line or byte that is not what the format says.
    FileExistsError, TableError, ArgumentError
    """
    source = open_vectors(vectors, format)
    columns = row_columns(source.dim, optimizer, None)
    tokens: list[str] = []

    def save_vocab(folder: Path) -> None:
        try:
            Vocab(tokens).save(folder)
        except PyembedError as error:
            raise FormatError(f"{source.path}: {error}") from None

    with progress_bar("build", source.bytes_total, "B", progress) as bar:
        rows = _vector_rows(source, sum(columns.values()), tokens, bar)
        create.create(Path(path), columns, rows, source.declared_rows, save_vocab)


def _vector_rows(
    source: VectorSource, stride: int, tokens: list[str], bar: tqdm[Any]
) -> Iterator[F32]:
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
