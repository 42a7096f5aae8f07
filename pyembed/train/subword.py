"""Words as sums of parts: hashed character n-grams as in fastText, and vectors composed of them.

The input table has a row for each word of the vocabulary, then `buckets` rows that all n-grams
share: the row of an n-gram is vocabulary size + hash % buckets. The n-grams of a word are those of
``<word>`` by code point, except ``<`` and ``>`` alone. The hash is fastText's: 32-bit FNV-1a of the
UTF-8 bytes, each sign-extended first.

The vector of a word is OWN_SHARE times its own row plus (1 - OWN_SHARE) times the mean of its
n-gram rows; that of an unknown word is the mean of its n-gram rows. fastText takes the plain mean
of all. With Adagrad every part moves by about the same step, so in a plain mean the thirty n-grams
of a word outweigh its own row, and the nearest words are those with a similar spelling.

The layout of a batch is part-major: words sorted by their number of parts, most first, then every
word's first part, every word's second part, and so on. The sum over the parts of all words is then
a few dozen additions of contiguous blocks, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyembed.errors import ArgumentError
from pyembed.table import Table

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

# Chosen on the source of Python's standard library: for 170 names with a known family (string
# methods, exceptions, months, ...), the share of the five nearest words in the same family was
# 0.19, 0.30, 0.33, 0.34 with a share of 0.03 (a plain mean), 0.5, 0.8, 0.95; without n-grams 0.33.
OWN_SHARE = 0.8

_FNV_BASIS = np.uint32(2166136261)
_FNV_PRIME = np.uint32(16777619)
_WORDS_AT_ONCE = 1 << 11  # bounds the temporary arrays of hashing and composing


def ngram_hashes(words: Sequence[str], minn: int, maxn: int) -> tuple[npt.NDArray[np.uint32], I64]:
    """Hash the character n-grams of words.

    Returns
    -------
    hashes : ndarray of uint32, shape (n,)
        FNV-1a of every n-gram, word after word; an n-gram that a word has twice is repeated, as
        in fastText.
    starts : ndarray of int64, shape (len(words) + 1,)
        The n-grams of ``words[i]`` are ``hashes[starts[i]:starts[i + 1]]``.

    Examples
    --------
    >>> hashes, starts = ngram_hashes(["ab"], 3, 3)  # <ab and ab>
    >>> [f"{h:08x}" for h in hashes]
    ['489c66e4', '65485f1c']
    """
    text = np.frombuffer("".join(f"<{word}>" for word in words).encode(), np.uint8)
    signed = text.view(np.int8).astype(np.int32).view(np.uint32)
    char_start = np.append(np.flatnonzero((text & 0xC0) != 0x80), len(text))
    lengths = np.array([len(word) + 2 for word in words], np.int64)
    ends = np.cumsum(lengths)
    word_of = np.repeat(np.arange(len(words)), lengths)
    char_end = ends[word_of]  # for each character, the start of the next word
    char = np.arange(len(word_of))
    found, owners = [], []
    for n in range(minn, maxn + 1):
        inside = char + n <= char_end
        if n == 1:
            inside &= (char + 1 < char_end) & (char > (ends - lengths)[word_of])
        first = char[inside]
        found.append(_fnv1a(signed, char_start[first], char_start[first + n]))
        owners.append(word_of[first])
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return np.concatenate(found)[order], _starts(np.bincount(owner, minlength=len(words)))


def _fnv1a(signed: npt.NDArray[np.uint32], begin: I64, end: I64) -> npt.NDArray[np.uint32]:
    """Hash many ranges of bytes at once: round j uses byte j of every range that has one."""
    hashes = np.full(len(begin), _FNV_BASIS)
    for j in range(int((end - begin).max(initial=0))):
        longer = begin + j < end
        hashes[longer] = (hashes[longer] ^ signed[begin[longer] + j]) * _FNV_PRIME
    return hashes


def _starts(counts: npt.NDArray[np.intp]) -> I64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of words: their lengths, and how many rows they share; ``buckets=0``: none.

    Raises
    ------
    ArgumentError
        If the settings contradict each other.
    """

    minn: int
    maxn: int
    buckets: int

    def __post_init__(self) -> None:
        if not 0 <= self.buckets < 2**32:
            raise ArgumentError(f"buckets = {self.buckets}; allowed: 0 (no n-grams) .. 2^32-1")
        if self.buckets and not 1 <= self.minn <= self.maxn:
            raise ArgumentError(
                f"minn = {self.minn}, maxn = {self.maxn}; allowed: 1 <= minn <= maxn"
            )

    def rows(self, words: Sequence[str], vocabulary: int) -> tuple[I64, I64]:
        """The rows of the n-grams of words, word after word, and the start of each word."""
        if self.buckets == 0:
            return np.zeros(0, np.int64), np.zeros(len(words) + 1, np.int64)
        hashes, starts = ngram_hashes(words, self.minn, self.maxn)
        return vocabulary + (hashes % np.uint32(self.buckets)).astype(np.int64), starts


