"""Text to ids: which files are read, what a word is, what is refused, and the vocabulary."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed.errors import ArgumentError, CorpusError
from pyembed.train import corpus
from pyembed.train.corpus import (
    LINE_END,
    ROW_DROPPED,
    ROW_LINE_END,
    EncodedCorpus,
    choose_vocabulary,
    encode_corpus,
    find_files,
    name_paths,
    read_blocks,
    read_pieces,
    rewrite_as_rows,
    tokenize,
)


def write(path: Path, data: str | bytes) -> Path:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def encode(tmp_path: Path, *texts: str | bytes) -> EncodedCorpus:
    """Encode each text as a file of its own."""
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(texts)]
    return encode_corpus(files, tmp_path / "ids")


def words_of(encoded: EncodedCorpus, size: int = 1 << 20) -> list[str]:
    """Read the ids back as words."""
    return [encoded.types[i] for block in read_blocks(encoded.path, size) for i in block]


# ---- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("self.read(n)", ["self", "read", "n"]),
        ("__init__ _x HTTPError utf_16", ["__init__", "_x", "HTTPError", "utf_16"]),
        ("1 23 4.5e6 0xFF 1_000 2x", []),
        (r"'a\nb' \\tail", ["a"]),
        ("Straße naïve 日本語 x²", ["Straße", "naïve", "日本語", "x²"]),
        ("a\n\nb\r\nc", ["a", "\n", "\n", "b", "\n", "c"]),
        ("\ufeffa\u00a0b\u2028c\x00d", ["a", "b", "c", "d"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    """Identifiers stay whole with their case; numbers, signs and escapes are no words."""
    assert tokenize(text) == words


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("हिन्दी में किताबें पढ़ते हैं", id="Hindi"),
        pytest.param("বাংলা ভাষায় কবিতা", id="Bengali"),
        pytest.param("தமிழ் மொழி புத்தகம்", id="Tamil"),
        pytest.param("తెలుగు భాష", id="Telugu"),
        pytest.param("ภาษาไทย ที่ นี่", id="Thai"),
        pytest.param("שָׁלוֹם עוֹלָם", id="pointed Hebrew"),
        pytest.param("كِتَابٌ مَدْرَسَةٌ", id="vowelled Arabic"),
        pytest.param("می\u200cخواهم کتاب\u200cها", id="Persian with joiners"),
        pytest.param(unicodedata.normalize("NFD", "tiếng việt nước élève"), id="decomposed"),
        pytest.param("\U00011013\U00011038 \U00011013", id="Brahmi, beyond 16 bits"),
    ],
)
def test_a_word_keeps_its_marks(text: str) -> None:
    """Vowel signs, points, accents and joiners are parts of a word, and never cut it."""
    assert tokenize(text) == text.split()
    assert tokenize(text.replace(" ", ", ")) == text.split()


def test_every_mark_is_a_part_of_a_word() -> None:
    """No combining mark of Unicode cuts a word, but for variation selectors beyond 17 bits."""
    marks = [c for c in map(chr, range(0x1F000)) if unicodedata.category(c)[0] == "M"]
    assert len(marks) > 2000
    assert [c for c in marks if tokenize(f"x{c}y {c}z 1{c}z") != [f"x{c}y"]] == []


# ---- files


def test_folder_gives_files_of_a_suffix_in_a_fixed_order(tmp_path: Path) -> None:
    """A folder is searched recursively for regular files of the suffixes, names sorted."""
    for name in ["b.txt", "a.py", "c.bin", "sub/z.rst", "sub/deep/y.md", "txt", "d.txt/e.txt"]:
        write(tmp_path / name, "x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["a.py", "b.txt", "d.txt/e.txt", "sub/z.rst", "sub/deep/y.md"]
    assert find_files([tmp_path], suffixes=[".bin"]) == [tmp_path / "c.bin"]


def test_excluded_names_and_paths(tmp_path: Path) -> None:
    """A pattern leaves out files and whole folders, by name or by path within the folder."""
    for name in ["a.txt", "skip/b.txt", "in/skip/c.txt", "in/d.txt", "in/bad_1.txt"]:
        write(tmp_path / name, "x")
    found = find_files([tmp_path], exclude=["skip", "bad_*"])
    assert found == [tmp_path / "a.txt", tmp_path / "in" / "d.txt"]
    assert tmp_path / "in" / "d.txt" not in find_files([tmp_path], exclude=["in/d.*"])


def test_file_by_name_is_always_taken(tmp_path: Path) -> None:
    """A file that is given by name is read whatever its suffix, in the given order."""
    data, text = write(tmp_path / "data.bin", "x"), write(tmp_path / "a.txt", "x")
    assert find_files([text, str(data)], exclude=["*"]) == [text, data]


def test_missing_and_empty_places(tmp_path: Path) -> None:
    """A path that does not exist, and a folder without texts, are errors that name it."""
    with pytest.raises(CorpusError, match=r"nowhere: there is no such file or folder"):
        find_files([tmp_path / "nowhere"])
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"no such file"):
        find_files([tmp_path / "dangling.txt"])
    with pytest.raises(CorpusError, match=r"no text was found in .*\.txt \.py"):
        find_files([tmp_path])
    with pytest.raises(CorpusError, match=r"no text was found in no path"):
        find_files([])
    with pytest.raises(ArgumentError, match="allowed: a list of paths"):
        find_files("text.txt")


# ---- reading


def test_unreadable_file(tmp_path: Path) -> None:
    """A file that cannot be read is an error with its name and the system's reason."""
    with pytest.raises(CorpusError, match=r"gone\.txt: cannot be read \(No such file") as caught:
        list(read_pieces(tmp_path / "gone.txt"))
    assert isinstance(caught.value, OSError)
    with pytest.raises(CorpusError, match=r"cannot be read \(Is a directory\)"):
        list(read_pieces(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_folder_without_permission(tmp_path: Path) -> None:
    """A folder that cannot be listed is an error and not an empty folder."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        with pytest.raises(CorpusError, match=r"closed: cannot be listed \(Permission"):
            find_files([tmp_path])
    finally:
        closed.chmod(0o700)


@pytest.mark.parametrize("piece", [1, 4, 1 << 20])
def test_invalid_utf8_names_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Bytes that are not UTF-8 are an error with file, value, offset and remedy."""
    monkeypatch.setattr(corpus, "_PIECE_BYTES", piece)
    path = write(tmp_path / "latin.txt", b"caf\xc3\xa9\nna\xefve x\n")
    with pytest.raises(
        CorpusError, match=r"latin\.txt: byte 0xef at offset 8 .*--encoding-errors replace"
    ):
        list(read_pieces(path))


def test_invalid_utf8_replaced(tmp_path: Path) -> None:
    """With "replace" such a byte ends a word, and nothing else changes."""
    path = write(tmp_path / "latin.txt", b"na\xefve caf\xc3\xa9\n")
    encoded = encode_corpus([path], tmp_path / "ids", encoding_errors="replace")
    assert words_of(encoded) == ["na", "ve", "café", "\n", "\n"]
    with pytest.raises(ArgumentError, match="'ignore'; allowed: 'strict', 'replace'"):
        encode_corpus([path], tmp_path / "ids", encoding_errors="ignore")  # type: ignore[arg-type]


@given(st.lists(st.text(alphabet="aé日\n ._\\", max_size=12), max_size=6), st.integers(1, 40))
def test_pieces_do_not_change_words(tmp_path: Path, texts: list[str], piece: int) -> None:
    """The pieces of a file do not change its text and words."""
    text = "".join(texts)
    path = write(tmp_path / "t.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_PIECE_BYTES", piece)
        pieces = list(read_pieces(path))
    assert "".join(pieces) == text
    assert [word for part in pieces for word in tokenize(part)] == tokenize(text)


def test_file_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded: bytes without any line end or space are refused."""
    monkeypatch.setattr(corpus, "_PIECE_BYTES", 8)
    monkeypatch.setattr(corpus, "_LONGEST_WORD_BYTES", 16)
    path = write(tmp_path / "t.txt", b"a" * 100)
    with pytest.raises(CorpusError, match=r"t\.txt: 24 bytes without a line end or a space"):
        list(read_pieces(path))


# ---- ids and counts


def test_ids_and_counts_are_those_of_the_text(tmp_path: Path) -> None:
    """The ids are those of the text, and the counts those of its words and lines."""
    encoded = encode(tmp_path, "b a b\nc", "a\n")
    expected = ["b", "a", "b", "\n", "c", "\n", "a", "\n", "\n"]
    assert words_of(encoded) == expected
    assert words_of(encoded, size=2) == expected
    assert dict(zip(encoded.types, encoded.counts.tolist(), strict=True)) == Counter(expected)
    assert encoded.types[LINE_END] == "\n"
    assert (encoded.words, encoded.files) == (5, 2)
    assert encoded.path.stat().st_size == 4 * len(expected)


@pytest.mark.parametrize("text", ["", "\n\n", "12 + 34\n"])
def test_corpus_without_words(tmp_path: Path, text: str) -> None:
    """A corpus without a word is an error that names a file."""
    with pytest.raises(CorpusError, match=r"no word in 1 file\(s\), of which .*0\.txt"):
        encode(tmp_path, text)


def test_vocabulary_is_ordered_by_count_and_name(tmp_path: Path) -> None:
    """Rows are ordered by count, then by name; rare words and line ends have none."""
    encoded = encode(tmp_path, "z y y x x w w w rare")
    chosen, row_of = choose_vocabulary(encoded, min_count=2)
    assert [encoded.types[i] for i in chosen] == ["w", "x", "y"]
    rows = {word: row_of[i] for i, word in enumerate(encoded.types)}
    assert rows == {
        "w": 0, "x": 1, "y": 2, "z": ROW_DROPPED, "rare": ROW_DROPPED, "\n": ROW_LINE_END
    }  # fmt: skip
    assert np.array_equal(row_of[chosen], np.arange(3))


def test_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    """A min_count that leaves less than two words is an error with both numbers."""
    encoded = encode(tmp_path, "a a a b")
    with pytest.raises(ArgumentError, match="min_count = 2 leaves 1 of 2 different words"):
        choose_vocabulary(encoded, 2)
    with pytest.raises(ArgumentError, match="min_count = 0; allowed: 1 or more"):
        choose_vocabulary(encoded, 0)


# ---- rows


@given(st.integers(1, 9), st.integers(1, 9))
def test_text_as_rows(tmp_path: Path, size: int, read: int) -> None:
    """The file then has the rows of the text in order, without dropped words."""
    encoded = encode(tmp_path, "z y y x\nrare x w w", "w x y\n\n")
    _, row_of = choose_vocabulary(encoded, min_count=2)
    expected = [row_of[i] for block in read_blocks(encoded.path, 99) for i in block]
    expected = [int(row) for row in expected if row != ROW_DROPPED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_REWRITE_WORDS", size)
        assert rewrite_as_rows(encoded, row_of) == len(expected) == 14
    blocks = list(read_blocks(encoded.path, read))
    assert np.concatenate(blocks).tolist() == expected
    for first in range(len(blocks) + 2):
        again = list(read_blocks(encoded.path, read, first))
        assert all(map(np.array_equal, again, blocks[first:]))
        assert len(again) == max(len(blocks) - first, 0)


def test_names_of_paths() -> None:
    """Other paths, or another order, give another name; str and Path give the same."""
    lists = [["a", "b"], ["b", "a"], ["ab"], ["a"], ["a\nb"], ["a", "b", ""], []]
    assert len({name_paths(paths) for paths in lists}) == len(lists)
    assert name_paths([Path("a"), Path("b")]) == name_paths(lists[0])
    with pytest.raises(ArgumentError, match="allowed: a list of paths"):
        name_paths("text.txt")
