"""Readers of vector files: what a good file gives, exactly, and what a bad one is told."""

from __future__ import annotations

import gzip
import importlib.util
import os
import tempfile
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyembed.errors import ArgumentError, FormatError
from pyembed.formats import VectorSource, _source, open_vectors

TEXTS = ["word2vec", "glove"]
FIELD = st.text("0123456789+-.eE_xnaif,\t\x0b٣", max_size=6)
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def read(source: VectorSource) -> tuple[list[bytes], NDArray[np.float32]]:
    """Read a source to its end."""
    tokens: list[bytes] = []
    parts = [np.empty((0, source.dim), np.float32)]
    for names, values in source:
        assert values.dtype == np.float32
        assert values.shape == (len(names), source.dim)
        tokens += names
        parts.append(values)
    return tokens, np.concatenate(parts)


def read_bytes(content: bytes, format: str = "auto") -> tuple[list[bytes], NDArray[np.float32]]:
    """Read the content as a file with a neutral name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vectors")
        path.write_bytes(content)
        return read(open_vectors(path, format))


def message(content: bytes, format: str = "auto") -> str:
    """The text of the FormatError that the content causes."""
    with pytest.raises(FormatError) as caught:
        read_bytes(content, format)
    return str(caught.value)


def binary(tokens: list[bytes], values: NDArray[np.float32], end: bytes) -> bytes:
    """Write word2vec's binary form; the C tool ends a row with a newline, gensim does not."""
    rows = zip(tokens, values, strict=True)
    body = b"".join(token + b" " + row.astype("<f4").tobytes() + end for token, row in rows)
    return b"%d %d\n" % values.shape + body


@st.composite
def vectors(draw: st.DrawFn, forbidden: bytes) -> tuple[list[bytes], NDArray[np.float32]]:
    """Draw tokens of any allowed bytes, and finite rows."""
    byte = st.sampled_from(sorted(set(range(256)) - set(forbidden)))
    token = st.lists(byte, max_size=6).map(bytes).filter(lambda token: token[:1] != b"\n")
    tokens = draw(st.lists(token, min_size=1, max_size=8, unique=True))
    dim = draw(st.integers(1, 5))
    flat = draw(st.lists(FINITE, min_size=len(tokens) * dim, max_size=len(tokens) * dim))
    return tokens, np.array(flat, np.float32).reshape(len(tokens), dim)


# ---- what a good file gives


@given(
    data=vectors(forbidden=b"\n "),
    end=st.sampled_from([b"\n", b" \n", b"\r\n", b" \r\n"]),
    last_end=st.booleans(),
    packed=st.booleans(),
    block=st.integers(1, 64),
    format=st.sampled_from(TEXTS),
)
def test_text_round_trip(
    data: tuple[list[bytes], NDArray[np.float32]],
    end: bytes,
    last_end: bool,
    packed: bool,
    block: int,
    format: str,
) -> None:
    """Text is read bit for bit, for any token, line end, compression and end of a block.

    Of gzip, whose checksum proves that a file is whole, the last line needs no end.
    """
    tokens, values = data
    if format == "glove":  # a file without a header must not begin like another kind of file
        tokens = (
            [b"the\xff", *tokens[1:]] if b"the\xff" not in tokens[1:] else [b"a\xff", *tokens[1:]]
        )
    lines = [
        b" ".join([token, *(str(value).encode() for value in row)])
        for token, row in zip(tokens, values, strict=True)
    ]
    header = [b"%d %d" % values.shape] if format == "word2vec" else []
    content = end.join(header + lines) + (b"" if packed and not last_end else end)
    with mock.patch.object(_source, "BLOCK", block):
        names, got = read_bytes(gzip.compress(content) if packed else content, format)
    assert names == tokens
    assert got.tobytes() == values.tobytes()


@given(
    data=vectors(forbidden=b" "),
    end=st.sampled_from([b"", b"\n"]),
    packed=st.booleans(),
    block=st.integers(1, 64),
)
def test_binary_round_trip(
    data: tuple[list[bytes], NDArray[np.float32]], end: bytes, packed: bool, block: int
) -> None:
    """Binary is read bit for bit, with and without a newline after each row."""
    tokens, values = data
    content = binary(tokens, values, end)
    with mock.patch.object(_source, "BLOCK", block):
        names, got = read_bytes(gzip.compress(content) if packed else content, "word2vec-binary")
    assert names == tokens
    assert got.tobytes() == values.tobytes()


