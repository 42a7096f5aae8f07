"""Skip-gram with negative sampling on two tables: how a model is trained with this library.

Everything goes through the public interface: rows come from `Table.gather`, gradients go to
`optim.Adagrad.step`, the mathematics between them is numpy. Whatever is awkward here is awkward
for a user.

The text, rare words dropped and frequent ones thinned, is cut into runs of R words. A run sees its
own words and `window` more on both sides as contexts, and shares K negatives. So all scores of a
run are one small matrix product, ``(R, dim) @ (dim, R + 2 window + K)``, its gradients are two
more, and a mask says which contexts count. A negative weighs ``negative * contexts / K``: in
expectation every true pair still meets `negative` false ones. Runs are shuffled within a block of
the text. A batch of runs takes one Adagrad step on the summed gradient of each touched row.

A training that did not end leaves nothing: the tables grow in ``OUTPUT.partial``, which gets its
name at the end, and is removed on an exception or Ctrl-C before that. A text may be larger than
memory; the vocabulary and the n-gram ids of its words may not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pyembed import grouping, init, optim
from pyembed.errors import ArgumentError
from pyembed.table import Table
from pyembed.train import corpus as text
from pyembed.train.subword import Parts, check_ngrams
from pyembed.vocab import Vocab

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

INPUT, OUTPUT = "input.pyembed", "output.pyembed"

RUN = 16  # words of a run: fewer make small products, more compute scores that the mask drops
SHARED = 32  # negatives of a run
RUNS_AT_ONCE = 256  # runs of a step: 4096 words, whose vectors stay in the cache
BLOCK = 1 << 20  # words that are shuffled together
LAST_LR = 0.1  # the learning rate falls linearly to this part of itself
LOSS_RUNS = 16  # runs of a step whose loss is computed, for the progress bar


@dataclass(frozen=True)
class SkipgramResult:
    """What `train_skipgram` did.

    Attributes
    ----------
    path : Path
        The model: a folder with ``input.pyembed`` and ``output.pyembed``.
    vocabulary : int
        Words that have a row.
    words : int
        Occurrences of these words in the text, times epochs.
    words_per_second : float
        `words` by the time of the training itself, reading and writing not counted.
    loss : float
        Loss of a true pair and its negatives, averaged over about the last tenth of an epoch.
    """

    path: Path
    vocabulary: int
    words: int
    words_per_second: float
    loss: float


@dataclass(frozen=True)
class _Settings:
    dim: int
    window: int
    negative: int
    min_count: int
    epochs: int
    lr: float
    sample: float
    minn: int
    maxn: int
    buckets: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("dim", "window", "negative", "min_count", "epochs"):
            if (value := getattr(self, name)) < 1:
                raise ArgumentError(f"{name} = {value}; allowed: 1 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError(f"lr = {self.lr}; allowed: a finite number above 0")
        if not 0 <= self.sample <= 1:
            raise ArgumentError(f"sample = {self.sample}; allowed: 0 (off) .. 1")
        if not 0 <= self.seed < 2**64:
            raise ArgumentError(f"seed = {self.seed}; allowed: 0..2^64-1")
        check_ngrams(self.minn, self.maxn, self.buckets)


class _Runs(NamedTuple):
    """A batch of c runs: rows of their words, of their contexts, and which pairs count."""

    words: I64  # (c, RUN)
    contexts: I64  # (c, RUN + 2 window)
    mask: F32  # (c, RUN, RUN + 2 window)
    read: int  # words of the text that this batch stands for, thinned ones included


def train_skipgram(
    corpus_paths: Sequence[text.StrPath],
    output: text.StrPath,
    *,
    dim: int = 100,
    window: int = 5,
    negative: int = 5,
    min_count: int = 5,
    epochs: int = 5,
    lr: float = 0.025,
    sample: float = 1e-3,
    minn: int = 3,
    maxn: int = 6,
    buckets: int = 2_000_000,
    seed: int = 1,
    suffixes: Sequence[str] = text.SUFFIXES,
    exclude: Sequence[str] = (),
    encoding_errors: text.EncodingErrors = "strict",
    num_threads: int | None = None,
    progress: bool | None = None,
) -> SkipgramResult:
    """Train word vectors on text and write them as a folder of two tables.

    The same arguments and text give the same bits on the same machine and numpy.

    Parameters
    ----------
    corpus_paths : sequence of path-like
        UTF-8 files, or folders that are searched; see `pyembed.train.corpus`.
    output : path-like
        The folder to make; must not exist.
    dim : int
        Floats of a vector.
    window : int
        Most words between a word and its context; each word draws a reach of 1 .. window.
    negative : int
        False pairs for each true one, drawn by count ** 0.75.
    min_count : int
        Words that occur less often are dropped.
    epochs : int
        Passes over the text.
    lr : float
        Adagrad's learning rate at the start; it falls linearly to a tenth.
    sample : float
        A word of frequency f is kept with probability ``sqrt(sample / f) + sample / f``; 0 keeps
        every word.
    minn, maxn : int
        Lengths of the character n-grams.
    buckets : int
        Rows that the n-grams share; 0 trains without n-grams.
    seed : int
        Of everything random.
    suffixes, exclude : sequence of str
        Which files of a folder are read, and patterns of names or paths that are not.
    encoding_errors : {"strict", "replace"}
        What to do with bytes that are not UTF-8.
    num_threads : int, optional
    progress : bool, optional
        Show bars on stderr; by default when it is a terminal.

    Returns
    -------
    SkipgramResult

    Raises
    ------
    ArgumentError
        A setting that is not allowed, an output that exists, a vocabulary of less than two words.
    CorpusError
        A text that cannot be found, read or decoded.
    """
    settings = _Settings(
        dim, window, negative, min_count, epochs, lr, sample, minn, maxn, buckets, seed
    )
    files = text.find_files(corpus_paths, suffixes, exclude)
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise ArgumentError(f"{output} exists; give another output, or remove it")
    partial = output.with_name(output.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ArgumentError(
            f"{partial} exists: a training writes to it, or one was killed; then remove it"
        ) from None
    try:
        corpus = text.encode_corpus(
            files, partial / "ids", encoding_errors=encoding_errors, progress=progress
        )
        result = _train(corpus, settings, partial, num_threads, progress)
        corpus.path.unlink()
        partial.rename(output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted: {output} was not made") from None
        raise
    return SkipgramResult(output, *result)


def _train(
    corpus: text.EncodedCorpus,
    s: _Settings,
    folder: Path,
    num_threads: int | None,
    progress: bool | None,
) -> tuple[int, int, float, float]:
    """Make, train and commit both tables in `folder`; gives what `SkipgramResult` has."""
    chosen, row_of = text.choose_vocabulary(corpus, s.min_count)
    words, counts = [corpus.types[i] for i in chosen], corpus.counts[chosen]
    total = int(counts.sum()) * s.epochs
    rng = np.random.default_rng(s.seed)
    keep = _keep_probability(counts, s.sample)
    low = 1 / s.dim
    with (
        Table.create(
            folder / INPUT,
            len(words) + s.buckets,
            s.dim,
            optimizer="adagrad",
            init=init.uniform(-low, low),
            seed=s.seed,
            num_threads=num_threads,
        ) as table_in,
        Table.create(
            folder / OUTPUT, len(words), s.dim, optimizer="adagrad", num_threads=num_threads
        ) as table_out,
        tqdm(
            total=total,
            desc="training",
            unit="word",
            unit_scale=True,
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        model = _Model(table_in, table_out, Parts.of_vocabulary(words, s.minn, s.maxn, s.buckets))
        noise = np.cumsum(counts**0.75)
        done, loss = 0, math.nan
        start = time.perf_counter()
        for _ in range(s.epochs):
            for runs in _read_runs(corpus, row_of, keep, s.window, rng):
                drawn = rng.random((len(runs.words), SHARED)) * noise[-1]
                negatives = np.searchsorted(noise, drawn, side="right")
                lr = s.lr * (1 - (1 - LAST_LR) * done / total)
                now = model.step(runs, negatives, s.negative, lr)
                loss = now if math.isnan(loss) else loss + 0.02 * (now - loss)
                done += runs.read
                bar.update(runs.read)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        rate = total / (time.perf_counter() - start)
        vocab = Vocab(words, counts)
        meta = {**asdict(s), "model": "skipgram", "words": total, "loss": loss}
        for table in (table_in, table_out):
            table.commit(meta=meta)
            vocab.save(folder / (INPUT if table is table_in else OUTPUT))
    return len(words), total, rate, loss


def _keep_probability(counts: I64, sample: float) -> F32:
    """The chance of each word to stay, by word2vec's formula."""
    if sample == 0:
        return np.ones(len(counts), np.float32)
    ratio = sample / (counts / counts.sum())
    return np.minimum(np.sqrt(ratio) + ratio, 1).astype(np.float32)


