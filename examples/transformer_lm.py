"""A Transformer over bytes with its large input table in a file: pyembed against torch.nn.

A language model over bytes has few tokens, so its input can describe more than one byte: the input
at a position is the sum of a row for the last byte, a row for the last two bytes, and so on up to
six, each looked up by a hash (as in the Byte Latent Transformer, Pagnoni et al., 2024). The table
of hashes has most of the model's parameters, and a batch uses few of them. It is therefore in a
file: `lookahead` reads the rows of the next batches, and pyembed's Adagrad updates rows.

The text is the source of twelve packages of Python's standard library, with every tenth file for
testing. Each seed trains the same model twice, the second time with `torch.nn.Embedding(sparse=
True)` in memory and `torch.optim.Adagrad`. The weights at the start, the batches and the rule are
the same. Expect losses that start equal up to rounding, and equal bits per byte, far below those of
the bytes' frequencies. (Adagrad takes a full first step, even for a gradient that is nearly zero,
so rounding errors grow.)

Run it with ``.venv/bin/python examples/transformer_lm.py``; it takes most of a minute, and needs
torch and 135 MB of temporary disk space. ``--quick`` takes a few seconds.
"""

from __future__ import annotations

import argparse
import functools
import math
import operator
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pyembed
import pyembed.torch

PACKAGES = ["asyncio", "concurrent", "ctypes", "email", "http", "importlib", "json", "logging"]
PACKAGES += ["multiprocessing", "unittest", "urllib", "xml"]
ORDERS, DIM, HEADS, LAYERS, CONTEXT, BATCH, TESTED = 6, 64, 4, 2, 64, 32, 300
LR, DENSE_LR = 0.1, 0.002

Batch = tuple[Tensor, Tensor]


def read_bytes() -> tuple[np.ndarray, np.ndarray]:
    """Read the bytes for training and those for testing."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for name in PACKAGES for file in sorted((root / name).rglob("*.py"))]
    texts: tuple[list[bytes], list[bytes]] = [], []
    for number, file in enumerate(files):
        texts[number % 10 == 9].append(file.read_bytes())
    train, test = (np.frombuffer(b"".join(text), np.uint8) for text in texts)
    return train, test


def batch_at(text: np.ndarray, starts: np.ndarray, bits: int) -> Batch:
    """Make ids of shape (starts, CONTEXT, ORDERS), and the following bytes, (starts, CONTEXT)."""
    window = text[starts[:, None] + np.arange(CONTEXT + ORDERS)].astype(np.uint64)
    grams, ids = np.zeros_like(window), []
    for _ in range(ORDERS):  # the last byte, the last two, ...
        grams = np.roll(grams, 1, axis=1) * 257 + window + 1
        ids.append(grams * 0x9E3779B97F4A7C15 >> (64 - bits))
    known = np.stack(ids, axis=2)[:, ORDERS - 1 : -1]
    return tuple(torch.from_numpy(x.astype(np.int64)) for x in (known, window[:, ORDERS:]))


class LanguageModel(nn.Module):
    """A Transformer over sums of rows, and a linear layer over its output."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, 4 * DIM, dropout=0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, ids: Tensor) -> Tensor:
        """Compute scores of the next byte, of shape (batch, 256, CONTEXT)."""
        x = self.table(ids).sum(dim=2) + self.position
        return self.head(self.encoder(x, mask=self.mask, is_causal=True)).transpose(1, 2)


def train(
    table: nn.Module, batches: Iterable[Batch], seed: int
) -> tuple[LanguageModel, np.ndarray]:
    """Return the trained model and the loss of every batch."""
    torch.manual_seed(seed)
    model = LanguageModel(table)
    dense = [p for name, p in model.named_parameters() if not name.startswith("table.")]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=DENSE_LR)]
    if not isinstance(table, pyembed.torch.Embedding):  # which updates itself
        optimizers.append(torch.optim.Adagrad(table.parameters(), lr=LR))
    losses = []
    for ids, following in batches:
        loss = nn.functional.cross_entropy(model(ids), following)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return model, np.array(losses)


def bits_per_byte(model: LanguageModel, batch: Batch) -> float:
    """Compute the cross-entropy of the following bytes."""
    with torch.no_grad():
        return nn.functional.cross_entropy(model(batch[0]), batch[1]).item() / math.log(2)


def main(arguments: list[str] | None = None) -> None:
    """Read the text, train twice for each seed, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, a small table")
    options = parser.parse_args(arguments)
    seeds, steps, bits = (1, 25, 14) if options.quick else (options.seeds, 120, 18)
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; unset, torch warns

    text, test_text = read_bytes()
    starts = np.linspace(0, len(test_text) - CONTEXT - ORDERS, TESTED).astype(np.int64)
    test = batch_at(test_text, starts, bits)
    share = (np.bincount(text, minlength=256) + 1) / (len(text) + 256)
    print(f"{len(text):,} bytes to train; a table of {1 << bits:,} rows of {DIM}")
    print(f"always the frequencies: {-np.log2(share[test[1]]).mean():.3f} bits per byte\n")

    def batches(seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            yield batch_at(text, rng.integers(len(text) - CONTEXT - ORDERS, size=BATCH), bits)

    print("bits per byte  pyembed torch.nn  losses differ by: first 5 batches, all")
    results = []
    small, adagrad = pyembed.init.normal(std=0.02), functools.partial(pyembed.optim.Adagrad, lr=LR)
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "hashes.pyembed")
            pyembed.Table.create(path, 1 << bits, DIM, "adagrad", init=small, seed=seed).close()
            ours = pyembed.torch.Embedding(1 << bits, DIM, path=path, optimizer=adagrad)
            weight = ours.state_dict()["weight"]  # a copy
            theirs = nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
            ahead = pyembed.lookahead(batches(seed), ours, ids=operator.itemgetter(0))
            model, losses = train(ours, ahead, seed)
            twin, twin_losses = train(theirs, batches(seed), seed)
            result = [bits_per_byte(m, test) for m in (model, twin)]
            ours.table.close()
        results.append(result)
        gap = np.abs(losses - twin_losses)
        print(f"seed {seed}        {result[0]:8.3f} {result[1]:8.3f}", end="")
        print(f"  {gap[:5].max():.0e}  {gap.max():.0e}")
    print("mean         ", *(f"{value:8.3f}" for value in np.mean(results, axis=0)))
    print("spread       ", *(f"{value:8.3f}" for value in np.std(results, axis=0)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