@given(
    st.integers(1, 3).flatmap(
        lambda dim: st.lists(
            st.lists(FIELD, min_size=dim, max_size=dim),
            min_size=1,
            max_size=4,
        )
    )
)
def test_numbers_are_float_of_the_field_or_an_error(rows: list[list[str]]) -> None:
    """A field is float32(float(field)) if it is a finite decimal number, and an error if not."""
    lines = [f"t{i} {' '.join(row)}".encode() for i, row in enumerate(rows)]
    content = b"%d %d\n" % (len(rows), len(rows[0])) + b"\n".join(lines) + b"\n"
    try:
        if any(set(field) - set("0123456789+-.eE") for row in rows for field in row):
            raise ValueError("a character that no decimal number has")
        with np.errstate(over="ignore"):
            expected = np.array([[np.float32(float(field)) for field in row] for row in rows])
        if not np.isfinite(expected).all():
            raise ValueError("too large for float32")
    except ValueError:
        message(content, "word2vec")
    else:
        assert read_bytes(content, "word2vec")[1].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        pytest.param(b"\xef\xbb\xbf2 2\na 1 2\nb 3 4\n", [b"a", b"b"], id="mark before a header"),
        pytest.param(b"\xef\xbb\xbfa 1 2\nb 3 4\n", [b"a", b"b"], id="mark before a token"),
        pytest.param(b"2 2\na 1 2 \nb 3 4 \n", [b"a", b"b"], id="trailing spaces"),
        pytest.param(b"2 2 \r\na 1 2 \r\nb 3 4 \r\n", [b"a", b"b"], id="Windows line ends"),
        pytest.param(b"\xc2\x85 1 2\nb 3 4\n", [b"\xc2\x85", b"b"], id="token U+0085"),
        pytest.param(b"a 1 2\n\xc2\xa0 3 4\n", [b"a", b"\xc2\xa0"], id="token no-break space"),
        pytest.param(b"a 1 2\n\x0c\x0b 3 4\n", [b"a", b"\x0c\x0b"], id="token of other blanks"),
        pytest.param(b"a 1 2\n 3 4\n", [b"a", b""], id="empty token"),
        pytest.param(b"a 1 2\n\xff\xc3 3 4\n", [b"a", b"\xff\xc3"], id="not UTF-8"),
        pytest.param(b"a 1 2\n. . . 3 4\n", [b"a", b". . ."], id="token with spaces"),
        pytest.param(b"a 1 2\nto me@x.com 3 4\n", [b"a", b"to me@x.com"], id="token of two words"),
        pytest.param(b"7 1 2\n8 3 4\n", [b"7", b"8"], id="tokens that are numbers"),
        pytest.param(b"a +1. 2e0\nb 0.3E1 04\n", [b"a", b"b"], id="spellings of numbers"),
    ],
)
def test_odd_but_good_text(content: bytes, tokens: list[bytes]) -> None:
    """Oddities of real files that the format allows are read as they are."""
    names, values = read_bytes(content)
    assert names == tokens
    assert values.tolist() == [[1, 2], [3, 4]]


def test_format_comes_from_content_and_not_from_the_name(tmp_path: Path) -> None:
    """The suffix decides nothing, neither for the format nor for gzip."""
    values = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    text = b"".join(
        b"t%d %s\n" % (i, b" ".join(b"%g" % v for v in row)) for i, row in enumerate(values)
    )
    kinds = {
        "word2vec-binary": binary([b"t0", b"t1"], values, b""),
        "word2vec": b"2 8\n" + text,
        "glove": text,
    }
    for kind, content in kinds.items():
        for packed, name in [(False, "x.bin.gz"), (True, "x.txt")]:
            path = tmp_path / name
            path.write_bytes(gzip.compress(content) if packed else content)
            source = open_vectors(path)
            assert (source.format, source.dim) == (kind, 8)
            assert source.declared_rows == (None if kind == "glove" else 2)
            assert read(source)[0] == [b"t0", b"t1"]


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("scale", [0.0, 0.5 / 300, 1.0])
def test_binary_is_told_from_text_by_its_first_row(dim: int, scale: float) -> None:
    """Trained, tiny and zero vectors are recognised as binary, with either end of a row."""
    rng = np.random.default_rng(dim)
    tokens = [b"</s>", b"the", b"\xe2\x82"]
    for end in (b"", b"\n"):
        values = (rng.standard_normal((3, dim)) * scale).astype(np.float32)
        names, got = read_bytes(binary(tokens, values, end))
        assert names == tokens
        assert got.tobytes() == values.tobytes()


