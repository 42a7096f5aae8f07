"""The parts that all readers of vector files share: byte stream, head, and parser of text rows.

Everything works on bytes. Lines end at 0x0A alone and fields at 0x20 alone, so a token may hold
any other byte: U+0085, a no-break space, half a code point. One trailing space and a carriage
return before the line end are dropped, because the original C tool and Windows editors write them,
and so is a byte order mark at the start of a file.

Speed comes from parsing a block of lines at once: numpy finds the end of each token, and one call
parses the joined numbers of all lines. A block that this call refuses goes line by line through
`_parse_lines`, which defines the format and raises errors that a person can act on.

The readers never guess: they skip, fill in and cut off nothing. They never allocate by a number
that a file claims. They need the memory of a few blocks, and of the set of tokens that finds
duplicates.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from pyembed.errors import ArgumentError, FormatError

Chunk = tuple[list[bytes], NDArray[np.float32]]

BLOCK = 8 << 20  # bytes per read: at 7 to 9 characters a value, text for 4 MB of float32
CHUNK_VALUES = 1 << 20  # float32 values per chunk: 4 MB
MAX_DIM = 65536
LINE_LIMIT = 4 << 20  # bytes: MAX_DIM values of 24 characters take 1.6 MB
DEFLATE_RATIO = 1032  # the most bytes that deflate expands one to; it bounds the size of a .gz

NUMBER_BYTES = b"0123456789+-.eE "
_NUMBER = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(rb"[+-]?(?:nan(?:\(.*\))?|inf(?:inity)?)", re.IGNORECASE)
_INTEGER = re.compile(rb"[+-]?[0-9]+")


class Stream:
    """The bytes of a file, unpacked if it is `packed` by gzip; `position` counts those on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._raw = path.open("rb")
        self.packed = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if self.packed else self._raw

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    @property
    def position(self) -> int:
        return self._raw.tell()

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FormatError(
                f"{self._path}: the gzip data is damaged or cut off near byte {self.position} "
                f"({error}); fetch or pack the file again"
            ) from error


