"""Tokens and rows: lookups, what is refused, and files that come back as they were."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pyembed.errors import ArgumentError, DTypeError, FormatError, IdError
from pyembed.storage import fs
from pyembed.words.vocab import Vocab
from tests.helpers.file_systems import Faults, Watched

INT64 = np.iinfo(np.int64)
TOKEN = st.binary(max_size=6).map(lambda token: token.replace(b"\n", b""))
TOKENS = st.lists(TOKEN, max_size=8, unique=True)


def decode(token: bytes) -> str:
    """Decode as the readers' users do."""
    return token.decode("utf-8", "surrogateescape")


# ---- lookups


def test_token_and_row_are_inverse() -> None:
    """Every token gives its row and every row its token, in the order given."""
    tokens = ["the", "", "a b", "\r", "\x85"]
    vocab = Vocab(iter(tokens))
    assert len(vocab) == 5
    assert list(vocab) == tokens
    assert [vocab[token] for token in tokens] == [0, 1, 2, 3, 4]
    assert [vocab.token(row) for row in range(5)] == tokens
    assert vocab.token(np.int64(4)) == vocab.token(np.uint8(4)) == "\x85"
    assert "" in vocab
    assert "b" not in vocab
    assert vocab.counts is None


def test_ids_are_int64_in_the_order_of_the_tokens() -> None:
    """Many tokens, repeated ones or none, become an int64 array of their rows."""
    vocab = Vocab(["the", "of", "and"])
    ids = vocab.ids(iter(["and", "the", "and"]))
    assert ids.dtype == np.int64
    assert ids.tolist() == [2, 0, 2]
    assert vocab.ids([]).shape == (0,)


def test_unknown_token_is_named_with_close_spellings() -> None:
    """A KeyError names the token, its position, and close spellings."""
    vocab = Vocab(["import", "important", "export"])
    with pytest.raises(KeyError, match=r"'imprt' is none of the 3 tokens; close.*'import'"):
        vocab["imprt"]
    with pytest.raises(KeyError, match=r"'Import' is none of the 3 tokens; close.*'import'"):
        vocab["Import"]
    with pytest.raises(KeyError, match=r"tokens\[1\] = 'zzz' is none of the 3 tokens\"$"):
        vocab.ids(["export", "zzz", "yyy"])
    with pytest.raises(KeyError, match="'' is none"):
        vocab[""]
    with pytest.raises(KeyError, match="7 is none"):
        vocab[7]  # type: ignore[index]


@pytest.mark.parametrize("row", [-1, 2, INT64.min, INT64.max, np.int64(-1)])
def test_row_outside_is_an_index_error(row: SupportsIndex) -> None:
    """A row that does not exist is refused and never counted from the end."""
    with pytest.raises(IdError, match=r"outside 0\.\.1"):
        Vocab(["a", "b"]).token(row)


@pytest.mark.parametrize("row", [True, np.True_, 1.0, np.float32(1), "1", None])
def test_row_must_be_an_integer(row: int) -> None:
    """A row of another type is refused, bool among them."""
    with pytest.raises(DTypeError, match="allowed: an integer"):
        Vocab(["a", "b"]).token(row)


def test_one_string_is_not_a_list_of_tokens() -> None:
    """A single string, which Python would iterate by letters, is refused."""
    with pytest.raises(DTypeError, match="tokens = 'abc'"):
        Vocab("abc")
    with pytest.raises(DTypeError, match="tokens = 'abc'"):
        Vocab(["abc"]).ids("abc")


# ---- what is refused


def test_duplicate_token_is_refused() -> None:
    """Two rows with one token are an ArgumentError that names both."""
    with pytest.raises(ArgumentError, match=r"tokens\[3\] = 'b' is tokens\[1\] again"):
        Vocab(["a", "b", "c", "b", "a"])


