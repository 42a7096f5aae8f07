"""Models trained on tables: word vectors from text.

`train_skipgram` makes a model, `similar` asks it, `plot_words` draws it. Importing pyembed does not
import this; the parts are `corpus`, `subword`, `runs`, `checkpoint`, `skipgram`, `neighbours` and
`plot`.
"""

from __future__ import annotations

from pyembed.train.neighbours import Model, similar
from pyembed.train.plot import plot_words
from pyembed.train.skipgram import SkipgramResult, SkipgramSettings, train_skipgram

__all__ = ["Model", "SkipgramResult", "SkipgramSettings", "plot_words", "similar", "train_skipgram"]
