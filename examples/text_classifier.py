"""A text classifier: a linear layer over the mean of a text's word vectors.

This is the simplest model of text that works (Joulin et al., "Bag of tricks for efficient text
classification", 2017). It tells which package of Python's standard library a line of source comes
from. A line is the bag of its identifiers and keywords. `EmbeddingBag` computes the mean of their
rows, and `optimizer.step` takes the gradient of the means, so no array has a row for each word.

Every fifth block of 50 lines is for testing, and all words come from the training lines. Compare
the test accuracy with that of always naming the largest package, and look at the words that are
typical of each package.

Run it with ``.venv/bin/python examples/text_classifier.py``; it takes about a second.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

import pyembed
from pyembed.words.vocab import Vocab

PACKAGES = ["asyncio", "email", "http", "importlib", "json", "logging", "unittest", "xml"]
DIM, LR, BATCH, EPOCHS, BLOCK = 16, 0.1, 128, 4, 50

Line = tuple[int, list[str]]  # number of the package, words


def read_lines() -> tuple[list[Line], list[Line]]:
    """Read lines of at least three words, for training and for testing."""
    root = Path(sysconfig.get_path("stdlib"))
    lines: tuple[list[Line], list[Line]] = [], []
    for package, name in enumerate(PACKAGES):
        for file in sorted((root / name).rglob("*.py")):
            if {"test", "tests"} & set(file.relative_to(root).parts):
                continue
            text = file.read_text(encoding="utf-8")
            for number, line in enumerate(text.splitlines()):
                words = re.findall(r"[A-Za-z_]\w*", line)
                if len(words) >= 3:
                    lines[number // BLOCK % 5 == 4].append((package, words))
    return lines


def encode(lines: list[Line], vocab: Vocab) -> tuple[list[np.ndarray], np.ndarray]:
    """Look up the ids of each line, without unknown words, and its package."""
    ids = [vocab.ids(word for word in words if word in vocab) for _, words in lines]
    return ids, np.array([package for package, _ in lines])


def flat(lines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Join the ids of all lines, and list where each line begins."""
    sizes = np.array([len(ids) for ids in lines])
    return np.concatenate(lines), np.cumsum(sizes) - sizes


def main() -> None:
    """Read the lines, train, and compare."""
    train, test = read_lines()
    counts = Counter(word for _, words in train for word in words)
    vocab = Vocab([word for word, count in counts.most_common() if count > 1])
    (ids, label), (test_ids, test_label) = (encode(lines, vocab) for lines in (train, test))
    print(f"{len(label):,} lines to train, {len(test_label):,} to test; {len(vocab):,} words")

    small = pyembed.init.normal(std=0.1)
    table = pyembed.Table.memory(len(vocab), DIM, init=small, seed=1)
    bag = pyembed.EmbeddingBag(len(vocab), DIM, mode="mean", table=table)
    head = pyembed.Table.memory(len(PACKAGES), DIM, init=small, seed=2)  # a dense layer is a table
    step_bag, step_head = (pyembed.optim.Adagrad(x, lr=LR).step for x in (bag, head))
    rng, everyone = np.random.default_rng(0), np.arange(len(PACKAGES))

    def accuracy(ids: list[np.ndarray], label: np.ndarray) -> float:
        guess = (bag(*flat(ids)) @ head.weight.T).argmax(axis=1)
        return float((guess == label).mean())

    for _ in range(EPOCHS):
        for at in np.array_split(rng.permutation(len(label)), len(label) // BATCH):
            bags = bag.bags(*flat([ids[line] for line in at]))  # checked once, for both uses
            means, weight = bag(bags), head.gather(everyone)
            scores = means @ weight.T
            grad = np.exp(scores - scores.max(axis=1, keepdims=True))  # softmax, minus the truth
            grad /= grad.sum(axis=1, keepdims=True)
            grad[np.arange(len(at)), label[at]] -= 1
            grad /= len(at)
            step_bag(bags, grad @ weight)
            step_head(everyone, grad.T @ means)
        right = accuracy(ids, label), accuracy(test_ids, test_label)
        print(f"  correct: train {right[0]:.1%}  test {right[1]:.1%}")
    largest = Counter(test_label.tolist()).most_common(1)[0]
    print(f"always {PACKAGES[largest[0]]}: test {largest[1] / len(test_label):.1%}\n")

    scores = bag.weight[:500] @ head.weight.T  # of the 500 most frequent words
    for package, margin in enumerate((scores - scores.mean(axis=1, keepdims=True)).T):
        best = [vocab.token(row) for row in np.argsort(-margin)[:7]]
        print(f"{PACKAGES[package]:>10}  {'  '.join(best)}")


if __name__ == "__main__":
    main()
