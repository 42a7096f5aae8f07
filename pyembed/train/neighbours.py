"""The nearest words of a word in a trained model, by an exact search without an index.

Vectors are composed from the table block by block, so memory does not grow with the vocabulary.
Words are compared by cosine after the mean vector of the text (each word as often as it occurs) is
subtracted: it is common to all words and carries no information about any of them (Mu, Viswanath:
"All-but-the-top", ICLR 2018, first step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pyembed.errors import ArgumentError, FormatError
from pyembed.table import Table
from pyembed.train.corpus import StrPath
from pyembed.train.subword import F32, I64, Ngrams, Parts
from pyembed.words.vocab import Vocab

_TINY = np.finfo(np.float32).tiny
_BLOCK = 1 << 11  # words composed at a time


class Model:
    """A trained model, opened for reading; a context manager.

    Parameters
    ----------
    directory : path-like
        The output of `train_skipgram`, or a partial output with a checkpoint.

    Raises
    ------
    FormatError
        If the folder is not such a model.
    TableError, OSError
        If its table cannot be opened.
    """

    def __init__(self, directory: StrPath) -> None:
        self.table = Table.open(directory, "r")
        try:
            self.vocab = Vocab.load(directory)
            self._read_meta()
        except BaseException:
            self.table.close()
            raise

    def _read_meta(self) -> None:
        where, meta, size = self.table.path, self.table.meta, len(self.vocab)
        try:
            self.ngrams = Ngrams(*(int(meta[name]) for name in ("minn", "maxn", "buckets")))
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"{where}: not the table of a skip-gram model") from None
        counts = self.vocab.counts
        if counts is None or not size or 2 * size + self.ngrams.buckets != self.table.rows:
            raise FormatError(
                f"{where}: {size} words and {self.ngrams.buckets} n-gram rows do not make "
                f"{self.table.rows} rows, or counts are missing; restore its vocab.* files"
            )
        self.parts = Parts.of_vocabulary(list(self.vocab), self.ngrams)
        mean = np.zeros(self.table.dim)
        for rows, vectors in self._blocks():
            mean += counts[rows] @ vectors.astype(np.float64)
        self._mean: F32 = (mean / max(int(counts.sum()), 1)).astype(np.float32)

    def close(self) -> None:
        """Close the table."""
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
        """Unit vectors of words, after the mean of the text is subtracted.

        Parameters
        ----------
        words : sequence of str
            Any words; one outside the vocabulary is composed of its n-grams.

        Returns
        -------
        ndarray of float32, shape (len(words), dim)
            One unit vector for each word.

        Raises
        ------
        ArgumentError
            If a word is unknown and has no n-grams in the model; names close spellings.
        """
        return self._directions(np.concatenate([self._vector(word) for word in words]))

    def _vector(self, word: str) -> F32:
        try:
            row = self.vocab[word]
        except KeyError as error:
            try:
                parts = Parts.of_unknown(word, len(self.vocab), self.ngrams)
            except UnicodeEncodeError:
                raise ArgumentError(f"the word {word!r} is not UTF-8; convert it") from None
            if parts.rows.size == 0:
                raise ArgumentError(f"the word {error.args[0]}") from None
            return parts.compose(self.table, np.zeros(1, np.int64))
        return self.parts.compose(self.table, np.array([row]))

    def _directions(self, vectors: F32) -> F32:
        vectors = vectors - self._mean
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _TINY)
        return vectors

    def similar(self, words: Sequence[str], topn: int = 10) -> list[list[tuple[str, float]]]:
        """Find the words of the vocabulary with the largest cosine to each word.

        One pass over the vocabulary answers all words. The word itself is left out, and equal
        cosines are in the order of the rows.

        Parameters
        ----------
        words : sequence of str
            The words to look up, as in `directions`.
        topn : int
            The number of words to return for each.

        Returns
        -------
        list of list of (str, float)
            For each word, the nearest words and their cosines, best first.

        Raises
        ------
        ArgumentError
            If `topn` is not positive, or a word is unknown.
        """
        if topn < 1:
            raise ArgumentError(f"topn = {topn}; allowed: 1 or more")
        queries = self.directions(words)
        best = np.empty((len(words), 0), np.float32)
        best_rows = np.empty((len(words), 0), np.int64)
        for rows, vectors in self._blocks():
            cosines = queries @ self._directions(vectors).T
            best = np.concatenate([best, cosines], axis=1)
            best_rows = np.concatenate([best_rows, np.broadcast_to(rows, cosines.shape)], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, : topn + 1]
            best = np.take_along_axis(best, order, axis=1)
            best_rows = np.take_along_axis(best_rows, order, axis=1)
        found = []
        for i, word in enumerate(words):
            named = zip(map(self.vocab.token, best_rows[i].tolist()), best[i].tolist(), strict=True)
            found.append([(other, cosine) for other, cosine in named if other != word][:topn])
        return found


def similar(directory: StrPath, word: str, topn: int = 10) -> list[tuple[str, float]]:
    """Find the nearest words of one word; see `Model.similar` for many words.

    Parameters
    ----------
    directory : path-like
        A trained model.
    word : str
        A word of the vocabulary, or any word if the model has n-grams.
    topn : int
        The number of words to return.

    Returns
    -------
    list of (str, float)
        Words with their cosines, best first.
    """
    with Model(directory) as model:
        return model.similar([word], topn)[0]