@pytest.mark.parametrize("token", ["\n", "a\n", "\nb", "a\nb"])
def test_token_with_newline_is_refused(token: str) -> None:
    """A token that vocab.txt cannot hold on one line is an ArgumentError."""
    with pytest.raises(ArgumentError, match=r"tokens\[1\] = .* contains a newline"):
        Vocab(["x", token])


@pytest.mark.parametrize("token", ["\ud800", "\ud83d\ude00", "\udcc3\udca9"])
def test_token_that_bytes_cannot_give_back_is_refused(token: str) -> None:
    """A surrogate that stands for no undecodable byte would change on disk, so it is refused."""
    with pytest.raises(ArgumentError, match=r"tokens\[1\] = .* has surrogates"):
        Vocab(["x", token, "y"])


def test_token_must_be_str() -> None:
    """Bytes are refused, and the error names the decoding that keeps them."""
    with pytest.raises(DTypeError, match=r"tokens\[1\] = b'b' is bytes.*surrogateescape"):
        Vocab(["a", b"b"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        ([1], ArgumentError, r"shape \(1,\); allowed: \(2,\)"),
        ([[1, 2]], ArgumentError, r"shape \(1, 2\)"),
        ([1, -1], ArgumentError, r"counts\[1\] = -1"),
        (np.array([0, 2**63], np.uint64), ArgumentError, r"counts\[1\] = 9223372036854775808"),
        ([1.0, 2.0], DTypeError, "float64"),
        ([True, False], DTypeError, "bool"),
    ],
)
def test_counts_are_checked(counts: ArrayLike, error: type[Exception], match: str) -> None:
    """Counts that are not one non-negative int64 for each token are refused."""
    with pytest.raises(error, match=match):
        Vocab(["a", "b"], counts)


def test_counts_are_a_read_only_copy() -> None:
    """The vocabulary copies the caller's counts."""
    mine = np.array([0, INT64.max])
    vocab = Vocab(["a", "b"], mine)
    mine[0] = 7
    assert vocab.counts is not None
    assert vocab.counts.dtype == np.int64
    assert vocab.counts.tolist() == [0, INT64.max]
    with pytest.raises(ValueError, match="read-only"):
        vocab.counts[0] = 1


# ---- files