@dataclass(frozen=True)
class Parts:
    """The rows that make up the vector of each word: its own row first, then its n-gram rows.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Rows of the input table, word after word.
    starts : ndarray of int64, shape (words + 1,)
        The parts of word ``i`` are ``rows[starts[i]:starts[i + 1]]``; every word has one or more.
    own_share : float or None
        The weight of the first part of a word that has others, which share the rest evenly; None
        weighs all parts evenly.
    """

    rows: I64
    starts: I64
    own_share: float | None

    @classmethod
    def of_vocabulary(cls, words: Sequence[str], ngrams: Ngrams) -> Parts:
        """The parts of every word of a vocabulary, row 0 first."""
        rows, counts = [], []
        for first in range(0, len(words), _WORDS_AT_ONCE):
            some = words[first : first + _WORDS_AT_ONCE]
            others, starts = ngrams.rows(some, len(words))
            own = np.arange(first, first + len(some))
            rows.append(np.insert(others, starts[:-1], own))
            counts.append(np.diff(starts) + 1)
        return cls(np.concatenate(rows), _starts(np.concatenate(counts)), OWN_SHARE)

    @classmethod
    def of_unknown(cls, word: str, vocabulary: int, ngrams: Ngrams) -> Parts:
        """The parts of one word without a row: its n-gram rows, evenly; there may be none."""
        return cls(*ngrams.rows([word], vocabulary), None)

    def batch(self, words: I64) -> Batch:
        """Lay out the parts of some words part-major."""
        begin = self.starts[words]
        counts = self.starts[words + 1] - begin
        order = np.argsort(-counts, kind="stable")
        counts = counts[order]
        part = np.arange(int(counts.max(initial=0)))[:, None]
        has_part = part < counts
        index = (begin[order] + part)[has_part]
        n = counts.astype(np.float32)[:, None]
        first = np.reciprocal(n)
        if self.own_share is not None:
            first[n > 1] = self.own_share
        return Batch(
            rows=self.rows[index],
            sizes=has_part.sum(axis=1).tolist(),
            order=order,
            first_share=first,
            other_share=((1 - first) / np.maximum(n - 1, 1)).astype(np.float32),
        )

    def compose(self, table: Table, words: I64) -> F32:
        """The vectors of some words, shape (u, dim), from the input table."""
        batch = self.batch(words)
        return batch.combine(table.gather(batch.rows))


@dataclass(frozen=True)
class Batch:
    """The parts of u words in part-major order, with their weights.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Rows of the input table: all first parts, all second parts, …
    sizes : list of int
        How many words have a k-th part; descending, so these are the first words of the order.
    order : ndarray of int64, shape (u,)
        The index of each word in the request.
    first_share, other_share : ndarray of float32, shape (u, 1)
        The weight of a word's first part, and of each of its others.
    """

    rows: I64
    sizes: list[int]
    order: I64
    first_share: F32
    other_share: F32

    def combine(self, parts: F32) -> F32:
        """Vectors of shape (u, dim), in the order of the request, from gathered parts (n, dim)."""
        u = len(self.order)
        total = np.zeros((u, parts.shape[1]), np.float32)
        for begin, size in self._others():
            total[:size] += parts[begin : begin + size]
        total *= self.other_share
        total += parts[:u] * self.first_share
        vectors = np.empty_like(total)
        vectors[self.order] = total
        return vectors

    def spread(self, grad: F32) -> F32:
        """The gradient of each part, shape (n, dim), from the gradient of the vectors."""
        u = len(self.order)
        grad = grad[self.order]
        parts = np.empty((len(self.rows), grad.shape[1]), np.float32)
        np.multiply(grad, self.first_share, out=parts[:u])
        grad *= self.other_share
        for begin, size in self._others():
            parts[begin : begin + size] = grad[:size]
        return parts

    def _others(self) -> Iterator[tuple[int, int]]:
        """Yield start and size of each block of parts after the first."""
        begin = len(self.order)
        for size in self.sizes[1:]:
            yield begin, size
            begin += size
