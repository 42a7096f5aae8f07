"""Matrix factorisation: recommend from who-took-what, with two embedding tables.

The data: what each module of Python's standard library imports, read with `ast`. A module is a
"user"; what it imports, a module or a name of one, is an "item". Bayesian personalised ranking
(Rendle et al., UAI 2009) asks that a user's row agrees better with an imported item than with one
drawn at random:

    loss = -log sigmoid(user . (item - other) + bias[item] - bias[other]) + decay

One import of every module is held out. The question is whether it is among the ten best of those
that the module is not yet known to import: the hit rate at 10. What to look for: a hit rate well
above that of the ten most imported, and neighbours that belong together.

Run it with ``.venv/bin/python examples/matrix_factorisation.py``; it takes a few seconds.
"""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

import pyembed

DIM, LR, DECAY, BATCH, EPOCHS, SPLITS = 32, 0.1, 0.03, 256, 100, 5
SHOWN = ["io.StringIO", "json", "socket", "struct", "subprocess", "threading", "typing.Any"]
# Tests, and folders whose modules import little but each other.
SKIP = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "distutils"}


def imports() -> list[tuple[str, str]]:
    """Pairs (module, what it imports), each once; relative imports aside."""
    root, pairs = Path(sysconfig.get_path("stdlib")), set()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).with_suffix("")
        try:
            nodes = [] if SKIP & set(name.parts) else ast.walk(ast.parse(file.read_bytes()))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            pairs |= {(".".join(name.parts), item) for item in found}
    popular = Counter(item for _, item in pairs)
    pairs = {pair for pair in pairs if popular[pair[1]] > 1}
    active = Counter(user for user, _ in pairs)
    return sorted(pair for pair in pairs if active[pair[0]] > 2)


def train(user: np.ndarray, item: np.ndarray, seen: np.ndarray, seed: int) -> list[np.ndarray]:
    """Scores of all pairs, and the rows of the items."""
    rng, small = np.random.default_rng(seed), pyembed.init.normal(std=0.1)
    users = pyembed.Table.memory(seen.shape[0], DIM, init=small, seed=1)
    items = pyembed.Table.memory(seen.shape[1], DIM, init=small, seed=2)
    bias = pyembed.Table.memory(seen.shape[1], 1)
    optimizers = [pyembed.optim.Adagrad(table, lr=LR) for table in (users, items, bias)]
    for _ in range(EPOCHS):
        for at in np.array_split(rng.permutation(len(user)), len(user) // BATCH):
            other = rng.integers(0, items.rows, len(at))
            kept = ~seen[user[at], other]  # what the user did take is no counter-example
            u, pair = user[at[kept]], np.stack([item[at], other], axis=1)[kept]
            x, y, b = users.gather(u), items.gather(pair), bias.gather(pair)[..., 0]
            difference = y[:, 0] - y[:, 1]
            margin = (x * difference).sum(axis=1) + b[:, 0] - b[:, 1]
            slope = (-1 / (1 + np.exp(margin)))[:, None]
            signed = np.stack([slope, -slope], axis=1)
            optimizers[0].step(u, slope * difference + DECAY * x)
            optimizers[1].step(pair, signed * x[:, None] + DECAY * y)
            optimizers[2].step(pair, signed)
    return [users.weight @ items.weight.T + bias.weight[:, 0], items.weight]


def hit_rate(scores: np.ndarray, seen: np.ndarray, user: np.ndarray, item: np.ndarray) -> float:
    """How often fewer than ten unseen items score higher than the held-out one."""
    unseen = np.where(seen, -np.inf, scores)
    return float(((unseen[user] > unseen[user, item][:, None]).sum(axis=1) < 10).mean())


def main() -> None:
    """Read, hold out, train, compare; five times."""
    pairs = imports()
    users, user = np.unique([user for user, _ in pairs], return_inverse=True)
    names, item = np.unique([item for _, item in pairs], return_inverse=True)
    print(f"{len(users)} modules import {len(names)} things: {len(pairs):,} imports")
    rates = []
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(user))
        first = order[np.unique(user[order], return_index=True)[1]]  # one import of every user
        rest = np.setdiff1d(order, first)
        seen = np.zeros((len(users), len(names)), bool)
        seen[user[rest], item[rest]] = True
        scores, rows = train(user[rest], item[rest], seen, split)
        both = scores, seen.sum(axis=0) + np.zeros(seen.shape)
        rates.append([hit_rate(x, seen, user[first], item[first]) for x in both])
    ours, popular = np.mean(rates, axis=0)
    print(f"hit rate at 10, mean of {SPLITS} splits with {len(users)} imports held out:")
    print(f"  two tables {ours:.1%}, the most imported {popular:.1%}\n")
    names, rows = (x[seen.sum(axis=0) >= 5] for x in (names, rows))  # rare ones say little
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for at in np.flatnonzero(np.isin(names, SHOWN)):
        near = np.argsort(-(unit @ unit[at]))[1:5]
        print(f"{names[at]:>17}  {'  '.join(names[near])}")


if __name__ == "__main__":
    main()
