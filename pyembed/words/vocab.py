"""Token to row and back, in the folder of a table as ``vocab.txt`` that any tool can read.

The file has one token a line, row i in line i, and lines end in 0x0A alone. Tokens are `str`; bytes
that are not UTF-8 are kept by Python's ``surrogateescape``, so they are written as they were read.
A carriage return, a no-break space and the empty string are tokens like any other. How often each
token occurred can be kept too, in ``vocab.counts.npy``.

Save and load are exact. Therefore a token that cannot be read back is refused when the `Vocab` is
made: one with a newline, and one with surrogates that ``surrogateescape`` does not make of bytes.
Nothing is normalised, and two rows never share a token. A `Vocab` has no reference to a table; its
caller checks that there are as many rows as tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyembed.errors import ArgumentError, DTypeError, FormatError, IdError
from pyembed.storage import fs, npy

_TEXT = "vocab.txt"
_COUNTS = "vocab.counts.npy"
FILES = (_TEXT, _COUNTS)
_AGAIN = "Save the vocabulary again"
_SPELLING_POOL = 20_000  # rows searched for close spellings: milliseconds, as loops catch KeyError


class Vocab:
    """The tokens of a table, each with its row.

    Parameters
    ----------
    tokens : iterable of str
        The token of each row, in the order of rows; each once, without newlines.
    counts : array of integers, shape (len(tokens),), optional
        How often each token occurred, 0 or more.

    Attributes
    ----------
    counts : ndarray of int64, shape (len(tokens),), or None
        How often each token occurred; read-only.

    Raises
    ------
    ArgumentError
        If a token occurs twice or cannot be saved, or if a count is negative or missing.
    DTypeError
        If a token is not a str, or a count is not an integer.

    Examples
    --------
    >>> from pyembed.words.vocab import Vocab
    >>> vocab = Vocab(["the", "of", "and"], counts=[9, 5, 4])
    >>> vocab["of"], vocab.token(2), "or" in vocab, len(vocab)
    (1, 'and', False, 3)
    >>> vocab.ids(["and", "the", "the"])
    array([2, 0, 0])
    """

    def __init__(self, tokens: Iterable[str], counts: ArrayLike | None = None) -> None:
        if isinstance(tokens, str):
            raise DTypeError(f"tokens = {tokens[:40]!r}; allowed: many strings, as ['a', 'b']")
        self._tokens = list(tokens)
        _check_writable(self._tokens)
        self._rows = {token: row for row, token in enumerate(self._tokens)}
        if len(self._rows) < len(self._tokens):
            seen: dict[str, int] = {}
            rows = ((seen.setdefault(token, row), row) for row, token in enumerate(self._tokens))
            first, second = next((first, row) for first, row in rows if first != row)
            raise ArgumentError(
                f"tokens[{second}] = {self._tokens[second]!r} is tokens[{first}] again; "
                "allowed: each token once. Give each row a token of its own"
            )
        self.counts = None if counts is None else _checked_counts(counts, len(self._tokens))

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tokens in the order of their rows."""
        return iter(self._tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._rows

    def __repr__(self) -> str:
        return f"<Vocab of {len(self)} tokens>"

    def __getitem__(self, token: str) -> int:
        """Return the row of a token, or raise a `KeyError` that names close spellings."""
        try:
            return self._rows[token]
        except KeyError:
            raise KeyError(f"{token!r} {self._unknown(token)}") from None

    def token(self, row: SupportsIndex) -> str:
        """Return the token of a row.

        Parameters
        ----------
        row : int
            A row number in 0 .. len(self) - 1.

        Returns
        -------
        str
            The token.

        Raises
        ------
        IdError, DTypeError
            If there is no such row, or `row` is not an integer.
        """
        if isinstance(row, (bool, np.bool_)) or not isinstance(row, (int, np.integer)):
            raise DTypeError(f"row = {row!r} is {type(row).__name__}; allowed: an integer")
        if not 0 <= row < len(self._tokens):
            raise IdError(f"row = {row} is outside 0..{len(self._tokens) - 1}")
        return self._tokens[row]

    def ids(self, tokens: Iterable[str]) -> NDArray[np.int64]:
        """Return the rows of many tokens.

        Parameters
        ----------
        tokens : iterable of str
            Tokens in any order, repeated or not.

        Returns
        -------
        ndarray of int64, shape (len(tokens),)
            The row of each token.

        Raises
        ------
        KeyError
            If a token is unknown; the message names the first one and close spellings.
        """
        if isinstance(tokens, str):
            raise DTypeError(f"tokens = {tokens[:40]!r}; allowed: many strings, as ['a', 'b']")
        tokens = list(tokens)
        try:
            return np.fromiter(map(self._rows.__getitem__, tokens), np.int64, len(tokens))
        except KeyError:
            at, token = next(
                (at, token) for at, token in enumerate(tokens) if token not in self._rows
            )
            raise KeyError(f"tokens[{at}] = {token!r} {self._unknown(token)}") from None

    def save(self, folder: str | PathLike[str]) -> None:
        """Write ``vocab.txt``, and with counts ``vocab.counts.npy``, into an existing folder.

        Both are on disk under other names before a file is replaced, so a full disk changes
        nothing. Old counts are removed before new tokens appear and new counts appear last:
        after a crash, counts never belong to other tokens than those in ``vocab.txt``.

        Parameters
        ----------
        folder : path-like
            An existing folder, usually that of a table.
        """
        text = "".join(f"{token}\n" for token in self._tokens)
        contents = {_TEXT: text.encode("utf-8", "surrogateescape")}
        if self.counts is not None:
            counts = self.counts.astype("<i8", copy=False)
            contents[_COUNTS] = npy.header_of(counts) + counts.tobytes()
        temporary = {name: f"{name}.tmp" for name in contents}
        with fs.Folder(Path(fspath(folder))) as target:
            try:
                for name, data in contents.items():
                    target.write(temporary[name], [data])
                target.unlink(_COUNTS, missing_ok=True)
                target.sync()
                for name in contents:
                    target.rename(temporary[name], name)
                    target.sync()
            except BaseException:
                for leftover in temporary.values():
                    target.unlink(leftover, missing_ok=True)
                raise

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Vocab:
        """Read the files that `save` wrote.

        Parameters
        ----------
        folder : path-like
            The folder that was given to `save`.

        Returns
        -------
        Vocab
            With counts, if they were saved.

        Raises
        ------
        FormatError
            If a file is not exactly as `save` writes it.
        FileNotFoundError
            If there is no ``vocab.txt``.
        """
        path = Path(fspath(folder)) / _TEXT
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        if text and not text.endswith("\n"):
            raise FormatError(
                f"{path}: line {text.count(chr(10)) + 1} has no newline; allowed: each token ends "
                "in one. Restore the file, or add the newline if the last token is whole"
            )
        tokens = text.split("\n")[:-1]
        counts = path.with_name(_COUNTS)
        try:
            return cls(tokens, _load_counts(counts, len(tokens)) if counts.exists() else None)
        except ArgumentError as error:
            raise FormatError(f"{path}, where line 1 is row 0: {error}. {_AGAIN}") from None

    def _unknown(self, token: object) -> str:
        message = f"is none of the {len(self)} tokens"
        if not isinstance(token, str) or not token:
            return message
        start = token[0].lower()
        pool = [
            other
            for other in self._tokens[:_SPELLING_POOL]
            if other[:1].lower() == start and abs(len(other) - len(token)) <= 2
        ]
        close = difflib.get_close_matches(token, pool)
        return f"{message}; close spellings: {', '.join(map(repr, close))}" if close else message


def _check_writable(tokens: list[str]) -> None:
    """Refuse tokens that cannot be read back from ``vocab.txt`` as they are."""
    for row, token in enumerate(tokens):
        if not isinstance(token, str):
            raise DTypeError(
                f"tokens[{row}] = {token!r} is {type(token).__name__}; allowed: str. "
                "Decode bytes with .decode('utf-8', 'surrogateescape')"
            )
    joined = "\n".join(tokens)
    if joined.count("\n") == max(0, len(tokens) - 1) and _survives(joined):
        return
    for row, token in enumerate(tokens):
        if "\n" in token:
            raise ArgumentError(
                f"tokens[{row}] = {token!r} contains a newline; allowed: any token without one, "
                f"because {_TEXT} has one token a line. Replace the newline or drop the token"
            )
        if not _survives(token):
            raise ArgumentError(
                f"tokens[{row}] = {token!r} has surrogates that do not stand for undecodable "
                "bytes; allowed: text, and bytes decoded with 'surrogateescape'. Decode the "
                "token again from its bytes"
            )


def _survives(text: str) -> bool:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    except UnicodeEncodeError:
        return False


def _checked_counts(counts: ArrayLike, rows: int) -> NDArray[np.int64]:
    array = np.asarray(counts)
    if array.size and array.dtype.kind not in "iu":
        raise DTypeError(f"counts has dtype {array.dtype}; allowed: integers")
    if array.shape != (rows,):
        raise ArgumentError(
            f"counts has shape {array.shape}; allowed: ({rows},), one count for each token"
        )
    too_large = array > np.iinfo(np.int64).max
    bad = np.flatnonzero((array < 0) | too_large)
    if len(bad):
        raise ArgumentError(
            f"counts[{bad[0]}] = {array[bad[0]]} is outside 0..{np.iinfo(np.int64).max}"
        )
    checked = array.astype(np.int64)
    checked.flags.writeable = False
    return checked


def _load_counts(path: Path, rows: int) -> NDArray[np.int64]:
    """Read a .npy of counts; nothing is unpickled, or allocated by what the header claims."""
    data = path.read_bytes()
    header = npy.read(data[: npy.HEAD_BYTES], path)
    if header.dtype != np.dtype("<i8") or header.shape != (rows,):
        raise FormatError(
            f"{path} holds {header.dtype} of shape {header.shape}; allowed: int64 of shape "
            f"({rows},), one count for each line of {_TEXT}. {_AGAIN}"
        )
    data = data[header.offset :]
    if len(data) != 8 * rows:
        raise FormatError(
            f"{path} has {len(data)} bytes of counts; its header allows {8 * rows}. {_AGAIN}"
        )
    return np.frombuffer(data, "<i8")
