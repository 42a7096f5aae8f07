"""Skip-gram with negative sampling on a table, as a user of this library would write it.

Everything goes through the public interface: rows come from `Table.gather`, gradients go to
`optim.Adagrad.step`, and the mathematics between them is numpy.

The rows of the table are the input vectors (of the words, then the `buckets` that n-grams share),
followed by the output vectors of the words. All are in one table, because a checkpoint is one
commit.

The text comes in runs of RUN words (see `runs`) that share their contexts and SHARED negatives.
Therefore all scores of a run are one small matrix product, ``(RUN, dim) @ (dim, RUN + 2 window +
SHARED)``, its gradients are two more, and a mask says which contexts count. A negative weighs
``negative * contexts / SHARED``, so the expected number of false pairs for each true one is
`negative`. A batch of runs takes one Adagrad step on the summed gradient of each row.

The table is trained in ``OUTPUT.partial``, which is renamed at the end; `checkpoint` says how a
training continues. The text may be larger than memory; the vocabulary and the n-gram ids of its
words may not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyembed import grouping, init, optim
from pyembed._progress import progress_bar
from pyembed.errors import ArgumentError, CorpusError
from pyembed.table import Table
from pyembed.train import corpus as text
from pyembed.train.checkpoint import (
    Progress,
    folder_of,
    load_vocabulary,
    table_in_training,
    text_of,
)
from pyembed.train.runs import Place, Runs, keep_probability, read_runs
from pyembed.train.subword import F32, I64, Ngrams, Parts
from pyembed.words.vocab import Vocab

SHARED = 32  # negatives of a run
LAST_LR = 0.1  # the learning rate falls linearly to this fraction of itself
LOOK_SECONDS = 1.0  # between two calls of `Table.stats` for the progress bar
LOSS_RUNS = 16  # runs of a step that the loss is computed for, for the progress bar


@dataclass(frozen=True)
class SkipgramResult:
    """The result of `train_skipgram`.

    Parameters
    ----------
    path : Path
        The model: the folder of a table, with its vocabulary.
    vocabulary : int
        The number of words that have a row.
    words : int
        The number of occurrences of these words in the text, times epochs.
    words_per_second : float
        The words that this call trained on, divided by the time of the training; reading the
        text and making the table are not counted.
    loss : float
        The loss of a true pair and its negatives, averaged over about the last fifty batches.
    """

    path: Path
    vocabulary: int
    words: int
    words_per_second: float
    loss: float


@dataclass(frozen=True)
class SkipgramSettings:
    """The hyper-parameters of the skip-gram model.

    Parameters
    ----------
    dim : int
        The floats of a vector.
    window : int
        The largest distance between a word and its context, in words; each word draws its own
        from 1 .. window.
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
        The lengths of the shortest and of the longest character n-gram.
    buckets : int
        Rows that the n-grams share; 0 trains without n-grams.
    seed : int
        The seed of everything random.

    Raises
    ------
    ArgumentError
        If a setting is not allowed.
    """

    dim: int = 100
    window: int = 5
    negative: int = 5
    min_count: int = 5
    epochs: int = 5
    lr: float = 0.04
    sample: float = 1e-2
    minn: int = 3
    maxn: int = 6
    buckets: int = 2_000_000
    seed: int = 1

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
        Ngrams(self.minn, self.maxn, self.buckets)


def train_skipgram(
    corpus_paths: Sequence[text.StrPath],
    output: text.StrPath,
    *,
    suffixes: Sequence[str] = text.SUFFIXES,
    exclude: Sequence[str] = (),
    encoding_errors: text.EncodingErrors = "strict",
    checkpoint_every: int | None = None,
    resume: bool = False,
    num_threads: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> SkipgramResult:
    """Train word vectors on text and write them as a table.

    The same arguments and text give the same bits on the same machine and numpy, whether the
    training was interrupted and resumed or not.

    Parameters
    ----------
    corpus_paths : sequence of path-like
        The texts; see `pyembed.train.corpus.find_files`.
    output : path-like
        The folder to make; it must not exist, and its parent must.
    suffixes, exclude : sequence of str
        Which files of a folder are read; see `find_files`.
    encoding_errors : {"strict", "replace"}
        Whether bytes that are not UTF-8 are an error, or are read as U+FFFD.
    checkpoint_every, resume : int, optional, and bool
        Keep a checkpoint every so many batches of 4096 words; continue from the last one. See
        `pyembed.train.checkpoint`.
    num_threads, progress : int or bool, optional
        See `Table.create`. Bars are drawn on stderr; by default if it is a terminal.
    **settings : int or float
        The fields of `SkipgramSettings`.

    Returns
    -------
    SkipgramResult
        The folder and a few numbers.

    Raises
    ------
    ArgumentError, CorpusError, LockedError, DirtyError, FormatError
        See `SkipgramSettings`, `find_files` and `pyembed.train.checkpoint.table_in_training`.
    """
    chosen, output = SkipgramSettings(**settings), Path(output)
    texts = {"suffixes": list(suffixes), "exclude": list(exclude)}
    kept = {"model": "skipgram", **asdict(chosen), "paths": text.name_paths(corpus_paths), **texts}
    kept["encoding_errors"] = encoding_errors
    with table_in_training(output, kept, checkpoint_every, resume, num_threads) as table:
        if not table.meta:
            files = text.find_files(corpus_paths, suffixes, exclude)
            _read_text(table, kept, files, encoding_errors, progress)
        if not table.rows:
            _make_rows(table, chosen)
        rate, meta = _train(table, chosen, checkpoint_every, progress), table.meta
    loss = meta["progress"]["loss"]
    return SkipgramResult(output, meta["vocabulary"], meta["words"], rate, loss)


def _read_text(
    table: Table,
    settings: dict[str, Any],
    files: Sequence[Path],
    encoding_errors: text.EncodingErrors,
    progress: bool | None,
) -> None:
    """Read the texts once, and keep them as rows and a vocabulary."""
    corpus = text.encode_corpus(
        files, text_of(table), encoding_errors=encoding_errors, progress=progress
    )
    chosen, row_of = text.choose_vocabulary(corpus, settings["min_count"])
    counts = corpus.counts[chosen]
    Vocab([corpus.types[i] for i in chosen], counts).save(folder_of(table))
    found = {
        "tokens": text.rewrite_as_rows(corpus, row_of),
        "vocabulary": len(chosen),
        "words": int(counts.sum()) * settings["epochs"],
    }
    table.commit(meta={**settings, **found})


def _make_rows(table: Table, s: SkipgramSettings) -> None:
    """Append random input vectors and zero output vectors."""
    words, low = table.meta["vocabulary"], 1 / s.dim
    table.append(words + s.buckets, init.uniform(-low, low), s.seed)
    table.append(words)
    table.commit(meta={**table.meta, "progress": asdict(Progress())})


def _train(
    table: Table, s: SkipgramSettings, checkpoint_every: int | None, progress: bool | None
) -> float:
    """Train from the last commit to the end, and commit; return the words per second."""
    (words, counts), meta = load_vocabulary(table), table.meta
    total, at = meta["words"], Progress(**meta["progress"])
    model = _Model(table, Parts.of_vocabulary(words, Ngrams(s.minn, s.maxn, s.buckets)))
    keep = keep_probability(counts, s.sample)
    noise = np.cumsum(counts**0.75)
    noise /= noise[-1]  # the last is 1, and draws are less than 1
    bar = progress_bar("training", total, "word", progress, initial=at.words)
    before, there = at.words, table.stats()
    start = looked = time.perf_counter()
    with bar:
        for runs in read_runs(text_of(table), keep, s.window, s.seed, s.epochs, at.place):
            drawn = runs.rng.random((len(runs.words), SHARED))
            negatives = np.searchsorted(noise, drawn, side="right")
            lr = s.lr * (1 - (1 - LAST_LR) * at.words / total)
            at.add(runs, model.step(runs, negatives, s.negative, lr))
            if checkpoint_every is not None and at.batches % checkpoint_every == 0:
                table.commit(meta={**meta, "progress": asdict(at)})
            bar.update(runs.read)
            if time.perf_counter() > looked + LOOK_SECONDS:
                there, looked = table.stats(), time.perf_counter()
            bar.set_postfix_str(f"loss {at.loss or math.nan:.3f}, {there}", refresh=False)
    rate = (at.words - before) / (time.perf_counter() - start)
    if at.loss is None:
        raise CorpusError(
            f"no line has two words that occur {s.min_count} times and were not dropped; "
            "give more text, a smaller min_count, or sample = 0"
        )
    at.place = Place(s.epochs)
    if asdict(at) != table.meta["progress"]:
        table.commit(meta={**meta, "progress": asdict(at)})
    return rate


class _Model:
    """The table with its optimizer, and one step of training."""

    def __init__(self, table: Table, parts: Parts) -> None:
        self.table, self.parts, self.optimizer = table, parts, optim.Adagrad(table)
        self.vocabulary = len(parts.starts) - 1
        self.first_output = table.rows - self.vocabulary

    def step(self, runs: Runs, negatives: I64, negative: int, lr: float) -> float:
        """Train on a batch; return the mean loss of a pair in some runs, NaN without pairs."""
        dim, threads = self.table.dim, self.table.num_threads
        # Forward: the vector of each different word is composed once.
        unique, starts, order = grouping.group(runs.words, self.vocabulary, threads)
        place = np.empty(order.size, np.int64)
        place[order] = np.repeat(np.arange(unique.size), np.diff(starts))
        parts = self.parts.batch(unique)
        vectors = parts.combine(self.table.gather(parts.rows))
        centres = vectors[place].reshape(*runs.words.shape, dim)
        columns = np.concatenate([runs.contexts, negatives], axis=1) + self.first_output
        others = self.table.gather(columns)
        scores = centres @ others.transpose(0, 2, 1)
        # Backward: the derivative of the loss by a score is weight * (sigmoid - target).
        grad, loss = _score_gradient(scores, runs.mask, negative)
        grad_others = grad.transpose(0, 2, 1) @ centres
        summed = grouping.sum_duplicates(
            runs.words, grad @ others, self.vocabulary, dim, num_threads=threads
        )
        # No row is in both, so two steps are as one, without copying all gradients into one array.
        self.optimizer.lr = lr
        self.optimizer.step(columns, grad_others)
        self.optimizer.step(parts.rows, parts.spread(summed.values))
        return loss


def _score_gradient(scores: F32, mask: F32, negative: int) -> tuple[F32, float]:
    """Turn scores (c, RUN, contexts + SHARED) into gradients in place; return them and a loss."""
    contexts = mask.shape[2]
    weight = mask.sum(axis=2, keepdims=True) * np.float32(negative / SHARED)
    some = np.flatnonzero(weight.any(axis=(1, 2)))[:LOSS_RUNS]
    few = scores[some].astype(np.float64)
    true = np.logaddexp(0, -few[..., :contexts]) * mask[some]
    false = np.logaddexp(0, few[..., contexts:]) * weight[some]
    loss = float(true.sum() + false.sum()) / float(mask[some].sum()) if some.size else math.nan
    # sigmoid(x) = (1 + tanh(x / 2)) / 2 cannot overflow.
    scores *= np.float32(0.5)
    np.tanh(scores, out=scores)
    scores += np.float32(1)
    scores *= np.float32(0.5)
    scores[..., :contexts] -= np.float32(1)
    scores[..., :contexts] *= mask
    scores[..., contexts:] *= weight
    return scores, loss