@given(tokens=TOKENS, first=st.none() | st.integers(0, INT64.max - 8))
def test_save_and_load_round_trip(tokens: list[bytes], first: int | None) -> None:
    """Any bytes without newline are loaded as they were saved, one line each, with counts."""
    counts = None if first is None else np.arange(first, first + len(tokens), dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        Vocab(map(decode, tokens), counts).save(folder)
        assert Path(folder, "vocab.txt").read_bytes() == b"".join(t + b"\n" for t in tokens)
        assert {path.name for path in Path(folder).iterdir()} <= {"vocab.txt", "vocab.counts.npy"}
        vocab = Vocab.load(folder)
    assert [token.encode("utf-8", "surrogateescape") for token in vocab] == tokens
    assert [vocab[decode(token)] for token in tokens] == list(range(len(tokens)))
    if counts is None:
        assert vocab.counts is None
    else:
        assert vocab.counts is not None
        assert vocab.counts.tolist() == counts.tolist()


def test_counts_are_a_plain_npy(tmp_path: Path) -> None:
    """numpy alone reads the counts."""
    Vocab(["a", "b"], [3, 2]).save(tmp_path)
    assert np.load(tmp_path / "vocab.counts.npy", allow_pickle=False).tolist() == [3, 2]


def test_saving_again_replaces_counts_too(tmp_path: Path) -> None:
    """Counts of an older vocabulary are removed when tokens without counts are saved."""
    Vocab(["a", "b"], [3, 2]).save(tmp_path)
    Vocab(["c", "d"]).save(tmp_path)
    loaded = Vocab.load(tmp_path)
    assert list(loaded) == ["c", "d"]
    assert loaded.counts is None


class Dying(Watched):
    """Fails all syncs, renames and removals after the first ones."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    def act(self, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Make the call while there are some left."""
        if name in ("sync", "rename", "unlink"):
            self._left -= 1
            if self._left < 0:
                raise OSError("no space left on device")
        return make()


@pytest.mark.parametrize("step", range(9))
def test_a_crash_while_saving_leaves_one_vocabulary_or_the_other(step: int, tmp_path: Path) -> None:
    """After any system call fails, the old or the new vocabulary is loaded, never a mixture."""
    Vocab(["a", "b"], [3, 2]).save(tmp_path)
    with fs.using(Dying(step)):
        if step < 8:
            with pytest.raises(OSError, match="no space"):
                Vocab(["c", "d"], [9, 8]).save(tmp_path)
        else:
            Vocab(["c", "d"], [9, 8]).save(tmp_path)
    loaded = Vocab.load(tmp_path)
    counts = None if loaded.counts is None else loaded.counts.tolist()
    assert (list(loaded), counts) in [
        (["a", "b"], [3, 2]),
        (["a", "b"], None),
        (["c", "d"], None),
        (["c", "d"], [9, 8]),
    ]
    if step < 2:
        assert counts == [3, 2], "no file is replaced before all are written"


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """A full disk changes no file and leaves no temporary file."""
    Vocab(["a", "b"], [3, 2]).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    system = Faults()
    system.fail("sync", error=errno.ENOSPC)
    with fs.using(system), pytest.raises(OSError, match="injected"):
        Vocab(["c"], [1]).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a\nb", "line 2 has no newline"),
        (b"a", "line 1 has no newline"),
        (b"a\nb\nc\nb\n", r"line 1 is row 0: tokens\[3\] = 'b' is tokens\[1\] again"),
        (b"\n\n", r"tokens\[1\] = '' is tokens\[0\] again"),
    ],
)
def test_bad_text_is_a_format_error(content: bytes, match: str, tmp_path: Path) -> None:
    """A vocab.txt that is cut off or repeats a token names the place."""
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(FormatError, match=match):
        Vocab.load(tmp_path)


def npy(array: NDArray[Any]) -> bytes:
    """The bytes of a .npy file."""
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = npy(np.array([3, 2]))
BAD_COUNTS = {
    "empty": (b"", "not an .npy file"),
    "no magic": (b"x" * 200, "not an .npy file"),
    "other version": (GOOD[:6] + b"\x02" + GOOD[7:], r"not an .npy file"),
    "cut header": (GOOD[:50], "not an .npy file"),
    "broken header": (GOOD.replace(b"{", b"(", 1), "not an .npy file"),
    "cut": (GOOD[:-1], "15 bytes of counts; its header allows 16"),
    "surplus": (GOOD + b"\0", "17 bytes of counts; its header allows 16"),
    "another length": (npy(np.array([3, 2, 1])), r"shape \(3,\); allowed: int64 of shape \(2,\)"),
    "huge length": (GOOD.replace(b"(2,)", b"(9000000000000000,)"), "shape"),
    "another dtype": (npy(np.array([3.0, 2.0])), "float64"),
    "another byte order": (npy(np.array([3, 2], ">i8")), "holds >i8"),
    "objects": (npy(np.array([3, None])), "holds object"),
    "negative": (npy(np.array([3, -2])), r"counts\[1\] = -2 is outside"),
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_bad_counts_are_a_format_error(name: str, tmp_path: Path) -> None:
    """Counts that do not belong to the tokens are refused and nothing is unpickled."""
    content, match = BAD_COUNTS[name]
    (tmp_path / "vocab.txt").write_bytes(b"a\nb\n")
    (tmp_path / "vocab.counts.npy").write_bytes(content)
    with pytest.raises(FormatError, match=match):
        Vocab.load(tmp_path)


def test_missing_files_are_the_systems_own_errors(tmp_path: Path) -> None:
    """A folder without a vocabulary, and no folder at all, are FileNotFoundError."""
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt"):
        Vocab.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Vocab(["a"]).save(tmp_path / "missing")
