"""Batches of runs: the training data of the skip-gram model, from a text of rows.

Frequent words are dropped at random; then the text is cut into runs of RUN words. The contexts of a
run are its own words and `window` more on both sides. A mask says which pairs count: those within
reach, in the same line, and not of a word with itself. Runs are shuffled within a block of the
text; pairs across the edge of a block are not used.

The random numbers of a block or a batch come from a generator that its place seeds. Therefore a
training can continue from a place alone, without reading the text before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyembed.train.corpus import ROW_LINE_END, StrPath, read_blocks
from pyembed.train.subword import F32, I64

RUN = 16  # words of a run: fewer make small products, more compute scores that the mask drops
RUNS_AT_ONCE = 256  # runs of a batch: 4096 words; 64 to 512 gave words of the same quality
BLOCK = 1 << 20  # words that are shuffled together


class Place(NamedTuple):
    """The place of a batch: the pass over the text, the block, and the batch in the block."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


BEGIN = Place()


class Runs(NamedTuple):
    """A batch of c runs: the rows of their words and contexts, and the pairs that count."""

    words: I64  # (c, RUN)
    contexts: I64  # (c, RUN + 2 window)
    mask: F32  # (c, RUN, RUN + 2 window), 0 or 1
    read: int  # words of the text in this batch, dropped ones included
    rng: np.random.Generator  # for the other random numbers of this batch
    next: Place  # the place of the batch after this one


def keep_probability(counts: I64, sample: float) -> F32:
    """The probability that a word is kept, by word2vec's formula; `sample` 0 keeps all."""
    if sample == 0:
        return np.ones(len(counts), np.float32)
    ratio = sample / (counts / counts.sum())
    chance: F32 = np.minimum(np.sqrt(ratio) + ratio, 1).astype(np.float32)
    return chance


def generator(seed: int, *place: int) -> np.random.Generator:
    """The generator of a block (epoch, block) or of a batch (epoch, block, batch)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def read_runs(
    text: StrPath, keep: F32, window: int, seed: int, epochs: int, start: Place = BEGIN
) -> Iterator[Runs]:
    """Yield the batches of all passes over the text, from the batch `start` on.

    Parameters
    ----------
    text : path-like
        The text as rows, from `pyembed.train.corpus.rewrite_as_rows`.
    keep : ndarray of float32, shape (vocabulary,)
        The probability that a word is kept.
    window : int
        Each word draws its reach from 1 .. window.
    seed : int
        The seed of all random numbers.
    epochs : int
        Passes over the text.
    start : Place
        The first batch to yield.

    Yields
    ------
    Runs
        One batch.
    """
    for epoch in range(start.epoch, epochs):
        first = start.block if epoch == start.epoch else 0
        for block, rows in enumerate(read_blocks(text, BLOCK, first), first):
            here = Place(epoch, block)
            yield from _cut_block(rows, keep, window, seed, max(here, start))


def _cut_block(
    block: npt.NDArray[np.int32], keep: F32, window: int, seed: int, start: Place
) -> Iterator[Runs]:
    """Yield the runs of a block, from the batch `start` on."""
    wide = np.arange(RUN + 2 * window)
    distance = np.abs(wide - window - np.arange(RUN)[:, None])
    rng = generator(seed, start.epoch, start.block)
    line = np.cumsum(block == ROW_LINE_END)
    kept = block >= 0
    read = int(kept.sum())
    kept[kept] = rng.random(read, np.float32) < keep[block[kept]]
    rows, line = block[kept].astype(np.int64), line[kept]
    count = -(-len(rows) // RUN)
    # Places beyond the block have line -1, which no word has.
    padding = (window, count * RUN - len(rows) + window)
    rows = np.pad(rows, padding)
    line = np.pad(line, padding, constant_values=-1)
    order = rng.permutation(count)
    for first in range(start.batch * RUNS_AT_ONCE, count, RUNS_AT_ONCE):
        last = min(first + RUNS_AT_ONCE, count)
        place = start._replace(batch=first // RUNS_AT_ONCE)
        rng = generator(seed, *place)
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
            rng,
            place._replace(batch=place.batch + 1),
        )
