"""Words as sums of parts: fastText's hashed character n-grams, and the vectors composed from them.

The input table has one row for each word of the vocabulary, then `buckets` rows that all n-grams share by their hash:
row of an n-gram = vocabulary size + FNV-1a(n-gram) % buckets. The n-grams of a word are those of ``<word>`` by code point,
without the one-character edges. The hash is fastText's: 32 bits, each byte sign-extended first. The vector of a word is
the mean of its own row and its n-gram rows; an unknown word has its n-gram rows only.

The layout for a batch is part-major: words sorted by their number of parts, most first, then every word's first part, every
word's second part and so on. So summing the parts of all words is a few dozen additions of contiguous blocks, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyembed.errors import ArgumentError
from pyembed.table import Table

_FNV_BASIS = np.uint32(2166136261)
_FNV_PRIME = np.uint32(16777619)
_WORDS_AT_ONCE = 1 << 11  # bounds the temporary arrays of hashing and composing


def ngram_hashes(
    words: Sequence[str], minn: int, maxn: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Hash the character n-grams of words.

    Returns
    -------
    hashes : ndarray of uint32, shape (n,)
        FNV-1a of every n-gram, word after word; an n-gram that occurs twice in a word is there twice, as in fastText.
    starts : ndarray of int64, shape (len(words) + 1,)
        The n-grams of ``words[i]`` are ``hashes[starts[i]:starts[i + 1]]``.

    Examples
    --------
    >>> hashes, starts = ngram_hashes(["ab"], 3, 3)  # <ab and ab>
    >>> [f"{h:08x}" for h in hashes]
    ['3b2a2a48', '5b8b1d2e']
    """
    text = np.frombuffer("".join(f"<{word}>" for word in words).encode(), np.uint8)
    signed = text.view(np.int8).astype(np.int32).view(np.uint32)
    char_start = np.append(np.flatnonzero((text & 0xC0) != 0x80), len(text))
    lengths = np.array([len(word) + 2 for word in words], np.int64)
    ends = np.cumsum(lengths)
    word_of = np.repeat(np.arange(len(words)), lengths)
    char_end = ends[word_of]  # of each character, the first character of the next word
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
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(words)))])
    return np.concatenate(found)[order], starts.astype(np.int64)


def _fnv1a(
    signed: npt.NDArray[np.uint32], begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint32]:
    """Hash many byte ranges at once: the j-th round takes the j-th byte of every range that has one."""
    hashes = np.full(len(begin), _FNV_BASIS)
    for j in range(int((end - begin).max(initial=0))):
        longer = begin + j < end
        hashes[longer] = (hashes[longer] ^ signed[begin[longer] + j]) * _FNV_PRIME
    return hashes


@dataclass(frozen=True)
class Parts:
    """The rows whose mean is the vector of a word: its own row first, then its n-gram rows.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Rows of the input table, word after word.
    starts : ndarray of int64, shape (words + 1,)
        The parts of word ``i`` are ``rows[starts[i]:starts[i + 1]]``.
    """

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of_vocabulary(cls, words: Sequence[str], minn: int, maxn: int, buckets: int) -> Parts:
        """Parts of every word of a vocabulary; with ``buckets=0`` only its own row."""
        size = len(words)
        if buckets == 0:
            return cls(np.arange(size), np.arange(size + 1))
        rows, counts = [], []
        for first in range(0, size, _WORDS_AT_ONCE):
            some = words[first : first + _WORDS_AT_ONCE]
            hashes, starts = ngram_hashes(some, minn, maxn)
            bucket_rows = size + (hashes % np.uint32(buckets)).astype(np.int64)
            rows.append(np.insert(bucket_rows, starts[:-1], np.arange(first, first + len(some))))
            counts.append(np.diff(starts) + 1)
        ends = np.cumsum(np.concatenate(counts))
        return cls(np.concatenate(rows), np.concatenate([[0], ends]))

    @classmethod
    def of_unknown(cls, word: str, size: int, minn: int, maxn: int, buckets: int) -> Parts:
        """Parts of a word outside a vocabulary of `size` words: its n-gram rows, or none."""
        hashes, starts = ngram_hashes([word], minn, maxn)
        return cls(size + (hashes % np.uint32(buckets)).astype(np.int64), starts)

    def batch(self, words: npt.NDArray[np.int64]) -> Batch:
        """Lay out the parts of some words part-major."""
        counts = np.diff(self.starts)[words]
        order = np.argsort(-counts, kind="stable")
        counts = counts[order]
        part = np.arange(int(counts.max(initial=0)))[:, None]
        has_part = part < counts
        index = (self.starts[words[order]] + part)[has_part]
        return Batch(self.rows[index], has_part.sum(axis=1), counts, order)


@dataclass(frozen=True)
class Batch:
    """The parts of u words in part-major order.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Rows of the input table: first parts, second parts, …
    sizes : ndarray of int64, shape (most parts,)
        How many words have a k-th part.
    counts : ndarray of int64, shape (u,)
        Parts of each word, descending.
    order : ndarray of int64, shape (u,)
        Place among the words that were asked for.
    """

    rows: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    def mean(self, parts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Vectors of shape (u, dim), in the order asked for, from the gathered parts of shape (n, dim)."""
        total = np.zeros((len(self.counts), parts.shape[1]), np.float32)
        first = 0
        for size in self.sizes.tolist():
            total[:size] += parts[first : first + size]
            first += size
        vectors = np.empty_like(total)
        vectors[self.order] = total / self.counts[:, None].astype(np.float32)
        return vectors

    def spread(self, grad: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Gradient of each part, shape (n, dim), from the gradient of `mean`'s result."""
        share = grad[self.order] / self.counts[:, None].astype(np.float32)
        parts = np.empty((len(self.rows), grad.shape[1]), np.float32)
        first = 0
        for size in self.sizes.tolist():
            parts[first : first + size] = share[:size]
            first += size
        return parts


def check_ngrams(minn: int, maxn: int, buckets: int) -> None:
    """Refuse n-gram settings that make no sense."""
    if not 0 <= buckets < 2**32:
        raise ArgumentError(
            f"buckets = {buckets} is outside 0..{2**32 - 1} (the hash has 32 bits; 0 means no n-grams)"
        )
    if buckets and not 1 <= minn <= maxn:
        raise ArgumentError(f"minn = {minn} and maxn = {maxn} do not satisfy 1 <= minn <= maxn")


def compose(table: Table, parts: Parts) -> npt.NDArray[np.float32]:
    """Vectors of all words of `parts`, shape (words, dim); temporary memory is bounded."""
    size = len(parts.starts) - 1
    vectors = np.empty((size, table.dim), np.float32)
    for first in range(0, size, _WORDS_AT_ONCE):
        words = np.arange(first, min(first + _WORDS_AT_ONCE, size))
        batch = parts.batch(words)
        vectors[words] = batch.mean(table.gather(batch.rows))
    return vectors
