"""A torch model with its embedding in a file: predict a word from the two words before it.

`pyembed.torch.Embedding` is a layer like any other. Its rows are in a file, and backward updates
them; torch's Adam updates the other parameters. Expect a loss well below that of always answering
with the words' frequencies, and the learned rows in the file.

The words are the names in the source of `argparse`, in order.

Run it with ``.venv/bin/python examples/torch_model.py``; it takes a few seconds and needs torch.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import io
import tempfile
import tokenize
from pathlib import Path

import numpy as np
import torch

import pyembed
import pyembed.torch

DIM, EPOCHS, BATCH = 16, 8, 256


def names(source: str) -> list[str]:
    """List the identifiers and keywords of a source text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.NAME]


def train(path: Path, ids: torch.Tensor, words: int) -> float:
    """Train on pairs of words and the next word; return the mean loss of the last epoch."""
    torch.manual_seed(1)
    init = pyembed.init.normal(std=0.1)
    pyembed.Table.create(path, words, DIM, "adagrad", init=init, seed=1).close()
    layer = pyembed.torch.Embedding(
        words, DIM, path=path, optimizer=functools.partial(pyembed.optim.Adagrad, lr=0.1)
    )
    model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(2 * DIM, words))
    dense = torch.optim.Adam(model.parameters(), lr=0.01)  # the table is not a parameter
    pairs, targets = torch.stack([ids[:-2], ids[1:-1]], dim=1), ids[2:]
    for _ in range(EPOCHS):
        losses = []
        for batch in torch.randperm(len(targets)).split(BATCH):
            dense.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(pairs[batch]), targets[batch])
            loss.backward()  # updates the rows in the file
            dense.step()
            losses.append(loss.item())
    layer.table.close()
    return float(np.mean(losses))


def main() -> None:
    """Train, and read the rows from the file."""
    words, found = np.unique(names(inspect.getsource(argparse)), return_inverse=True)
    share = np.bincount(found) / len(found)
    print(f"{len(found):,} names, {len(words):,} of them different")
    print(f"always the frequencies: loss {-(share * np.log(share)).sum():.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "words.pyembed")
        loss = train(path, torch.from_numpy(found), len(words))
        print(f"two words before:       loss {loss:.3f}")
        rows = np.load(path / "rows.npy", mmap_mode="r")[:, :DIM]
        length = np.linalg.norm(rows, axis=1).mean()
        print(f"rows in the file: {rows.shape}, of length {length:.2f}")


if __name__ == "__main__":
    main()
