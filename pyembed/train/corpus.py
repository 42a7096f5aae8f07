"""Text to token ids: find the files of a corpus, split them into words and count the words.

A corpus is read once. Every word gets a provisional id when it is first seen, and the ids go to a
file of int32 with `LINE_END` after each line. Once all counts are known, `choose_vocabulary` maps
provisional ids to rows, most frequent first, and `rewrite_as_rows` replaces the ids in the file.
Therefore memory grows with the number of different words and not with the length of the text, and
a later pass reads 4 bytes a word.

A word is a letter or underscore followed by letters, digits, underscores, combining marks and
joiners; case is kept. Identifiers of source code stay whole, and numbers, signs and escapes such as
``\\n`` are not words. A sentence is a line. In a script without spaces between words, such as
Chinese or Thai, everything between two spaces or signs is one word: segment such a text first.

This module does not read encodings other than UTF-8, interpret markup, stem words, or guess the
content of a file that cannot be read.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError, CorpusError
from pyembed.storage import fs as disk

StrPath = str | os.PathLike[str]
EncodingErrors = Literal["strict", "replace"]
SUFFIXES = (".txt", ".py", ".rst", ".md")
LINE_END = 0  # the provisional id of "\n"
ROW_DROPPED, ROW_LINE_END = -1, -2  # tokens without a row

_MARKS_END = 0x1F000  # combining marks beyond it are variation selectors of emoji and ideographs
_PIECE_BYTES = 1 << 20
_REWRITE_WORDS = 1 << 18
_LONGEST_WORD_BYTES = 1 << 24  # a file without line end or space for this long is not text


@dataclass(frozen=True)
class EncodedCorpus:
    """A corpus as a file of provisional ids.

    Attributes
    ----------
    path : Path
        The file: int32 ids in the machine's byte order, with `LINE_END` after each line.
    types : list of str
        The word of each provisional id; ``types[LINE_END]`` is ``"\\n"``.
    counts : ndarray of int64, shape (len(types),)
        How often each provisional id occurs.
    words : int
        The length of the text in words, without line ends.
    files : int
        The number of files read.
    """

    path: Path
    types: list[str]
    counts: npt.NDArray[np.int64]
    words: int
    files: int


def tokenize(text: str) -> list[str]:
    """Split text into words, with ``"\\n"`` for each line end.

    Examples
    --------
    >>> tokenize("x1 = read(0xFF)\\nself._go")
    ['x1', 'read', '\\n', 'self', '_go']
    """
    return _pattern().findall(text)


@functools.cache
def _pattern() -> re.Pattern[str]:
    """The pattern of a token; ``\\w`` alone has no combining mark and cuts words at vowel signs."""
    characters = map(chr, range(_MARKS_END))
    marks = "".join(c for c in characters if unicodedata.category(c).startswith("M"))
    marks = f"[\u200c\u200d{marks}]"  # U+200C and U+200D join letters
    # A class of so many ranges is slow, so it is kept from characters of Latin text and signs.
    begin = rf"(?<![\w\\])[^\W\d](?:(?<=[\0-\u02ff].)|(?<!{marks}.))"
    return re.compile(rf"\n|{begin}\w*(?:(?![\0-\u02ff]){marks}+\w*)*")


def find_files(
    paths: Sequence[StrPath], suffixes: Sequence[str] = SUFFIXES, exclude: Sequence[str] = ()
) -> list[Path]:
    """List the files of a corpus in a fixed order.

    Parameters
    ----------
    paths : sequence of path-like
        Files, which are always read, and folders, which are searched recursively; links to
        folders are not followed.
    suffixes : sequence of str
        The suffixes of the files that are read from a folder.
    exclude : sequence of str
        Shell patterns. A file or folder in a folder of `paths` is left out if a pattern matches
        its name, or its path relative to that folder (with ``/``).

    Returns
    -------
    list of Path
        Files in the order of `paths`, sorted within a folder.

    Raises
    ------
    CorpusError
        If a path does not exist, a folder cannot be listed, or no file was found.
    """
    found: list[Path] = []
    for path in map(Path, _listed(paths)):
        if path.is_dir():
            found.extend(_walk(path, tuple(suffixes), exclude))
        elif path.exists():
            found.append(path)
        else:
            raise CorpusError(f"{path}: there is no such file or folder")
    if not found:
        where = ", ".join(repr(os.fspath(path)) for path in paths) or "no path"
        raise CorpusError(
            f"no text was found in {where}; of a folder, files are read that end in "
            f"{' '.join(suffixes)} and are not excluded. Give --suffix, or files by name"
        )
    return found


def name_paths(paths: Sequence[StrPath]) -> str:
    """A short name for a list of paths; another list has another name.

    Examples
    --------
    >>> name_paths(["books", "notes.txt"])
    '2 paths, 6ca7f7be'
    """
    names = [os.fspath(path) for path in _listed(paths)]
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    return f"{len(names)} paths, {digest.hexdigest()[:8]}"


def _listed(paths: Sequence[StrPath]) -> Sequence[StrPath]:
    if isinstance(paths, str | os.PathLike):
        raise ArgumentError(f"paths = {os.fspath(paths)!r}; allowed: a list of paths")
    return paths


def _walk(root: Path, suffixes: tuple[str, ...], exclude: Sequence[str]) -> Iterator[Path]:
    """Yield the wanted regular files under `root`, names sorted in each folder."""

    def unreadable(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        base = Path(folder).relative_to(root)
        subfolders[:] = sorted(name for name in subfolders if not _matches(base / name, exclude))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(suffixes) and not _matches(base / name, exclude) and path.is_file():
                yield path


def _matches(relative: Path, patterns: Sequence[str]) -> bool:
    return any(
        fnmatchcase(relative.name, pattern) or fnmatchcase(relative.as_posix(), pattern)
        for pattern in patterns
    )


def read_pieces(path: StrPath, encoding_errors: EncodingErrors = "strict") -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces of about a mebibyte.

    A piece ends at a line end; in a line longer than that, at a space.

    Raises
    ------
    CorpusError
        If the file cannot be read, or with ``"strict"`` is not UTF-8; the message names the byte.
    """
    offset = 0
    for piece in _byte_pieces(path):
        try:
            yield piece.decode("utf-8", encoding_errors)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path}: byte {piece[error.start]:#04x} at offset {offset + error.start} is not "
                f"UTF-8 ({error.reason}); convert the file, leave it out with --exclude, or ignore "
                "such bytes with --encoding-errors replace"
            ) from error
        offset += len(piece)


