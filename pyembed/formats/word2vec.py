"""word2vec files, text and binary: a line ``rows dim``, then the rows.

Text is ``token value … value`` a line, as the C tool, gensim and fastText's ``.vec`` write it.
Binary is ``token 0x20 float32 … float32`` a row in little-endian order, with a newline after the
row from the C tool and none from gensim. Rows have no fixed length there, so the file is scanned
from its start.

The binary form has no magic number and no checksum: `is_binary` decides by the bytes of the first
row, and damage shows as a missing space, a value that is not finite, or missing or surplus bytes
at the end. One leading newline is never part of a token, because it cannot be told from the
newline that the C tool writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pyembed.formats import _source
from pyembed.formats._source import (
    NUMBER_BYTES,
    Head,
    Stream,
    TextSource,
    VectorSource,
    show,
    strip_line,
)

TOKEN_LIMIT = 1 << 16  # bytes; the C tool stops at 100, so a longer run without a space is damage
_CONTROL = bytes(set(range(0x20)) - set(b"\t\n\r"))


class Word2VecText(TextSource):
    """The text form; line 1 is required, and exactly its count of rows."""

    format = "word2vec"

    def __init__(self, head: Head) -> None:
        count, dim = head.header(row_bytes_per_dim=2)
        super().__init__(head, dim, count, declared_rows=count)


class Word2VecBinary(VectorSource):
    """The binary form; line 1 is required, and exactly its count of rows."""

    format = "word2vec-binary"
    _unit = "byte"

    def __init__(self, head: Head) -> None:
        self._count, dim = head.header(row_bytes_per_dim=4)
        super().__init__(head, dim, self._count, body=head.body)

    def _rows(
        self, stream: Stream
    ) -> Iterator[tuple[list[bytes], NDArray[np.float32], Sequence[int]]]:
        width = 4 * self.dim
        size = max(1, _source.CHUNK_VALUES // self.dim)
        data, at, base = b"", 0, self._body  # data[at] comes next: byte base + at of the file
        tokens: list[bytes] = []
        rows: list[bytes] = []
        places: list[int] = []
        for number in range(self._count):
            while True:
                start = at + (data[at : at + 1] == b"\n")
                gap = data.find(b" ", start, start + TOKEN_LIMIT + 1)
                if gap >= 0 and gap + 1 + width <= len(data):
                    break
                if gap < 0 and len(data) - start > TOKEN_LIMIT:
                    self._fail_token(base + start, number)
                more = stream.read(_source.BLOCK)
                if not more:
                    self._fail_short(base + len(data), number)
                data, at, base = data[at:] + more, 0, base + at
            tokens.append(data[start:gap])
            places.append(base + start)
            at = gap + 1 + width
            rows.append(data[gap + 1 : at])
            if len(tokens) == size:
                yield tokens, self._values(tokens, rows, places), places
                tokens, rows, places = [], [], []
        rest = data[at:] + stream.read(2)
        if rest not in (b"", b"\n"):
            self._fail(
                base + at,
                f"more bytes after {self._count} rows",
                "the rows that line 1 declares and one newline",
                "Correct the count on line 1",
            )
        if tokens:
            yield tokens, self._values(tokens, rows, places), places

    def _values(
        self, tokens: list[bytes], rows: list[bytes], places: list[int]
    ) -> NDArray[np.float32]:
        # From a bytearray the array is writable, which callers may rely on.
        little = np.frombuffer(bytearray().join(rows), "<f4").reshape(len(rows), self.dim)
        values = little.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            row, column = (int(index) for index in np.argwhere(~finite)[0])
            self._fail(
                places[row] + len(tokens[row]) + 1 + 4 * column,
                f"value {column + 1} of {self.dim} of token {show(tokens[row])} is "
                f"{values[row, column]}",
                "finite float32",
                "Remove or correct the row; if many follow, the file is damaged or dim "
                f"{self.dim} on line 1 is wrong",
            )
        return values

    def _fail_token(self, offset: int, number: int) -> None:
        self._fail(
            offset,
            f"row {number} of {self._count} has no space within {TOKEN_LIMIT} bytes",
            "a token, a space, then its values",
            f"The file is damaged, or dim {self.dim} on line 1 is wrong",
        )

    def _fail_short(self, offset: int, number: int) -> None:
        self._fail(
            offset,
            f"the file ends inside row {number} of 0..{self._count - 1}",
            f"the {self._count} rows that line 1 declares, each a token, a space and "
            f"{4 * self.dim} bytes",
            "Fetch the file again: it is cut off, or its line 1 is wrong",
        )


def is_binary(head: Head, dim: int) -> bool:
    """Whether the values of the first row after a header line are raw float32, and not text.

    They are text if line 2 has enough fields and the last `dim` of them look like numbers.
    Otherwise raw float32 have control characters or broken UTF-8. A faulty text (tabs, commas)
    has neither, and is reported as the text that it is.
    """
    line = strip_line(head.rest.partition(b"\n")[0])
    words = line.split(b" ")
    if len(words) > dim and not b"".join(words[-dim:]).translate(None, NUMBER_BYTES):
        return False
    payload = head.rest.partition(b" ")[2][: 4 * dim]
    if len(payload.translate(None, _CONTROL)) < len(payload):
        return True
    try:
        payload.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"  # the payload may end inside a character
    return False
