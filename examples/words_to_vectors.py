"""Words to vectors: the basic task of an embedding layer.

A model takes numbers, not words. Each word of a small text (the Zen of Python) therefore gets an
id, the number of its row in a table, and the layer turns ids of any shape into rows. The rows are
random here; the other examples train them. Expect that both words "better" have one id and one
vector, and that a word or an id that the table does not have is an error, never a wrong row.

Run it with ``.venv/bin/python examples/words_to_vectors.py``; it takes less than a second.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import re
from collections import Counter

import numpy as np

import pyembed
from pyembed.errors import IdError
from pyembed.words.vocab import Vocab

DIM = 4


def zen() -> str:
    """Return the Zen of Python, which its module prints on import and keeps in rot13."""
    with contextlib.redirect_stdout(io.StringIO()):
        this = importlib.import_module("this")
    return codecs.decode(this.s, "rot13")


def split(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"[a-z']+", text.lower())


def main() -> None:
    """Print words, ids, vectors, and the two errors."""
    words = split(zen())
    counted = Counter(words).most_common()  # the most frequent word gets row 0
    vocab = Vocab([word for word, _ in counted], counts=[count for _, count in counted])
    print(f"{len(words)} words, {len(vocab)} of them different; the most frequent:")
    print("  " + "  ".join(f"{word} {count}" for word, count in counted[:6]))

    layer = pyembed.Embedding(len(vocab), DIM, seed=1)
    print(f"\n{layer}: {layer.table.nbytes:,} bytes of float32\n")
    sentence = split("Beautiful is better than ugly. Explicit is better than implicit.")
    ids = vocab.ids(sentence)
    vectors = layer(ids)
    for word, row, vector in zip(sentence, ids, vectors, strict=True):
        print(f"{word:>10} {row:>4}  {np.array2string(vector, precision=2, floatmode='fixed')}")
    first, second = (at for at, word in enumerate(sentence) if word == "better")
    same = np.array_equal(vectors[first], vectors[second])
    print(f"the same word is the same vector: {same}")

    pair = ids.reshape(2, 5)  # two sentences of five words
    print(f"\nids of shape {pair.shape} give vectors of shape {layer(pair).shape}")

    print("\nan unknown word or id is an error:")
    try:
        vocab.ids(["simple", "is", "beautifull"])
    except KeyError as error:
        print(f"  KeyError: {error.args[0]}")
    try:
        layer([3, len(vocab)])
    except IdError as error:  # also an IndexError
        print(f"  IdError: {error}")
    try:
        layer([[3, -1]])  # unlike in a Python list, -1 is not the last row
    except IdError as error:
        print(f"  IdError: {error}")


if __name__ == "__main__":
    main()
