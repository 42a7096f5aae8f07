"""An LSTM that tells which package a function comes from: pyembed against torch.nn.

The functions of eight packages of Python's standard library are sequences of words and signs, of
different lengths. A batch is padded with a reserved id (`padding_idx`), then packed, so that the
LSTM sees no padding. Every fifth function is for testing.

Each seed trains the same model twice: with `pyembed.torch.Embedding`, whose Adam runs in backward,
and with `torch.nn.Embedding(sparse=True)` and `torch.optim.SparseAdam`. The weights at the start,
the batches and the rule are the same. Expect losses that start equal up to rounding, and an
accuracy that is equal within the spread of the seeds. (Adam takes a full step for a gradient that
is nearly zero, so rounding errors grow, as they do between two runs of torch from weights that
differ in the last bit.)

Run it with ``.venv/bin/python examples/lstm_classifier.py``; it takes less than a minute and
needs torch. ``--quick`` takes a few seconds.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import pyembed
import pyembed.torch

PACKAGES = [
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
]
PAD, UNKNOWN = 0, 1
DIM, HIDDEN, LR, DENSE_LR, BATCH, EPOCHS, LONGEST = 32, 64, 0.02, 0.005, 64, 4, 60


def functions(package: str) -> list[list[str]]:
    """List the first words and signs of each function."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
        if {"test", "tests"} & set(file.parts):
            continue
        lines = file.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join(lines[node.lineno - 1 : node.end_lineno])
                found.append(re.findall(r"\w+|[^\w\s]", text)[:LONGEST])
    return found


class Classifier(nn.Module):
    """A linear layer over the mean of the LSTM's states."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.lstm = nn.LSTM(DIM, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, len(PACKAGES))

    def forward(self, ids: Tensor) -> Tensor:
        """Compute scores of shape (batch, packages) for padded ids of shape (batch, words)."""
        lengths = (ids != PAD).sum(dim=1)
        rows = self.embedding(ids)
        packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(states.sum(dim=1) / lengths[:, None])


def train(
    embedding: nn.Module, texts: list[Tensor], labels: Tensor, seed: int
) -> tuple[Classifier, np.ndarray]:
    """Return the trained model and the loss of every batch."""
    torch.manual_seed(seed)
    model = Classifier(embedding)
    dense = [*model.lstm.parameters(), *model.head.parameters()]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=DENSE_LR)]
    if not isinstance(embedding, pyembed.torch.Embedding):  # which updates itself
        optimizers.append(torch.optim.SparseAdam(embedding.parameters(), lr=LR))
    losses = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            ids = pad_sequence([texts[i] for i in batch], batch_first=True, padding_value=PAD)
            loss = nn.functional.cross_entropy(model(ids), labels[batch])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
    return model, np.array(losses)


def accuracy(model: Classifier, texts: list[Tensor], labels: Tensor) -> float:
    """Return the share of functions whose package has the highest score."""
    with torch.no_grad():
        scores = model(pad_sequence(texts, batch_first=True, padding_value=PAD))
    return float((scores.argmax(dim=1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Read the functions, train twice for each seed, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="every fourth function, one seed")
    options = parser.parse_args(arguments)
    seeds, share = (1, 4) if options.quick else (options.seeds, 1)

    labelled = [(words, label) for label, name in enumerate(PACKAGES) for words in functions(name)]
    labelled = labelled[::share]
    training = [pair for number, pair in enumerate(labelled) if number % 5 != 4]
    counts = Counter(word for words, _ in training for word in words)
    frequent = [word for word, count in counts.items() if count > 1]
    row_of = {word: row for row, word in enumerate(frequent, start=2)}
    rows = len(frequent) + 2

    def encode(part: list[tuple[list[str], int]]) -> tuple[list[Tensor], Tensor]:
        texts = [torch.tensor([row_of.get(word, UNKNOWN) for word in words]) for words, _ in part]
        return texts, torch.tensor([label for _, label in part])

    learn, test = encode(training), encode(labelled[4::5])
    print(f"{len(learn[0]):,} functions to train, {len(test[0])} to test; {rows:,} words")
    largest = test[1].bincount().max() / len(test[1])
    print(f"always the largest package: {largest:.1%}\n")

    print("accuracy   pyembed torch.nn  losses differ by: first 20 batches, all")
    results = []
    adam = functools.partial(pyembed.optim.Adam, lr=LR)
    for seed in range(seeds):
        torch.manual_seed(seed)
        weight = 0.1 * torch.randn(rows, DIM)
        weight[PAD] = 0
        ours = pyembed.torch.Embedding.from_pretrained(
            weight.clone(), freeze=False, padding_idx=PAD, optimizer=adam
        )
        theirs = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=PAD, sparse=True)
        (model, losses), (twin, twin_losses) = (train(e, *learn, seed) for e in (ours, theirs))
        right, gap = [accuracy(m, *test) for m in (model, twin)], np.abs(losses - twin_losses)
        results.append(right)
        print(
            f"seed {seed}   {right[0]:8.1%} {right[1]:8.1%}  {gap[:20].max():.0e}  {gap.max():.0e}"
        )
    print("mean    ", *(f"{value:8.1%}" for value in np.mean(results, axis=0)))
    print("spread  ", *(f"{value:8.1%}" for value in np.std(results, axis=0)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