def test_two_integers_on_line_1_are_a_header() -> None:
    """A file of dim 1 is word2vec if line 1 is two integers, and 'glove' overrules it."""
    content = b"1 1\n7 5\n"
    assert read_bytes(content)[0] == [b"7"]
    assert read_bytes(content, "glove")[0] == [b"1", b"7"]
    assert "give format='glove'" in message(b"8 1\n7 5\n")


def test_glove_may_end_in_an_uncounted_unk() -> None:
    """GloVe's header does not count <unk>: this surplus row is read, under this format alone."""
    content = b"2 2\na 1 2\nb 3 4\n<unk> 5 6\n"
    tokens, values = read_bytes(content, "glove")
    assert tokens == [b"a", b"b", b"<unk>"]
    assert values[2].tolist() == [5, 6]
    assert "line 4" in message(content)
    assert "format='glove'" in message(content)
    assert "line 4" in message(content.replace(b"<unk>", b"c"), "glove")
    for block in (1, 20, 1000):
        with mock.patch.object(_source, "BLOCK", block):
            assert "line 5" in message(content + b"d 7 8\n", "glove")


def test_chunks_are_bounded_and_cover_the_file(tmp_path: Path) -> None:
    """No chunk holds more than CHUNK_VALUES values, and progress ends at the size of the file."""
    values = np.arange(1000, dtype=np.float32).reshape(100, 10)
    tokens = [b"t%d" % i for i in range(100)]
    text = b"".join(
        token + b" " + b" ".join(b"%d" % v for v in row) + b"\n"
        for token, row in zip(tokens, values, strict=True)
    )
    for content in (binary(tokens, values, b"\n"), text):
        path = tmp_path / "vectors"
        path.write_bytes(content)
        with mock.patch.object(_source, "CHUNK_VALUES", 64):
            source = open_vectors(path)
            assert (source.bytes_read, source.bytes_total) == (0, len(content))
            assert max(chunk.size for _, chunk in source) == 60
            assert source.bytes_read == len(content)
            assert read(source)[0] == tokens, "a second iteration starts again"


def test_chunks_belong_to_the_caller() -> None:
    """A chunk is writable, so that a builder can scale it in place."""
    values = np.ones((2, 8), np.float32)
    for content in (b"a 1 2\nb 3 4\n", binary([b"a", b"b"], values, b"")):
        assert read_bytes(content)[1].flags.writeable


# ---- what a bad file is told

