"""Skip-gram with negative sampling on two tables: the worked example of training a model with this library.

Everything here goes through the public interface: rows come from `Table.gather`, gradients go to `optim.Adagrad.step`, the mathematics
between them is numpy. No kernel, no file layout and no thread is touched; what is missing here is missing for a user.

How a batch is made fast: the text (rare words dropped, frequent ones thinned) is cut into runs of R centre words. A run sees its own words
and `window` more on both sides as contexts, and shares K negatives. So all scores of a run are one small matrix product,
``(R, dim) @ (dim, R + 2·window + K)``, its gradients are two more, and a mask says which contexts count. A negative is weighted
with ``negative · contexts / K``, so that every true pair still meets `negative` false ones in expectation. Runs are shuffled within a block.
Each batch takes one Adagrad step per touched row on its summed gradient.

Nothing is left behind by a training that did not end: the tables grow in ``OUTPUT.partial``, which is renamed at the end and removed when
an exception or Ctrl-C comes before that. A text can be larger than memory; the vocabulary and its n-gram ids cannot.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pyembed import init, optim
from pyembed.errors import ArgumentError
from pyembed.table import Table
from pyembed.train import corpus as text
from pyembed.train.subword import Parts, check_ngrams
from pyembed.vocab import Vocab

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
INPUT, OUTPUT = "input.pyembed", "output.pyembed"

RUN = 16  # centre words that share contexts and negatives
SHARED = 32  # negatives of a run
RUNS_AT_ONCE = 256  # runs per step
BLOCK = 1 << 20  # words that are shuffled together


@dataclass(frozen=True)
class Settings:
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


class Runs(NamedTuple):
    words: I64
    contexts: I64
    mask: F32


def read_runs(corpus, row_of, keep, s, rng, rows_per_block=BLOCK):
    w = s.window
    distance = np.abs(np.arange(RUN)[:, None] + w - np.arange(RUN + 2 * w))
    for block in corpus.blocks(BLOCK):
        words = row_of[block]
        sentence = np.cumsum(words == -2, dtype=np.int32)
        if s.__dict__.get("nosent"): sentence[:] = 0
        kept = words >= 0
        kept[kept] = rng.random(int(kept.sum()), np.float32) < keep[words[kept]]
        words, sentence = words[kept], sentence[kept]
        n = -(-len(words) // RUN)
        pad = (w, n * RUN - len(words) + w)
        words = np.pad(words, pad)
        sentence = np.pad(sentence, pad, constant_values=-1)
        order = rng.permutation(n)
        for first in range(0, n, RUNS_AT_ONCE):
            at = order[first:first + RUNS_AT_ONCE, None] * RUN + np.arange(RUN + 2 * w)
            ctx, sen = words[at].astype(np.int64), sentence[at]
            cs = sen[:, w:w + RUN, None]
            reach = rng.integers(1, w + 1, cs.shape)
            mask = (distance <= reach) & (distance > 0) & (cs == sen[:, None, :]) & (cs >= 0)
            yield len(block) * min(RUNS_AT_ONCE, n - first) / n, ctx[:, w:w + RUN], ctx, mask.astype(np.float32)


T = dict.fromkeys("prep unique gather mean outgather scores sig bwd reduce spread stepin stepout".split(), 0.0)

def train(corpus, chosen, row_of, s: Settings, out, evaluate=None, log=None):
    V = len(chosen)
    types = [corpus.types[i] for i in chosen]
    counts = corpus.counts[chosen]
    parts = Parts.of_vocabulary(types, s.minn, s.maxn, s.buckets)
    inp = Table.create(out / INPUT, V + s.buckets, s.dim, optimizer="adagrad", init=init.uniform(-1 / s.dim, 1 / s.dim), seed=s.seed)
    outp = Table.create(out / OUTPUT, V, s.dim, optimizer="adagrad", init=init.zeros())
    oi, oo = optim.Adagrad(inp, lr=s.lr, eps=s.__dict__.get("eps",1e-10)), optim.Adagrad(outp, lr=s.lr, eps=s.__dict__.get("eps",1e-10))
    freq = counts / counts.sum()
    keep = np.minimum(1, np.sqrt(s.sample / freq) + s.sample / freq).astype(np.float32) if s.sample else np.ones(V, np.float32)
    cum = np.cumsum(counts ** 0.75); cum /= cum[-1]
    rng = np.random.default_rng(s.seed)
    t0 = time.time(); done = 0; nb = 0; ls = []; lw=[]
    total = sum(len(b) for b in corpus.blocks(BLOCK)) * s.epochs
    clk = time.perf_counter
    for epoch in range(s.epochs):
        it = read_runs(corpus, row_of, keep, s, rng)
        while True:
            a = clk()
            x = next(it, None)
            if x is None: break
            nw, words, ctx, mask = x
            lr = s.lr * (1 - s.__dict__.get("decay", 0.0) * done / total)
            oi.lr = oo.lr = lr
            b = clk(); T["prep"] += b - a; a = b
            neg = np.searchsorted(cum, rng.random((len(ctx), SHARED)))
            u, inv = np.unique(words, return_inverse=True)
            batch = parts.batch(u)
            b = clk(); T["unique"] += b - a; a = b
            g = inp.gather(batch.rows)
            b = clk(); T["gather"] += b - a; a = b
            h = batch.mean(g)[inv]
            b = clk(); T["mean"] += b - a; a = b
            cols = np.concatenate([ctx, neg], 1)
            o = outp.gather(cols)
            b = clk(); T["outgather"] += b - a; a = b
            sc = h @ o.transpose(0, 2, 1)
            b = clk(); T["scores"] += b - a; a = b
            wpos = mask.sum(2)
            wn = wpos * (s.negative / SHARED)
            sig = 0.5 + 0.5 * np.tanh(0.5 * sc)
            W = ctx.shape[1]
            if nb % 16 == 0:
                l = -(np.log(sig[..., :W][mask > 0] + 1e-10).sum() + (np.log(1 - sig[..., W:] + 1e-10).sum(2) * wn).sum()) / mask.sum()
                ls.append(l)
            sig[..., :W] -= 1
            sig[..., :W] *= mask
            sig[..., W:] *= wn[..., None]
            b = clk(); T["sig"] += b - a; a = b
            do = sig.transpose(0, 2, 1) @ h
            dh = (sig @ o).reshape(-1, s.dim)
            b = clk(); T["bwd"] += b - a; a = b
            oo.step(cols, do)
            b = clk(); T["stepout"] += b - a; a = b
            order = np.argsort(inv.ravel(), kind="stable")
            starts = np.searchsorted(inv.ravel()[order], np.arange(len(u)))
            gu = np.add.reduceat(dh[order], starts, axis=0)
            b = clk(); T["reduce"] += b - a; a = b
            sp = batch.spread(gu)
            b = clk(); T["spread"] += b - a; a = b
            oi.step(batch.rows, sp)
            b = clk(); T["stepin"] += b - a; a = b
            nb += 1; done += nw
        print(f"epoch {epoch} loss {np.mean(ls[-100:]):.4f} {time.time()-t0:.1f}s", flush=True)
    print({k: round(v, 2) for k, v in T.items()}, nb)
    return inp, outp, parts, types
