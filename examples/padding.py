"""Padding: sequences of different lengths in one array, with unchanged results.

Arrays are rectangular, sentences are not. Short sequences are therefore filled up with an id
without a meaning, the `padding_idx` of the layer. Its row starts as zeros and takes no gradient.
Here the sequences are the texts of HTTP's status codes. A small model (the mean of the rows, then a
linear regression on the first digit of the code) runs in three ways:

1. one sequence at a time, without padding;
2. padded, with `Embedding`, where the mean must divide by the true length;
3. with `EmbeddingBag`, which computes the mean from offsets or from the padded array.

Expect one loss and one gradient. Ways 1 and 2 add the same numbers in another order, so they agree
to within float32 rounding; the two inputs of 3 agree to the bit.

Run it with ``.venv/bin/python examples/padding.py``; it takes less than a second.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyembed
from pyembed.words.vocab import Vocab

PAD, DIM = 0, 8
TOLERANCE = 1e-6
Array = NDArray[Any]


def error(means: Array, head: Array, target: Array) -> tuple[float, Array]:
    """Return half the mean squared error of ``means @ head``, and the gradient of the means."""
    wrong = (means @ head - target) / np.float32(len(target))
    return float((wrong * wrong).sum() * len(target) / 2), np.outer(wrong, head)


def main() -> None:
    """Compute loss and gradient in three ways, and compare them."""
    texts = [f"{status.phrase}. {status.description}" for status in HTTPStatus]
    sentences = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    vocab = Vocab(["<pad>", *sorted({word for words in sentences for word in words})])
    sequences = [vocab.ids(words) for words in sentences]
    lengths = np.array([len(one) for one in sequences])
    target = np.array([status // 100 for status in HTTPStatus], np.float32)
    head = np.random.default_rng(2).normal(size=DIM).astype(np.float32)

    padded = np.full((len(sequences), lengths.max()), PAD)
    for row, one in enumerate(sequences):
        padded[row, : len(one)] = one
    print(f"{len(sequences)} sequences of {lengths.min()} to {lengths.max()} words, {DIM} numbers")
    print(f"padded: {padded.shape}, {np.mean(padded == PAD):.0%} of it padding\n")

    layer = pyembed.Embedding(len(vocab), DIM, padding_idx=PAD, seed=1)
    share = 1 / lengths[:, None].astype(np.float32)

    # 1. One at a time.
    means = np.stack([layer(one).sum(axis=0) for one in sequences]) * share
    loss, grad = error(means, head, target)
    alone = np.zeros_like(layer.weight)
    for one, row in zip(sequences, grad * share, strict=True):
        alone += layer.backward(one, np.tile(row, (len(one), 1)))

    # 2. Padded. The gradient has rows for the padding too, which the layer ignores.
    padded_loss, grad = error(layer(padded).sum(axis=1) * share, head, target)
    spread = np.repeat((grad * share)[:, None], padded.shape[1], axis=1)
    together = layer.backward(padded, spread)
    close = np.allclose(together, alone, rtol=TOLERANCE, atol=TOLERANCE)
    print(f"one at a time: loss {loss:.6f}\npadded:        loss {padded_loss:.6f}")
    print(f"same gradient to {TOLERANCE:g}: {close}; at the padding row: {together[PAD].sum():g}\n")

    # 3. Bags over the same rows. No mean includes padding; offsets are the starts of the bags.
    bag = pyembed.EmbeddingBag(len(vocab), DIM, mode="mean", padding_idx=PAD, table=layer.table)
    flat = bag.bags(np.concatenate(sequences), np.cumsum(lengths) - lengths)
    bag_loss, grad = error(bag(flat), head, target)
    print(f"bags:          loss {bag_loss:.6f}")
    print(f"means from offsets and padded, to the bit: {np.array_equal(bag(flat), bag(padded))}")
    from_offsets, from_padded = bag.backward(flat, grad), bag.backward(padded, grad)
    print(f"gradients, to the bit: {np.array_equal(from_offsets, from_padded)}")
    close = np.allclose(from_offsets, alone, rtol=TOLERANCE, atol=TOLERANCE)
    print(f"and as one at a time, to {TOLERANCE:g}: {close}")


if __name__ == "__main__":
    main()
