"""A text of ids as batches of runs: what the skip-gram model trains on.

Rare words are dropped and frequent ones thinned; then the text is cut into runs of RUN words. A run
has its own words and `window` more on both sides as contexts, and a mask says which of these pairs
count: not too far, in the same line, not a word with itself. Runs are shuffled within a block of
the text; pairs across the edge of a block are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyembed.train.corpus import ROW_LINE_END, EncodedCorpus
from pyembed.train.subword import F32, I64

RUN = 16  # words of a run: fewer make small products, more compute scores that the mask drops
RUNS_AT_ONCE = 256  # runs of a batch: 4096 words; 64 to 512 gave words of the same quality
BLOCK = 1 << 20  # words that are shuffled together


class Runs(NamedTuple):
    """A batch of c runs: rows of their words, of their contexts, and which pairs count."""

    words: I64  # (c, RUN)
    contexts: I64  # (c, RUN + 2 window)
    mask: F32  # (c, RUN, RUN + 2 window), 0 or 1
    read: int  # words of the vocabulary that this batch stands for, thinned ones included


def keep_probability(counts: I64, sample: float) -> F32:
    """The chance of each word to stay, by word2vec's formula; `sample` 0 keeps all."""
    if sample == 0:
        return np.ones(len(counts), np.float32)
    ratio = sample / (counts / counts.sum())
    chance: F32 = np.minimum(np.sqrt(ratio) + ratio, 1).astype(np.float32)
    return chance


def read_runs(
    corpus: EncodedCorpus,
    row_of: npt.NDArray[np.int32],
    keep: F32,
    window: int,
    rng: np.random.Generator,
) -> Iterator[Runs]:
    """Yield one pass over the text.

    Parameters
    ----------
    corpus : EncodedCorpus
    row_of : ndarray of int32
        From `choose_vocabulary`.
    keep : ndarray of float32, shape (vocabulary,)
        The chance of each row to stay.
    window : int
        Each word draws its reach from 1 .. window.
    rng : Generator
    """
    wide = np.arange(RUN + 2 * window)
    distance = np.abs(wide - window - np.arange(RUN)[:, None])
    for block in corpus.blocks(BLOCK):
        rows = row_of[block]
        line = np.cumsum(rows == ROW_LINE_END)
        kept = rows >= 0
        read = int(kept.sum())
        kept[kept] = rng.random(read, np.float32) < keep[rows[kept]]
        rows, line = rows[kept].astype(np.int64), line[kept]
        count = -(-len(rows) // RUN)
        # Beyond the block there is nothing: line -1, which is no word's.
        padding = (window, count * RUN - len(rows) + window)
        rows = np.pad(rows, padding)
        line = np.pad(line, padding, constant_values=-1)
        order = rng.permutation(count)
        for first in range(0, count, RUNS_AT_ONCE):
            last = min(first + RUNS_AT_ONCE, count)
            at = order[first:last, None] * RUN + wide
            contexts, lines = rows[at], line[at]
            own_line = lines[:, window : window + RUN, None]
            reach = rng.integers(1, window + 1, own_line.shape)
            mask = (distance <= reach) & (distance > 0)
            mask &= (own_line == lines[:, None, :]) & (own_line >= 0)
            yield Runs(
                contexts[:, window : window + RUN],
                contexts,
                mask.astype(np.float32),
                read * last // count - read * first // count,
            )
