"""Readers of vector files: strict, streaming, in fixed memory.

`open_vectors` decides by the content of a file, never by its name, and returns a `VectorSource`
that iterates in chunks. A file that is not exactly what its format says raises a `FormatError`
that names the line or byte; nothing is repaired. The room imports `errors` alone. Read `_source`
first, then `glove` and `word2vec`.
"""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path

from pyembed.errors import ArgumentError, FormatError
from pyembed.formats._source import Head, VectorSource
from pyembed.formats.glove import Glove
from pyembed.formats.word2vec import Word2VecBinary, Word2VecText, is_binary

__all__ = ["VectorSource", "open_vectors"]

_READERS: dict[str, type[Word2VecText | Word2VecBinary | Glove]] = {
    reader.format: reader for reader in (Word2VecText, Word2VecBinary, Glove)
}

# Files that are often mistaken for vectors. Without this table, their error would be about line 1.
_FOREIGN = {
    rb"\xba\x16\x4f\x2f": "a fastText model (its .vec file is word2vec text)",
    rb"\x93NUMPY": "a .npy array",
    rb"PK\x03\x04": "a zip archive: unpack it first",
    rb"\xfd7zXZ\x00": "an xz archive: unpack it first",
    rb"BZh[1-9]1AY&SY": "a bzip2 archive: unpack it first",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text: convert it to UTF-8",
}


def open_vectors(path: str | PathLike[str], format: str = "auto") -> VectorSource:
    """Open a file of named vectors for reading in chunks.

    Parameters
    ----------
    path : path-like
        A regular file, plain or gzip.
    format : {"auto", "word2vec", "word2vec-binary", "glove"}
        "auto" decides from the content; it reads two integers on line 1 as a header. Give "glove"
        for a text of dim 1 whose first row is two integers, and for a file of GloVe's
        ``-write-header 1`` that ends in an uncounted ``<unk>``.

    Returns
    -------
    VectorSource
        It yields pairs of tokens, a list of bytes, and values, a float32 array of shape
        (len(tokens), dim) and about 4 MB.

    Raises
    ------
    FormatError
        If the content is not what the format says; raised here for the first line, and during
        iteration for the rest.
    ArgumentError
        If `format` is unknown, or `path` is not a regular file.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from pyembed.formats import open_vectors
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = pathlib.Path(folder.name, "tiny.vec")
    >>> _ = file.write_bytes(b"2 3\\nthe 0.5 1 -2\\nof 0 0.25 1e-1\\n")
    >>> source = open_vectors(file)
    >>> source.format, source.dim, source.declared_rows
    ('word2vec', 3, 2)
    >>> for tokens, values in source:
    ...     print(tokens, values.shape)
    [b'the', b'of'] (2, 3)
    >>> folder.cleanup()
    """
    if format != "auto" and format not in _READERS:
        raise ArgumentError(
            f"format = {format!r}; allowed: 'auto', {', '.join(map(repr, _READERS))}"
        )
    head = Head(Path(fspath(path)))
    for magic, name in _FOREIGN.items():
        if re.match(magic, head.sample):
            raise FormatError(
                f"{head.path} is {name}; allowed: word2vec text or binary, GloVe text, each plain "
                "or gzip"
            )
    return _READERS[_detect(head) if format == "auto" else format](head)


def _detect(head: Head) -> str:
    if head.claims is None:
        return Glove.format
    if is_binary(head, dim=max(1, int(head.claims[1][:20]))):
        return Word2VecBinary.format
    return Word2VecText.format