BAD_TEXT = {
    "value missing": (b"2 3\na 1 2 3\nb 1 2\n", ["line 3", "2 values", "a token and 3 values"]),
    "single value": (b"2 3\naaaa 1 2 3\nb 1\n", ["line 3", "1 values", "a token and 3 values"]),
    "token alone": (b"2 3\naaaa 1 2 3\nb\n", ["line 3, column 2", "0 values"]),
    "value too many": (b"2 2\na 1 2\nb 1 2 3\n", ["line 3, column 3", "3 values"]),
    "surplus nan": (b"2 2\na 1 2\nb nan 2 3\n", ["line 3", "3 values", "token 'b nan'"]),
    "empty line": (b"2 2\na 1 2\n\nb 3 4\n", ["line 3", "the line is empty"]),
    "empty last line": (b"a 1 2\nb 3 4\n\n", ["line 3", "the line is empty"]),
    "two spaces after token": (b"2 2\na 1 2\nb  3 4\n", ["line 3", "ends in number or space"]),
    "two spaces in a row": (b"2 2\na 1 2\nb 3  4\n", ["line 3", "3 values"]),
    "two spaces at the end": (b"2 2\na 1 2\nb 3  \n", ["line 3, column 5", "value 2 of 2 is ''"]),
    "not a number": (b"2 2\na 1 2\nb 3 x4\n", ["line 3, column 5", "value 2 of 2 is 'x4'"]),
    "decimal comma": (b"2 2\na 1 2\nb 3,5 4\n", ["line 3, column 3", "'3,5'", "comma"]),
    "hexadecimal": (b"2 2\na 1 2\nb 0x1F 4\n", ["line 3, column 3", "'0x1F'"]),
    "underscore": (b"2 2\na 1 2\nb 1_000 4\n", ["line 3, column 3", "'1_000'"]),
    "other digits": ("2 2\na 1 2\nb ٣ 4\n".encode(), ["line 3, column 3", "in ASCII"]),
    "tab inside": (b"2 2\na 1 2\nb 3\t4 5\n", ["line 3, column 3", r"'3\t4'"]),
    "tabs throughout": (b"2 2\na 1 2\nb\t3\t4\n", ["line 3, column 2", "tab"]),
    "sign alone": (b"2 2\na 1 2\nb - 4\n", ["line 3, column 3", "'-'"]),
    "cut exponent": (b"2 2\na 1 2\nb 3 4e\n", ["line 3, column 5", "'4e'"]),
    "two points": (b"2 2\na 1 2\nb 3 4.5.6\n", ["line 3, column 5", "'4.5.6'"]),
    "two numbers": (b"2 2\na 1 2\nb 3 4-5\n", ["line 3, column 5", "'4-5'"]),
    "nan": (b"2 2\na 1 2\nb 3 NaN\n", ["line 3, column 5", "'NaN', not finite"]),
    "nan(ind)": (b"2 2\na 1 2\nb 3 -nan(ind)\n", ["line 3", "'-nan(ind)', not finite"]),
    "infinity": (b"2 2\na 1 2\nb 3 -inf\n", ["line 3, column 5", "'-inf', not finite"]),
    "too large": (b"2 2\na 1 2\nb 3 1e39\n", ["line 3, column 5", "too large for float32"]),
    "too large for a double": (b"2 2\na 1 2\nb 3 1e999\n", ["line 3", "too large for float32"]),
    "duplicate token": (b"3 2\na 1 2\nb 3 4\na 5 6\n", ["line 4", "'a' appears a second time"]),
    "count too small": (b"2 2\na 1 2\nb 3 4\nc 5 6\n", ["line 4", "the 2 rows that line 1"]),
    "count too big": (b"3 2\naa 1.0 2.0\nb 3 4\n", ["line 3", "2 rows", "3 rows that line 1"]),
    "huge count": (b"100000000000 2\na 1 2\n", ["line 1", "'100000000000' rows", "at most the 1 "]),
    "count past int64": (b"9" * 50 + b" 2\na 1 2\n", ["line 1", "rows of dim 2"]),
    "negative count": (b"-2 2\na 1 2\n", ["line 1", "'-2' rows", "at least 1"]),
    "no rows": (b"0 2\na 1 2\n", ["line 1", "'0' rows", "at least 1"]),
    "dim 0": (b"2 0\na 1 2\n", ["line 1", "dim '0'", "1 to 65536"]),
    "huge dim": (b"2 99999999999999999999999\na 1 2\n", ["line 1", "dim", "1 to 65536"]),
    "mark inside": (b"a 1 2\n\xef\xbb\xbfb 3\n", ["line 2", "1 values"]),
    "empty file": (b"", ["is empty"]),
    "mark alone": (b"\xef\xbb\xbf", ["is empty"]),
    "tabs on line 1": (b"a\t1\t2\nb\t3\t4\n", ["line 1", "0 values", "tab"]),
    "prose": (b"These are words,\nnot vectors.\n", ["line 1, column 7", "'are'"]),
    "line end alone": (b"\n", ["line 1", "0 values"]),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_names_the_place_and_the_fault(name: str) -> None:
    """Each fault of a text is a FormatError with path, line, what was found and what is allowed."""
    content, parts = BAD_TEXT[name]
    text = message(content)
    for part in ["vectors", "allowed: ", *parts]:
        assert part in text


@pytest.mark.parametrize("name", BAD_TEXT)
@pytest.mark.parametrize("block", [1, 7])
def test_a_fault_reads_the_same_wherever_a_block_ends(name: str, block: int) -> None:
    """The message of a bad text does not depend on how it was cut into blocks."""
    content = BAD_TEXT[name][0]
    expected = message(content).split("vectors", 1)[1]
    with mock.patch.object(_source, "BLOCK", block):
        assert message(content).split("vectors", 1)[1] == expected


ROWS = np.array([[0.5, -1.25], [3.5, 0.0]], np.float32)
A, B = b"a" * 12, b"b" * 12
GOOD_BINARY = binary([A, B], ROWS, b"")
BAD_BINARY = {
    "cut inside a row": (GOOD_BINARY[:-3], ["byte 43", "row 1 of 0..1", "8 bytes"]),
    "cut before a row": (GOOD_BINARY[:25], ["byte 25", "row 1 of 0..1"]),
    "cut inside a token": (GOOD_BINARY[:26], ["byte 26", "row 1 of 0..1"]),
    "count too small": (b"1" + GOOD_BINARY[1:], ["byte 25", "more bytes after 1 rows"]),
    "surplus byte": (GOOD_BINARY + b"\n\n", ["byte 46", "more bytes after 2 rows"]),
    "huge count": (b"100000000000" + GOOD_BINARY[1:], ["line 1", "100000000000", "at most the 4 "]),
    "not a number": (
        binary([A, B], np.array([[1, 2], [3, np.nan]], np.float32), b""),
        ["byte 42", "value 2 of 2 of token 'bbbbbbbbbbbb' is nan", "finite"],
    ),
    "infinite": (
        binary([A, B], np.array([[-np.inf, 2], [3, 4]], np.float32), b"\n"),
        ["byte 17", "value 1 of 2 of token 'aaaaaaaaaaaa' is -inf", "finite"],
    ),
    "duplicate token": (
        binary([A, A], ROWS, b"\n"),
        ["byte 26", "'aaaaaaaaaaaa' appears a second"],
    ),
    "no token": (b"1 2\n" + b"\x01" * (1 << 17), ["byte 4", "no space within 65536 bytes"]),
}


@pytest.mark.parametrize("name", BAD_BINARY)
def test_bad_binary_names_the_offset_and_the_fault(name: str) -> None:
    """Each fault of a binary is a FormatError with path, byte offset and what is allowed."""
    content, parts = BAD_BINARY[name]
    text = message(content, "word2vec-binary")
    for part in ["vectors", "allowed: ", *parts]:
        assert part in text


@given(st.integers(0, len(GOOD_BINARY) - 1))
def test_no_cut_of_a_binary_goes_unseen(size: int) -> None:
    """Every proper prefix of a binary file is an error."""
    message(GOOD_BINARY[:size], "word2vec-binary")


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("number", ["{:.4f}", "{:.0f}", "{:e}"])
@pytest.mark.parametrize("end", [b"\n", b" \n", b"\r\n"])
def test_no_cut_of_a_text_goes_unseen(dim: int, number: str, end: bytes) -> None:
    """Every proper prefix of a word2vec text is an error, under "auto" too.

    Of a GloVe text, which has no count, only the cuts between two rows are whole files.
    """
    values = np.random.default_rng(dim).normal(size=(3, dim)) * 99
    rows = [
        b" ".join([token, *(number.format(value).encode() for value in row)]) + end
        for token, row in zip([b"the", b"2020", b"of"], values, strict=True)
    ]
    content = b"3 %d" % dim + end + b"".join(rows)
    assert len(read_bytes(content)[0]) == 3
    for size in range(len(content)):
        message(content[:size])
        message(content[:size], "word2vec")
    whole = b"".join(rows)
    between = {len(b"".join(rows[:count])) for count in (1, 2)}
    for size in set(range(len(whole))) - between:
        message(whole[:size], "glove")


@pytest.mark.parametrize("format", ["word2vec", "glove"])
def test_a_last_line_without_its_end_names_the_remedy(format: str) -> None:
    """A last line without a newline may be cut off; its error says how to complete the file."""
    header = b"2 2\n" if format == "word2vec" else b""
    text = message(header + b"a 1 2\nb 3 4", format)
    assert f"line {3 if header else 2} has no newline at its end" in text
    assert "Fetch the file again, or add the newline if the file is whole: echo >> " in text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("header", [b"3000000 300", b"3000000 300\n", b"1 1\n", b"0 300\n"])
def test_a_header_alone_is_refused(header: bytes, packed: bool) -> None:
    """A download that stopped after line 1 becomes no table of one row."""
    message(gzip.compress(header) if packed else header)


@given(st.binary(max_size=200), st.sampled_from(["", "2 2\n", "1 3\na "]))
def test_any_bytes_are_read_or_refused(content: bytes, start: str) -> None:
    """Any content gives vectors or a FormatError, under every format."""
    for format in ("auto", "word2vec", "word2vec-binary", "glove"):
        try:
            tokens, values = read_bytes(start.encode() + content, format)
        except FormatError:
            continue
        assert len(set(tokens)) == len(tokens) == len(values) > 0
        assert np.isfinite(values).all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_huge_count_allocates_nothing(packed: bool, tmp_path: Path) -> None:
    """A header with a wrong count is refused before memory is allocated for it."""
    path = tmp_path / "vectors"
    content = b"100000000000 300\na 1 2\n"
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    with pytest.raises(FormatError):
        open_vectors(path, "word2vec")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    """No line is kept in memory beyond LINE_LIMIT."""
    with mock.patch.object(_source, "LINE_LIMIT", 100), mock.patch.object(_source, "BLOCK", 64):
        assert "line 1 has no end within 100 bytes" in message(b"x" * 1000)
        assert "line 3 has no end within 100 bytes" in message(b"a 1\nb 2\n" + b"x" * 1000)


@pytest.mark.parametrize("cut", [5, 30, -12, -1])
def test_damaged_gzip_is_an_error(cut: int) -> None:
    """A .gz that is cut off is a FormatError and not a short table."""
    packed = gzip.compress(b"".join(b"t%d 1 2\n" % i for i in range(50)))
    assert "gzip data is damaged or cut off" in message(packed[:cut])


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\xba\x16\x4f\x2f\x0c\0\0\0", "fastText"),
        (b"\x93NUMPY\x01\0", ".npy"),
        (b"PK\x03\x04", "zip"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"BZh91AY&SY", "bzip2"),
        ("a 1 2\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_other_kinds_of_files_are_named(start: bytes, name: str) -> None:
    """A file that is often mistaken for vectors is called by its real format."""
    assert name in message(start + b" rest\n")


def test_format_must_be_known(tmp_path: Path) -> None:
    """A format that does not exist is an ArgumentError that lists those that do."""
    with pytest.raises(ArgumentError, match="'word2vec-binary'"):
        open_vectors(tmp_path / "vectors", "fasttext")


def test_word2vec_needs_its_header() -> None:
    """For a file without a header, format 'word2vec' raises an error that names GloVe."""
    assert "format='glove'" in message(b"a 1 2\n", "word2vec")
    assert "format='glove'" in message(b"a 1 2\n", "word2vec-binary")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A missing file and a folder raise the system's errors; a pipe is refused."""
    with pytest.raises(FileNotFoundError):
        open_vectors(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        open_vectors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError, match="not a regular file"):
        open_vectors(tmp_path / "pipe")


# ---- files that others wrote


@pytest.mark.parametrize(
    ("name", "format", "shape"),
    [
        ("euclidean_vectors.bin", "word2vec-binary", (2747, 10)),
        ("test_glove.txt", "glove", (76, 50)),
    ],
)
def test_files_of_gensim(name: str, format: str, shape: tuple[int, int]) -> None:
    """Files that ship with gensim are recognised and read whole."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        pytest.skip("gensim is not installed")
    source = open_vectors(Path(spec.origin).parent / "test" / "test_data" / name)
    tokens, values = read(source)
    assert source.format == format
    assert (len(tokens), source.dim) == values.shape == shape
