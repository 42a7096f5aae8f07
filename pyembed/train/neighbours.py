"""What a trained model knows: nearest words, and a picture of the most frequent ones.

Vectors are composed from the input table block by block, so memory does not grow with the
vocabulary. Words are compared by cosine after the mean vector of the text (each word as often as
it occurs) is taken away: it is common to all words and says nothing about any of them (Mu,
Viswanath: "All-but-the-top", ICLR 2018, first step).

An exact search over the vocabulary; no index is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pyembed.errors import ArgumentError, FormatError
from pyembed.table import Table
from pyembed.train.corpus import StrPath
from pyembed.train.skipgram import INPUT
from pyembed.train.subword import F32, I64, Parts
from pyembed.vocab import Vocab

_BLOCK = 1 << 13  # words composed at a time
_GROUPS = 8  # colours of a plot


class Model:
    """A trained model, opened for reading. A context manager.

    Parameters
    ----------
    directory : path-like
        What `pyembed.train.skipgram.train_skipgram` made.

    Raises
    ------
    FormatError
        The folder is no such model.
    TableError, OSError
        Its table cannot be opened.
    """

    def __init__(self, directory: StrPath) -> None:
        folder = Path(directory) / INPUT
        self.table = Table.open(folder, "r")
        try:
            self.vocab = Vocab.load(folder)
            self._read_meta()
        except BaseException:
            self.table.close()
            raise

    def _read_meta(self) -> None:
        meta, size = self.table.meta, len(self.vocab)
        ngrams = [meta.get(name) for name in ("minn", "maxn", "buckets")]
        if meta.get("model") != "skipgram" or not all(type(n) is int for n in ngrams):
            raise FormatError(f"{self.table.path}: not the input table of a skip-gram model")
        self._minn, self._maxn, self._buckets = ngrams
        if size + self._buckets != self.table.rows or self.vocab.counts is None or size == 0:
            raise FormatError(
                f"{self.table.path}: {size} words and {self._buckets} n-gram rows do not make "
                f"{self.table.rows} rows, or counts are missing; restore its vocab.* files"
            )
        self.parts = Parts.of_vocabulary(list(self.vocab), self._minn, self._maxn, self._buckets)
        total = sum(
            self.vocab.counts[rows] @ vectors.astype(np.float64) for rows, vectors in self._blocks()
        )
        self._mean = (total / self.vocab.counts.sum()).astype(np.float32)

    def close(self) -> None:
        """Let go of the table."""
        self.table.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _blocks(self) -> Iterator[tuple[I64, F32]]:
        """Yield rows of the vocabulary and their composed vectors."""
        size = len(self.vocab)
        for first in range(0, size, _BLOCK):
            rows = np.arange(first, min(first + _BLOCK, size))
            yield rows, self.parts.compose(self.table, rows)

    def directions(self, words: Sequence[str]) -> F32:
        """Unit vectors of words, shape (words, dim), the mean of the text taken away.

        A word outside the vocabulary is composed of its n-grams.

        Raises
        ------
        ArgumentError
            A word is unknown and the model has no n-grams of it; names close spellings.
        """
        return self._directions(np.stack([self._vector(word) for word in words]))

    def _vector(self, word: str) -> F32:
        if word in self.vocab:
            return self.parts.compose(self.table, np.array([self.vocab[word]]))[0]
        if self._buckets:
            parts = Parts.of_unknown(
                word, len(self.vocab), self._minn, self._maxn, self._buckets
            )
            if parts.rows.size:
                return parts.compose(self.table, np.zeros(1, np.int64))[0]
        try:
            self.vocab[word]
        except KeyError as error:
            raise ArgumentError(f"the word {error.args[0]}") from None
        raise AssertionError("unreachable: the word is in the vocabulary")

    def _directions(self, vectors: F32) -> F32:
        vectors = vectors - self._mean
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(norms, np.finfo(np.float32).tiny)

    def similar(self, words: Sequence[str], topn: int = 10) -> list[list[tuple[str, float]]]:
        """For each word, the `topn` words of the vocabulary with the largest cosine, best first.

        The word itself is left out; equal cosines are in the order of the rows. One pass over the
        vocabulary answers all words.
        """
        if topn < 1:
            raise ArgumentError(f"topn = {topn}; allowed: 1 or more")
        queries = self.directions(words)
        own = np.array([self.vocab[word] if word in self.vocab else -1 for word in words])[:, None]
        best = np.full((len(words), 0), 0, np.float32)
        rows_of_best = np.zeros((len(words), 0), np.int64)
        for rows, vectors in self._blocks():
            cosines = queries @ self._directions(vectors).T
            cosines[rows == own] = -np.inf
            best = np.concatenate([best, cosines], axis=1)
            rows_of_best = np.concatenate(
                [rows_of_best, np.broadcast_to(rows, cosines.shape)], axis=1
            )
            order = np.argsort(-best, axis=1, kind="stable")[:, :topn]
            best = np.take_along_axis(best, order, axis=1)
            rows_of_best = np.take_along_axis(rows_of_best, order, axis=1)
        return [
            [
                (self.vocab.token(row), cosine)
                for row, cosine in zip(rows, cosines, strict=True)
                if cosine > -np.inf
            ]
            for rows, cosines in zip(rows_of_best.tolist(), best.tolist(), strict=True)
        ]


def similar(directory: StrPath, word: str, topn: int = 10) -> list[tuple[str, float]]:
    """Give the nearest words of one word; see `Model.similar` for many at once.

    Parameters
    ----------
    directory : path-like
        A trained model.
    word : str
        Of the vocabulary, or with n-grams any word.
    topn : int

    Returns
    -------
    list of (str, float)
        Words with their cosines, best first.
    """
    with Model(directory) as model:
        return model.similar([word], topn)[0]