def _byte_pieces(path: StrPath) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces that end after 0x0A or, in a long line, after 0x20."""
    rest = b""
    try:
        with Path(path).open("rb") as file:
            while block := file.read(_PIECE_BYTES):
                data = rest + block
                cut = data.rfind(b"\n") + 1 or data.rfind(b" ") + 1
                if cut:
                    yield data[:cut]
                elif len(data) > _LONGEST_WORD_BYTES:
                    raise CorpusError(
                        f"{path}: {len(data)} bytes without a line end or a space; this is "
                        "not text, leave it out with --exclude"
                    )
                rest = data[cut:]
    except CorpusError:
        raise
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error
    if rest:
        yield rest


def encode_corpus(
    files: Sequence[StrPath],
    output: StrPath,
    *,
    encoding_errors: EncodingErrors = "strict",
    progress: bool | None = False,
) -> EncodedCorpus:
    """Tokenise and count files, and write their provisional ids to `output`.

    Parameters
    ----------
    files : sequence of path-like
        Text files, from `find_files`.
    output : path-like
        The file of ids to write.
    encoding_errors : {"strict", "replace"}
        Whether invalid UTF-8 is an error, or is read as U+FFFD, which is not part of a word.
    progress : bool or None
        Whether a bar is drawn on stderr; None draws it if stderr is a terminal.

    Raises
    ------
    CorpusError
        If a file cannot be read or decoded, or no file has a word.
    """
    if encoding_errors not in ("strict", "replace"):
        raise ArgumentError(f"encoding_errors = {encoding_errors!r}; allowed: 'strict', 'replace'")
    new_id = itertools.count()
    ids: defaultdict[str, int] = defaultdict(new_id.__next__)
    ids["\n"]  # the first id: LINE_END
    counts = np.zeros(1, np.int64)
    line_end = np.array([LINE_END], np.int32)
    bar = progress_bar("reading", len(files), "file", progress)
    with Path(output).open("wb") as out, bar:
        for path in files:
            for text in read_pieces(path, encoding_errors):
                tokens = tokenize(text)
                block = np.fromiter(map(ids.__getitem__, tokens), np.int32, len(tokens))
                counts = _add(counts, np.bincount(block, minlength=len(ids)))
                block.tofile(out)
            line_end.tofile(out)
            counts[LINE_END] += 1
            bar.update()
    words = int(counts[LINE_END + 1 :].sum())
    if words == 0:
        raise CorpusError(f"no word in {len(files)} file(s), of which {files[0]} is the first")
    return EncodedCorpus(Path(output), list(ids), counts, words, len(files))


def _add(total: npt.NDArray[np.int64], more: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    """Add two arrays of counts, of which the second may be longer."""
    if len(more) > len(total):
        total = np.concatenate([total, np.zeros(len(more) - len(total), np.int64)])
    return total + more


def choose_vocabulary(
    corpus: EncodedCorpus, min_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Choose the words that occur at least `min_count` times and order them, most frequent first.

    Returns
    -------
    chosen : ndarray of int64, shape (size,)
        Provisional id of each row; equal counts are in alphabetical order.
    row_of : ndarray of int32, shape (len(corpus.types),)
        Row of each provisional id; `ROW_DROPPED` for a word not chosen, `ROW_LINE_END`.

    Raises
    ------
    ArgumentError
        If `min_count` is not positive or leaves less than two words.
    """
    if min_count < 1:
        raise ArgumentError(f"min_count = {min_count}; allowed: 1 or more")
    frequent = np.flatnonzero(corpus.counts >= min_count)
    frequent = frequent[frequent != LINE_END]
    if len(frequent) < 2:
        raise ArgumentError(
            f"min_count = {min_count} leaves {len(frequent)} of {len(corpus.types) - 1} different "
            "words; 2 or more are needed. Give more text, or a smaller min_count"
        )
    chosen = np.array(
        sorted(frequent.tolist(), key=lambda i: (-corpus.counts[i], corpus.types[i])), np.int64
    )
    row_of = np.full(len(corpus.types), ROW_DROPPED, np.int32)
    row_of[chosen] = np.arange(len(chosen), dtype=np.int32)
    row_of[LINE_END] = ROW_LINE_END
    return chosen, row_of


