"""Models that train on tables: word vectors from text.

`train_skipgram` makes a model, `similar` finds the nearest words in it, `plot_words` draws it.
`import pyembed` does not import this room. The room may import the public modules of pyembed. Read
`corpus` (text to rows), `runs` (rows to batches), `subword` (words as sums of n-grams), then
`skipgram`, `checkpoint`, and last `neighbours` and `plot`.
"""

from __future__ import annotations

from pyembed.train.neighbours import Model, similar
from pyembed.train.plot import plot_words
from pyembed.train.skipgram import SkipgramResult, SkipgramSettings, train_skipgram

__all__ = ["Model", "SkipgramResult", "SkipgramSettings", "plot_words", "similar", "train_skipgram"]
