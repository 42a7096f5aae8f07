"""Skip-gram with negative sampling on two tables: how a model is trained with this library.

Everything goes through the public interface: rows come from `Table.gather`, gradients go to
`optim.Adagrad.step`, the mathematics between them is numpy. Whatever is awkward here is awkward
for a user.

The text comes in runs of RUN words (`runs.py`) that share their contexts and SHARED negatives. So
all scores of a run are one small matrix product, ``(RUN, dim) @ (dim, RUN + 2 window + SHARED)``,
its gradients are two more, and a mask says which contexts count. A negative weighs ``negative *
contexts / SHARED``: in expectation every true pair still meets `negative` false ones. A batch of
runs takes one Adagrad step on the summed gradient of each touched row.

A training that did not end leaves nothing: the tables grow in ``OUTPUT.partial``, which gets its
name at the end, and is removed on an exception or Ctrl-C before that. A text may be larger than
memory; the vocabulary and the n-gram ids of its words may not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pyembed import grouping, init, optim
from pyembed.errors import ArgumentError, CorpusError
from pyembed.table import Table
from pyembed.train import corpus as text
from pyembed.train.runs import Runs, keep_probability, read_runs
from pyembed.train.subword import F32, I64, Ngrams, Parts
from pyembed.vocab import Vocab

INPUT, OUTPUT = "input.pyembed", "output.pyembed"

SHARED = 32  # negatives of a run
LAST_LR = 0.1  # the learning rate falls linearly to this part of itself
LOOK_SECONDS = 1.0  # between two looks at how much of the table is in memory, for the progress bar
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
        Loss of a true pair and its negatives, averaged over about the last fifty batches.
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
        Ngrams(self.minn, self.maxn, self.buckets)


def train_skipgram(
    corpus_paths: Sequence[text.StrPath],
    output: text.StrPath,
    *,
    dim: int = 100,
    window: int = 5,
    negative: int = 5,
    min_count: int = 5,
    epochs: int = 5,
    lr: float = 0.04,
    sample: float = 1e-2,
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
        The folder to make; must not exist, the folder above it must.
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
        A text that cannot be found, read or decoded, or that has no pair of words.
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
        partial.mkdir()
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
    keep = keep_probability(counts, s.sample)
    low, ngrams = 1 / s.dim, Ngrams(s.minn, s.maxn, s.buckets)
    with (
        Table.create(
            folder / INPUT,
            len(words) + s.buckets,
            s.dim,
            optimizer="adagrad",
            init=init.uniform(-low, low),
            seed=s.seed,
            durability="none",  # the folder has no name yet that anybody knows
            num_threads=num_threads,
        ) as table_in,
        Table.create(
            folder / OUTPUT,
            len(words),
            s.dim,
            optimizer="adagrad",
            durability="none",
            num_threads=num_threads,
        ) as table_out,
        tqdm(
            total=total,
            desc="training",
            unit="word",
            unit_scale=True,
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        model = _Model(table_in, table_out, Parts.of_vocabulary(words, ngrams))
        noise = np.cumsum(counts**0.75)
        noise /= noise[-1]  # ends at 1, which no draw reaches
        done, loss = 0, math.nan
        start = looked = time.perf_counter()
        there = table_in.stats()
        for _ in range(s.epochs):
            for runs in read_runs(corpus, row_of, keep, s.window, rng):
                drawn = rng.random((len(runs.words), SHARED))
                negatives = np.searchsorted(noise, drawn, side="right")
                lr = s.lr * (1 - (1 - LAST_LR) * done / total)
                now = model.step(runs, negatives, s.negative, lr)
                if not math.isnan(now):
                    loss = now if math.isnan(loss) else loss + 0.02 * (now - loss)
                done += runs.read
                bar.update(runs.read)
                if time.perf_counter() > looked + LOOK_SECONDS:
                    there, looked = table_in.stats(), time.perf_counter()
                bar.set_postfix_str(f"loss {loss:.3f}, {there}", refresh=False)
        rate = total / (time.perf_counter() - start)
        if math.isnan(loss):
            raise CorpusError(
                f"no line has two words that occur {s.min_count} times and were not thinned; "
                "give more text, a smaller min_count, or sample = 0"
            )
        vocab = Vocab(words, counts)
        meta = {**asdict(s), "model": "skipgram", "words": total, "loss": loss}
        for table, name in ((table_in, INPUT), (table_out, OUTPUT)):
            table.commit(meta=meta)
            vocab.save(folder / name)
    return len(words), total, rate, loss


class _Model:
    """The two tables with their optimizers, and one step of training."""

    def __init__(self, table_in: Table, table_out: Table, parts: Parts) -> None:
        self.table_in, self.table_out, self.parts = table_in, table_out, parts
        self.vocabulary, self.dim = table_out.rows, table_out.dim
        self.threads = table_in.num_threads
        self.optim_in, self.optim_out = optim.Adagrad(table_in), optim.Adagrad(table_out)

    def step(self, runs: Runs, negatives: I64, negative: int, lr: float) -> float:
        """Train on a batch; gives the mean loss of a true pair of some runs, NaN without pairs."""
        self.optim_in.lr = self.optim_out.lr = lr
        # Forward: the vector of each different word is composed once.
        unique, starts, order = grouping.group(runs.words, self.vocabulary, self.threads)
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
        summed = grouping.sum_duplicates(
            runs.words, grad @ others, self.vocabulary, self.dim, num_threads=self.threads
        )
        self.optim_out.step(columns, grad_others)
        self.optim_in.step(parts.rows, parts.spread(summed.values))
        return loss


def _score_gradient(scores: F32, mask: F32, negative: int) -> tuple[F32, float]:
    """Turn scores (c, RUN, contexts + SHARED) into gradients in place; also gives a loss."""
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