def _read_runs(
    corpus: text.EncodedCorpus,
    row_of: npt.NDArray[np.int32],
    keep: F32,
    window: int,
    rng: np.random.Generator,
) -> Iterator[_Runs]:
    """Yield one pass over the text as batches of runs, in random order within a block."""
    wide = np.arange(RUN + 2 * window)
    distance = np.abs(wide - window - np.arange(RUN)[:, None])
    for block in corpus.blocks(BLOCK):
        rows = row_of[block]
        line = np.cumsum(rows == text.ROW_LINE_END)
        kept = rows >= 0
        read = int(kept.sum())
        kept[kept] = rng.random(read, np.float32) < keep[rows[kept]]
        rows, line = rows[kept].astype(np.int64), line[kept]
        count = -(-len(rows) // RUN)
        # Beyond the block there is nothing: line -1 for contexts, and no word is of line -1.
        padding = (window, count * RUN - len(rows) + window)
        rows = np.pad(rows, padding)
        line = np.pad(line, padding, constant_values=-1)
        order = rng.permutation(count)
        for first in range(0, count, RUNS_AT_ONCE):
            last = min(first + RUNS_AT_ONCE, count)
            at = order[first:last, None] * RUN + wide
            own_line = line[at[:, window : window + RUN]][..., None]
            reach = rng.integers(1, window + 1, own_line.shape)
            mask = (distance <= reach) & (distance > 0)
            mask &= (own_line == line[at][:, None, :]) & (own_line >= 0)
            contexts = rows[at]
            yield _Runs(
                contexts[:, window : window + RUN],
                contexts,
                mask.astype(np.float32),
                read * last // count - read * first // count,
            )


class _Model:
    """The two tables with their optimizers, and one step of training."""

    def __init__(self, table_in: Table, table_out: Table, parts: Parts) -> None:
        self.table_in, self.table_out, self.parts = table_in, table_out, parts
        self.vocabulary, self.dim = table_out.rows, table_out.dim
        self.optim_in, self.optim_out = optim.Adagrad(table_in), optim.Adagrad(table_out)

    def step(self, runs: _Runs, negatives: I64, negative: int, lr: float) -> float:
        """Train on a batch; the mean loss of a true pair in its first runs."""
        self.optim_in.lr = self.optim_out.lr = lr
        # Forward: the vector of each different word is composed once.
        unique, starts, order = grouping.group(runs.words, self.vocabulary)
        place = np.empty(order.size, np.int64)
        place[order] = np.repeat(np.arange(unique.size), np.diff(starts))
        parts = self.parts.batch(unique)
        vectors = parts.combine(self.table_in.gather(parts.rows))
        centres = vectors[place].reshape(*runs.words.shape, self.dim)
        columns = np.concatenate([runs.contexts, negatives], axis=1)
        others = self.table_out.gather(columns)
        scores = centres @ others.transpose(0, 2, 1)
        # Backward: the derivative of the loss by a score is weight * (sigmoid - target).
        grad, loss = _score_gradient(scores, runs.mask, negative)
        grad_others = grad.transpose(0, 2, 1) @ centres
        summed = grouping.sum_duplicates(runs.words, grad @ others, self.vocabulary, self.dim)
        self.optim_out.step(columns, grad_others)
        self.optim_in.step(parts.rows, parts.spread(summed.values))
        return loss


def _score_gradient(scores: F32, mask: F32, negative: int) -> tuple[F32, float]:
    """Turn scores (c, RUN, contexts + SHARED) into gradients in place; also gives a loss."""
    contexts = mask.shape[2]
    weight = mask.sum(axis=2, keepdims=True) * np.float32(negative / SHARED)
    some = scores[:LOSS_RUNS].astype(np.float64)
    true = np.logaddexp(0, -some[..., :contexts]) * mask[:LOSS_RUNS]
    false = np.logaddexp(0, some[..., contexts:]) * weight[:LOSS_RUNS]
    pairs = float(mask[:LOSS_RUNS].sum())
    loss = float(true.sum() + false.sum()) / pairs if pairs else math.log(2) * (1 + negative)
    # sigmoid(x) = (1 + tanh(x / 2)) / 2 cannot overflow.
    scores *= np.float32(0.5)
    np.tanh(scores, out=scores)
    scores += np.float32(1)
    scores *= np.float32(0.5)
    scores[..., :contexts] -= np.float32(1)
    scores[..., :contexts] *= mask
    scores[..., contexts:] *= weight
    return scores, loss