def read_blocks(path: StrPath, size: int, first: int = 0) -> Iterator[npt.NDArray[np.int32]]:
    """Yield a file of int32 in order, `size` at a time, from block number `first`."""
    with Path(path).open("rb") as file:
        file.seek(first * size * np.dtype(np.int32).itemsize)
        while len(block := np.fromfile(file, np.int32, size)):
            yield block


def rewrite_as_rows(corpus: EncodedCorpus, row_of: npt.NDArray[np.int32]) -> int:
    """Turn the provisional ids of a corpus into rows, in its file, and sync it.

    Words without a row are left out; the end of a line becomes `ROW_LINE_END`.

    Parameters
    ----------
    corpus : EncodedCorpus
        Its file has rows afterwards.
    row_of : ndarray of int32, shape (len(corpus.types),)
        The row of each provisional id, from `choose_vocabulary`.

    Returns
    -------
    int
        The number of int32 in the file afterwards.
    """
    kept = 0
    with corpus.path.open("r+b") as out:
        for block in read_blocks(corpus.path, _REWRITE_WORDS):  # reading stays ahead of writing
            rows = row_of[block]
            rows = rows[rows != ROW_DROPPED]
            rows.tofile(out)
            kept += len(rows)
        out.truncate()
        out.flush()
        disk.sync(out.fileno())
    return kept
