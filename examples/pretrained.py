"""Pretrained vectors: load them from a GloVe file, use them frozen, then fine-tune them.

This is the usual way to start with little data. The example first writes a file in GloVe's format.
It has a vector for each of Python's built-in names: a singular value decomposition of the counts of
its pairs of letters. The task is to tell whether a name is an exception; half of the names are for
training.

First it trains a linear classifier on the frozen vectors, then the vectors under the unchanged
classifier. Expect that the training loss falls further, that only the rows of the training names
move, and that the result of the test therefore stays the same.

Run it with ``.venv/bin/python examples/pretrained.py``; it takes less than a second.
"""

from __future__ import annotations

import builtins
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyembed
from pyembed import build
from pyembed.words.vocab import Vocab

DIM = 12
Array = NDArray[Any]


def write_glove(path: Path) -> None:
    """Write the built-in names as a text of vectors."""
    names = sorted(name for name in dir(builtins) if not name.startswith("_"))
    pairs = [[f"^{name}$"[at : at + 2] for at in range(len(name) + 1)] for name in names]
    different = sorted({pair for one in pairs for pair in one})
    counts = np.array([[one.count(pair) for pair in different] for one in pairs], float)
    vectors = counts @ np.linalg.svd(counts)[2][:DIM].T
    with path.open("w", encoding="utf-8") as file:
        for name, vector in zip(names, vectors, strict=True):
            print(name, *(f"{number:.5f}" for number in vector), file=file)


def is_exception(name: str) -> bool:
    """Return the label of a name."""
    value = getattr(builtins, name)
    return isinstance(value, type) and issubclass(value, BaseException)


class Classifier:
    """A logistic regression on rows, without a library."""

    def __init__(self) -> None:
        self.weight, self.bias = np.zeros(DIM, np.float32), np.float32(0)

    def probability(self, rows: Array) -> Array:
        """Return the probability that each row is an exception."""
        return 1 / (1 + np.exp(-(rows @ self.weight + self.bias)))

    def step(self, rows: Array, label: Array, lr: float) -> Array:
        """Move the weight and the bias, and return the gradient of the rows."""
        error = (self.probability(rows) - label) / len(label)
        grad = np.outer(error, self.weight)
        self.weight -= np.float32(lr) * (rows.T @ error)
        self.bias -= np.float32(lr) * error.sum()
        return grad

    def report(self, rows: Array, label: Array) -> str:
        """Format the loss and the accuracy."""
        probability = self.probability(rows)
        loss = -np.log(np.where(label == 1, probability, 1 - probability)).mean()
        return f"loss {loss:.3f}, {np.mean((probability > 0.5) == label):.0%} correct"


def main() -> None:
    """Build a table from the file, use it frozen, and fine-tune it."""
    with tempfile.TemporaryDirectory() as folder:
        text, path = Path(folder) / "names.txt", Path(folder) / "names.pyembed"
        write_glove(text)
        # Rows on disk contain the state of the optimizer, so the table is created for one.
        build.from_vectors(path, text, optimizer="adagrad")
        vocab = Vocab.load(path)
        label = np.array([is_exception(name) for name in vocab], np.float32)  # in order of rows
        print(f"{len(vocab)} names of {DIM} numbers; {label.mean():.0%} of them are exceptions\n")
        train, test = np.array_split(np.random.default_rng(0).permutation(len(vocab)), 2)
        model = Classifier()

        frozen = pyembed.Embedding.from_pretrained(path)  # opened for reading
        with frozen.table:  # the lock of a reader excludes writers
            for _ in range(300):
                model.step(frozen(train), label[train], lr=0.1)
            print(f"frozen, train:     {model.report(frozen(train), label[train])}")
            print(f"frozen, test:      {model.report(frozen(test), label[test])}")
            try:
                pyembed.optim.Adagrad(frozen)
            except pyembed.errors.ArgumentError as error:
                print(f"an optimizer for it: ArgumentError: {error}")
            before = frozen.weight.copy()

        layer = pyembed.Embedding.from_pretrained(path, freeze=False)
        with layer.table:  # commits at its end
            optimizer = pyembed.optim.Adagrad(layer, lr=0.02)
            for _ in range(50):  # lr=0: the classifier stays the same, only rows change
                optimizer.step(train, model.step(layer(train), label[train], lr=0))
            print(f"fine-tuned, train: {model.report(layer(train), label[train])}")
            print(f"fine-tuned, test:  {model.report(layer(test), label[test])}")
            moved = np.flatnonzero((layer.weight != before).any(axis=1))
        only = np.array_equal(moved, np.sort(train))
        print(f"{len(moved)} of {len(vocab)} rows moved, those of the training names alone: {only}")


if __name__ == "__main__":
    main()
