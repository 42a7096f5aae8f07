"""Text to token ids: finds the files of a corpus, splits them into words and counts them, in fixed memory.

A corpus is read once. Every word gets a provisional id when it is first seen, and the ids go to a file of int32 with
`LINE_END` after each line. Once all counts are known, `choose_vocabulary` maps provisional ids to rows, most frequent first. So
memory grows with the number of different words and not with the length of the text, and later passes read 4 bytes a word.

A word is a letter or underscore and what follows it of letters, digits and underscores; case is kept. So identifiers
of source code stay whole, and numbers, signs and the letter of an escape such as ``\\n`` are no words. A sentence is a line.

Not done here: other encodings than UTF-8, markup, stemming, and any guess about a file that cannot be read (`CorpusError`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pyembed.errors import ArgumentError, CorpusError

StrPath = str | os.PathLike[str]
EncodingErrors = Literal["strict", "replace"]
SUFFIXES = (".txt", ".py", ".rst", ".md")
LINE_END = 0  # the provisional id of "\n"
ROW_DROPPED, ROW_LINE_END = -1, -2  # in place of a row, where a token has none

_TOKEN = re.compile(r"\n|(?<![\w\\])[^\W\d]\w*")
_PIECE_BYTES = 1 << 20
_LONGEST_WORD_BYTES = 1 << 24  # a text without line end or space for this long is no text


@dataclass(frozen=True)
class EncodedCorpus:
    """A corpus as a file of provisional ids.

    Attributes
    ----------
    path : Path
        Raw int32 ids in the machine's byte order, `LINE_END` after each line.
    types : list of str
        The word of each provisional id; ``types[LINE_END]`` is ``"\\n"``.
    counts : ndarray of int64, shape (len(types),)
        Occurrences of each provisional id.
    words : int
        All occurrences of words, line ends not counted.
    files : int
        Files read.
    """

    path: Path
    types: list[str]
    counts: npt.NDArray[np.int64]
    words: int
    files: int

    def blocks(self, size: int) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the ids in order, `size` at a time."""
        with self.path.open("rb") as file:
            while len(block := np.fromfile(file, np.int32, size)):
                yield block


def tokenize(text: str) -> list[str]:
    """Split text into words, with ``"\\n"`` for each line end.

    Examples
    --------
    >>> tokenize("x1 = read(0xFF)\\nself._go")
    ['x1', 'read', '\\n', 'self', '_go']
    """
    return _TOKEN.findall(text)


def find_files(
    paths: Sequence[StrPath], suffixes: Sequence[str] = SUFFIXES, exclude: Sequence[str] = ()
) -> list[Path]:
    """List the files of a corpus in a fixed order.

    Parameters
    ----------
    paths : sequence of path-like
        Files, which are taken as they are, and folders, which are searched recursively without following links to folders.
    suffixes : sequence of str
        Endings of the file names that are taken from a folder.
    exclude : sequence of str
        Shell patterns. Inside a folder, a file or folder is left out when a pattern matches its name or its path
        relative to that folder (with ``/``).

    Returns
    -------
    list of Path
        Files in the order of `paths`, sorted within a folder.

    Raises
    ------
    CorpusError
        A path does not exist, a folder cannot be listed, or nothing was found.
    """
    if isinstance(paths, str | os.PathLike):
        raise ArgumentError(f"paths is the single path {os.fspath(paths)!r}; give a list of paths")
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found.extend(_walk(path, tuple(suffixes), exclude))
        elif path.exists():
            found.append(path)
        else:
            raise CorpusError(f"there is no file or folder {str(path)!r}")
    if not found:
        where = ", ".join(repr(os.fspath(path)) for path in paths) or "no path"
        raise CorpusError(
            f"no text file was found in {where}: from a folder, files ending in {' '.join(suffixes)}"
            " are taken (see --suffix and --exclude); a file given by name is always read"
        )
    return found