class Head:
    """The head of a file: its size, line 1, and a sample of the lines that follow."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ArgumentError(
                f"{path} is not a regular file; it is read from its start more than once, so save "
                "it to a file"
            )
        self.path = path
        with closing(Stream(path)) as stream:
            self.bytes_total = path.stat().st_size
            self.bytes_max = self.bytes_total * (DEFLATE_RATIO if stream.packed else 1)
            sample = stream.read(LINE_LIMIT)
        self.bom = 3 if sample.startswith(b"\xef\xbb\xbf") else 0
        self.sample = sample[self.bom :]
        if not self.sample:
            raise FormatError(
                f"{path} is empty; allowed: at least one row of a token and its values"
            )
        line, newline, self.rest = self.sample.partition(b"\n")
        if not newline and len(sample) == LINE_LIMIT:
            fail_line_length(path, 1)
        self.line = strip_line(line)
        self.body = self.bom + len(line) + len(newline)

    @property
    def claims(self) -> tuple[bytes, bytes] | None:
        """The two integers of line 1; None if it is anything else."""
        fields = self.line.split(b" ")
        if len(fields) == 2 and all(_INTEGER.fullmatch(field) for field in fields):
            return fields[0], fields[1]
        return None

    def header(self, row_bytes_per_dim: int) -> tuple[int, int]:
        """Check ``rows dim`` of line 1 against the size of the file, and return both."""
        if self.claims is None:
            raise FormatError(
                f"{self.path}: line 1 is {show(self.line)}; allowed: '<rows> <dim>', two integers. "
                "For a file without this line give format='glove'"
            )
        digits, dim = self.claims[0], int(self.claims[1][:20])
        if not 1 <= dim <= MAX_DIM:
            raise FormatError(
                f"{self.path}: line 1 declares dim {show(self.claims[1])}; allowed: 1 to "
                f"{MAX_DIM}. Correct line 1"
            )
        count = int(digits[:20])  # 20 digits exceed any file, and bound the cost of int()
        # The shortest row has an empty token: a space, then the values. The last may lack its end.
        fits = (self.bytes_max - self.body + 1) // (dim * row_bytes_per_dim + 1)
        if not 1 <= count <= fits:
            raise FormatError(
                f"{self.path}: line 1 declares {show(digits)} rows of dim {dim}; allowed: at "
                f"least 1, and at most the {fits} for which a file of {self.bytes_total} bytes "
                "has room. The file is cut off, or the count on line 1 has to be corrected; if "
                "line 1 is a row, give format='glove'"
            )
        return count, dim


class VectorSource:
    """A file of named vectors, read in chunks; every iteration starts at the beginning.

    Attributes
    ----------
    path : Path
        The file.
    format : {"word2vec", "word2vec-binary", "glove"}
        The format of the file.
    dim : int
        Values per row.
    declared_rows : int or None
        The number of rows that line 1 declares. If it is not None, a complete iteration yields
        exactly as many, or raises.
    bytes_total, bytes_read : int
        The size of the file, and how much of it the current iteration has read; of a ``.gz``,
        compressed bytes.
    """

    format: str
    _unit: str  # what the places of `_rows` count: "line" or "byte"

    def __init__(self, head: Head, dim: int, declared_rows: int | None, body: int) -> None:
        self.path = head.path
        self.dim = dim
        self.declared_rows = declared_rows
        self.bytes_total = head.bytes_total
        self.bytes_read = 0
        self._body = body

    def __iter__(self) -> Iterator[Chunk]:
        """Yield ``(tokens, values)``: a list of bytes, and about 4 MB of float32, one row each."""
        seen: set[bytes] = set()
        size = max(1, CHUNK_VALUES // self.dim)
        with closing(Stream(self.path)) as stream:
            stream.read(self._body)
            for tokens, values, places in self._rows(stream):
                self.bytes_read = stream.position
                self._check_unique(tokens, seen, places)
                for first in range(0, len(tokens), size):
                    yield tokens[first : first + size], values[first : first + size]
            self.bytes_read = stream.position

    def __repr__(self) -> str:
        rows = "unknown" if self.declared_rows is None else self.declared_rows
        return f"<VectorSource {self.format} {str(self.path)!r}: rows {rows}, dim {self.dim}>"

    def _rows(
        self, stream: Stream
    ) -> Iterator[tuple[list[bytes], NDArray[np.float32], Sequence[int]]]:
        """Yield tokens, values, and the line or byte offset where each row starts."""
        raise NotImplementedError

    def _check_unique(self, tokens: list[bytes], seen: set[bytes], places: Sequence[int]) -> None:
        if len(set(tokens)) == len(tokens) and seen.isdisjoint(tokens):
            seen.update(tokens)
            return
        for token, place in zip(tokens, places, strict=True):
            if token in seen:
                self._fail(
                    place,
                    f"token {show(token)} appears a second time",
                    "each token once",
                    "Remove one of the rows",
                )
            seen.add(token)

    def _fail(
        self, place: int, found: str, allowed: str, remedy: str, column: int | None = None
    ) -> NoReturn:
        at = "" if column is None else f", column {column}"
        raise FormatError(
            f"{self.path}: {self._unit} {place}{at}: {found}; allowed: {allowed}. {remedy}"
        )


class TextSource(VectorSource):
    """Rows of ``token value … value``, one a line; the base of the two text formats.

    `count` is the number of rows that line 1 declares. One more row is an error, unless it is the
    last one and its token is `uncounted`.
    """

    _unit = "line"
    uncounted: bytes | None = None

    def __init__(self, head: Head, dim: int, count: int | None, declared_rows: int | None) -> None:
        super().__init__(head, dim, declared_rows, body=head.bom if count is None else head.body)
        self._count = count
        self._dim_origin = f"dim {dim}, from line 1"

    def _rows(
        self, stream: Stream
    ) -> Iterator[tuple[list[bytes], NDArray[np.float32], Sequence[int]]]:
        start = 1 if self._count is None else 2
        line = start
        for block in _blocks(stream, self.path, line):
            tokens, values = self._parse_block(block, line)
            if self._count is not None:
                self._check_surplus(tokens, line - start, line)
            yield tokens, values, range(line, line + len(tokens))
            line += len(tokens)
        if self._count is not None and line - start < self._count:
            raise FormatError(
                f"{self.path}: ends after line {line - 1} with {line - start} rows; allowed: the "
                f"{self._count} rows that line 1 declares. The file is cut off, or the count on "
                "line 1 has to be corrected"
            )

    def _check_surplus(self, tokens: list[bytes], before: int, line: int) -> None:
        """Refuse the first row beyond the count and beyond the uncounted row after it."""
        limit = count = cast(int, self._count)
        end = before + len(tokens)
        if before > count or (end > count and tokens[count - before] == self.uncounted):
            limit += 1
        if end <= limit:
            return
        glove = ", or give format='glove' if the row is an <unk> that GloVe did not count"
        self._fail(
            line + limit - before,
            "one more row",
            f"the {count} rows that line 1 declares",
            f"Correct the count on line 1{glove if self.uncounted is None else ''}",
        )

    def _parse_block(self, block: bytes, line: int) -> Chunk:
        """Parse whole lines at once, with the result or the error of `_parse_lines`."""
        block = block.replace(b"\r\n", b"\n").replace(b" \n", b"\n")
        raw = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(raw == 0x0A)
        spaces = np.flatnonzero(raw == 0x20)
        starts = np.concatenate(([0], ends[:-1] + 1))
        after = np.searchsorted(spaces, ends)  # spaces before the end of each line
        before = np.concatenate(([0], after[:-1]))
        cut = after - self.dim  # the space that ends the token is the dim-th from the right
        if (cut < before).any():
            return self._parse_lines(block, line)
        cuts = spaces[cut].tolist()
        tokens = [block[a:b] for a, b in zip(starts.tolist(), cuts, strict=True)]
        if any(_ambiguous(tokens[i]) for i in np.flatnonzero(cut > before)):
            return self._parse_lines(block, line)
        tails = [block[a + 1 : b] for a, b in zip(cuts, ends.tolist(), strict=True)]
        values = _parse_numbers(tails, len(tokens) * self.dim)
        if values is None:
            return self._parse_lines(block, line)
        return tokens, values.reshape(len(tokens), self.dim)

    def _parse_lines(self, block: bytes, first: int) -> Chunk:
        lines = block.split(b"\n")[:-1]
        values = np.empty((len(lines), self.dim), np.float32)
        tokens = []
        for row, line in enumerate(lines):
            token, values[row] = self.parse_line(line, first + row)
            tokens.append(token)
        return tokens, values

    def parse_line(self, line: bytes, number: int) -> tuple[bytes, list[float]]:
        """Parse one line, or raise an error that names its line and column."""
        fields = line.rsplit(b" ", self.dim)
        allowed = f"a token and {self.dim} values with one space between them ({self._dim_origin})"
        if len(fields) <= self.dim:
            if b"\t" in line:
                found, column = "fields are separated by tabs", line.index(b"\t") + 1
                self._fail(number, found, allowed, "Replace each tab by one space", column)
            found = f"{len(fields) - 1} values" if line else "the line is empty"
            self._fail(number, found, allowed, "Correct or remove the line", len(line) + 1)
        token, *words = fields
        if _ambiguous(token):
            found = (
                f"{line.count(b' ')} values, or token {show(token)} that ends in number or space"
            )
            remedy = "Remove the surplus value or space, or write the token without spaces"
            self._fail(number, found, allowed, remedy, token.rindex(b" ") + 2)
        column = len(token) + 2
        values = []
        for position, word in enumerate(words, 1):
            reason = _reason(word)
            if reason:
                self._fail(
                    number,
                    f"value {position} of {self.dim} is {show(word)}, {reason}",
                    "finite decimal numbers such as 0.25 or -1e-3, in ASCII, within float32",
                    "Correct the value or remove the line",
                    column,
                )
            values.append(float(word))
            column += len(word) + 1
        return token, values


def show(field: bytes) -> str:
    """Format a field for an error message, cut to 60 characters."""
    text = repr(field)[1:]
    return text if len(text) <= 60 else f"{text[:57]}…'"


def strip_line(line: bytes) -> bytes:
    """Drop the space and the carriage return that the C tool and Windows write at line ends."""
    return line.removesuffix(b"\r").removesuffix(b" ")


def fail_line_length(path: Path, line: int) -> NoReturn:
    raise FormatError(
        f"{path}: line {line} has no end within {LINE_LIMIT} bytes; allowed: one row a line. "
        "The file is not a text of vectors; if it is word2vec's binary form, give "
        "format='word2vec-binary'"
    )


def _blocks(stream: Stream, path: Path, line: int) -> Iterator[bytes]:
    """Yield the stream in blocks of whole lines.

    A last line without an end may be cut off inside a number, which then is another number. Only
    gzip proves, by its checksum, that the file ends there.
    """
    tail = b""
    while data := stream.read(BLOCK):
        end = data.rfind(b"\n") + 1
        if end:
            block = tail + data[:end]
            yield block
            line += block.count(b"\n")
            tail = data[end:]
        else:
            tail += data
        if len(tail) > LINE_LIMIT:
            fail_line_length(path, line)
    if tail and not stream.packed:
        raise FormatError(
            f"{path}: line {line} has no newline at its end; allowed: one after each row, because "
            "a file without the last one may be cut off inside a number. Fetch the file again, or "
            f"add the newline if the file is whole: echo >> {path}"
        )
    if tail:
        yield tail + b"\n"


def _parse_numbers(tails: list[bytes], count: int) -> NDArray[np.float32] | None:
    """Parse fields between single spaces as ``float32(float(field))``; None if one is no number.

    Only bytes of decimal numbers pass, so no NaN, hexadecimal, underscore or other whitespace
    reaches numpy. No field is empty, and numpy stops at the first field that is not a number, so
    a full count proves that each field was one. If numpy stops inside the last field, the appended
    0 is missing from the count.
    """
    text = b" ".join([*tails, b"0"])
    if text.translate(None, NUMBER_BYTES) or b"  " in text or text.startswith(b" "):
        return None
    try:
        values = np.fromstring(text, np.float32, sep=" ")
    except (ValueError, DeprecationWarning):  # it depends on the version of numpy
        return None
    if len(values) != count + 1 or not np.isfinite(values).all():
        return None
    return values[:count]


def _ambiguous(token: bytes) -> bool:
    """Whether a token of several words ends in a number, which may be one value too many."""
    _, space, last = token.rpartition(b" ")
    return bool(space) and (
        not last or bool(_NUMBER.fullmatch(last) or _NOT_FINITE.fullmatch(last))
    )


def _reason(word: bytes) -> str | None:
    """The reason why a field is no value of a vector; None if it is one."""
    if _NUMBER.fullmatch(word):
        with np.errstate(over="ignore"):
            return None if np.isfinite(np.float32(float(word))) else "too large for float32"
    if not word:
        return "empty: two spaces in a row"
    if _NOT_FINITE.fullmatch(word):
        return "not finite"
    if b"," in word:
        return "not a decimal number (a comma where a point belongs?)"
    return "not a decimal number"
