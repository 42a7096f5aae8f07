"""GloVe text: ``token value … value`` a line, usually without a header line.

The width of line 1 decides the dim of the file. GloVe's ``-write-header 1`` puts ``rows dim`` on
line 1; it counts the words, but not the ``<unk>`` row that GloVe may write last. Therefore such a
file may have one row more than it declares, if that row is ``<unk>``, and `declared_rows` is None:
a table must not be sized by a number that may be off by one.

Line 1 is a header only if it is exactly two integers and line 2 has more fields, because a token
can be a number.
"""

from __future__ import annotations

from pyembed.errors import FormatError
from pyembed.formats._source import MAX_DIM, Head, TextSource, show, strip_line


class Glove(TextSource):
    """GloVe's text, with or without its header line."""

    format = "glove"
    uncounted = b"<unk>"

    def __init__(self, head: Head) -> None:
        if _has_header(head):
            count, dim = head.header(row_bytes_per_dim=2)
            super().__init__(head, dim, count, declared_rows=None)
            return
        dim = head.line.count(b" ")
        if not 1 <= dim <= MAX_DIM:
            remedy = "Replace each tab by one space" if b"\t" in head.line else "Correct line 1"
            raise FormatError(
                f"{head.path}: line 1 is {show(head.line)}, with {dim} values; allowed: a token "
                f"and 1 to {MAX_DIM} values with one space between them. {remedy}"
            )
        super().__init__(head, dim, None, declared_rows=None)
        self.parse_line(head.line, 1)  # refuses prose before its width is used


def _has_header(head: Head) -> bool:
    """Whether line 1 is ``rows dim``, and not a token that is a number with one value."""
    second = strip_line(head.rest.partition(b"\n")[0])
    return head.claims is not None and second.count(b" ") > 1