def _walk(root: Path, suffixes: tuple[str, ...], exclude: Sequence[str]) -> Iterator[Path]:
    """Yield the wanted regular files under `root`, names sorted in each folder."""

    def unreadable(error: OSError) -> None:
        raise CorpusError(f"cannot list {error.filename!r}: {error.strerror}") from error

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
    """Yield the text of a UTF-8 file in pieces of about a mebibyte that end at a line end, or else at a space.

    Raises
    ------
    CorpusError
        The file cannot be read, or (``"strict"``) is not UTF-8; the message names file, byte and remedy.
    """
    offset = 0
    for piece in _byte_pieces(path):
        try:
            yield piece.decode("utf-8", encoding_errors)
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{os.fspath(path)!r} is not UTF-8: byte {piece[error.start]:#04x} at offset"
                f" {offset + error.start} ({error.reason}); convert the file, leave it out with --exclude,"
                " or read such bytes as U+FFFD with --encoding-errors replace"
            ) from error
        offset += len(piece)


def _byte_pieces(path: StrPath) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces that end where a word cannot go on: after 0x0A or, in a long line, 0x20."""
    rest = b""
    try:
        with open(path, "rb") as file:
            while block := file.read(_PIECE_BYTES):
                data = rest + block
                cut = data.rfind(b"\n") + 1 or data.rfind(b" ") + 1
                if cut:
                    yield data[:cut]
                elif len(data) > _LONGEST_WORD_BYTES:
                    raise CorpusError(
                        f"{os.fspath(path)!r} has {len(data)} bytes without a line end or a space:"
                        " this is no text; leave it out with --exclude"
                    )
                rest = data[cut:]
    except CorpusError:
        raise
    except OSError as error:
        raise CorpusError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error
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
        Invalid UTF-8 is an error, or is read as U+FFFD, which is no part of a word.
    progress : bool, optional
        Show a bar on stderr; None: when that is a terminal.

    Raises
    ------
    CorpusError
        A file cannot be read or decoded, or no file holds a word.
    """
    if encoding_errors not in ("strict", "replace"):
        raise ArgumentError(
            f"encoding_errors = {encoding_errors!r} is neither 'strict' nor 'replace'"
        )
    new_id = itertools.count()
    ids: defaultdict[str, int] = defaultdict(new_id.__next__)
    ids["\n"]  # the first id: LINE_END
    counts = np.zeros(1, np.int64)
    line_end = np.array([LINE_END], np.int32)
    bar = tqdm(files, "reading", unit="file", disable=None if progress is None else not progress, leave=False)
    with open(output, "wb") as out, bar:
        for path in bar:
            for text in read_pieces(path, encoding_errors):
                tokens = tokenize(text)
                block = np.fromiter(map(ids.__getitem__, tokens), np.int32, len(tokens))
                counts = _add(counts, np.bincount(block, minlength=len(ids)))
                block.tofile(out)
            line_end.tofile(out)
    words = int(counts[LINE_END + 1 :].sum())
    if words == 0:
        raise CorpusError(
            f"no word was found in {len(files)} file(s), the first being {os.fspath(files[0])!r}"
        )
    return EncodedCorpus(Path(output), list(ids), counts, words, len(files))


def _add(total: npt.NDArray[np.int64], more: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    """Sum of two counts where the second may know more words."""
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
        `min_count` is not positive or leaves less than two words.
    """
    if min_count < 1:
        raise ArgumentError(f"min_count = {min_count} is outside 1 and up")
    frequent = np.flatnonzero(corpus.counts >= min_count)
    frequent = frequent[frequent != LINE_END]
    if len(frequent) < 2:
        raise ArgumentError(
            f"min_count = {min_count} leaves {len(frequent)} of the {len(corpus.types) - 1} words of the corpus;"
            " at least 2 are needed: give more text or a smaller min_count"
        )
    chosen = np.array(
        sorted(frequent.tolist(), key=lambda i: (-corpus.counts[i], corpus.types[i])), np.int64
    )
    row_of = np.full(len(corpus.types), ROW_DROPPED, np.int32)
    row_of[chosen] = np.arange(len(chosen), dtype=np.int32)
    row_of[LINE_END] = ROW_LINE_END
    return chosen, row_of
