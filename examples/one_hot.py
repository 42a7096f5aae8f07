"""One-hot: an embedding layer is a linear layer without bias, over one-hot vectors.

In textbooks, a word is a vector of zeros with a single one, and a linear layer turns it into a few
numbers. That product only picks a row, so a lookup does the same without the zeros; its backward
adds the gradient to the picked row. Expect the same rows and the same gradient, and compare the
bytes that each way reads and writes at least.

The ids are the names in the source of `argparse`, in their order.

Run it with ``.venv/bin/python examples/one_hot.py``; it takes less than a second.
"""

from __future__ import annotations

import argparse
import inspect
import io
import tokenize

import numpy as np

import pyembed

DIM = 32
RTOL, ATOL = 1e-4, 1e-4  # backward sums hundreds of float32 in another order


def names(source: str) -> list[str]:
    """Return the identifiers and keywords of a source text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.NAME]


def main() -> None:
    """Compute rows and gradient both ways, and compare them."""
    words, ids = np.unique(names(inspect.getsource(argparse)), return_inverse=True)
    layer = pyembed.Embedding(len(words), DIM, seed=1)
    grad = np.random.default_rng(2).normal(size=(len(ids), DIM)).astype(np.float32)
    print(f"{len(ids):,} names, {len(words):,} of them different, {DIM} numbers each\n")

    one_hot = np.zeros((len(ids), len(words)), np.float32)
    one_hot[np.arange(len(ids)), ids] = 1
    product = one_hot @ layer.weight
    product_grad = one_hot.T @ grad
    rows = layer(ids)
    rows_grad = layer.backward(ids, grad)
    assert isinstance(rows_grad, np.ndarray)  # with sparse=True it would be a SparseGrad

    # Forward adds zeros to one row, without rounding. Backward sums the gradients of a word.
    print(f"forward equal:  {np.array_equal(rows, product)}, to the bit")
    close = np.allclose(rows_grad, product_grad, rtol=RTOL, atol=ATOL)
    print(f"backward equal: {close}, to {RTOL:g} (largest difference", end=" ")
    print(f"{np.abs(rows_grad - product_grad).max():.1g})\n")

    # Both ways read the input (twice), the weight or its picked rows, and the gradient. They write
    # the output and the gradient of the weight.
    output = rows.nbytes
    linear = 2 * one_hot.nbytes + layer.weight.nbytes + output + product_grad.nbytes + grad.nbytes
    lookup = 2 * ids.nbytes + rows.nbytes + output + rows_grad.nbytes + grad.nbytes
    print(f"one-hot x linear: {linear:>12,} bytes")
    print(f"lookup:           {lookup:>12,} bytes")
    print(f"{linear / lookup:.0f} times fewer, and the factor grows with the vocabulary")


if __name__ == "__main__":
    main()
