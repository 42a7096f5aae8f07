"""Matrix factorisation: recommend items to users, with two embedding tables.

The data are the imports of each module of Python's standard library, read with `ast`. A module is a
"user"; an imported module or name is an "item". Bayesian personalised ranking (Rendle et al., UAI
2009) trains a user's row to agree better with an imported item than with a random one:

    loss = -log sigmoid(user . (item - other) + bias[item] - bias[other]) + decay

One import of every module is held out. The hit rate at 10 is the share of modules for which it is
among the ten best items that the module is not yet known to import. Expect a hit rate well above
that of the ten most imported items, and neighbours that belong together.

Run it with ``.venv/bin/python examples/matrix_factorisation.py``; it takes a few seconds.
"""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyembed

DIM, LR, DECAY, BATCH, EPOCHS, SPLITS = 32, 0.1, 0.03, 256, 100, 5
SHOWN = ["io.StringIO", "json", "socket", "struct", "subprocess", "threading", "typing.Any"]
# Tests, and folders whose modules mostly import each other.
SKIP = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "distutils"}
Array = NDArray[Any]


def imports() -> list[tuple[str, str]]:
    """Return the distinct pairs (module, imported item), without relative imports."""
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


def train(user: Array, item: Array, seen: Array, seed: int) -> list[Array]:
    """Train, and return the scores of all pairs and the rows of the items."""
    rng, small = np.random.default_rng(seed), pyembed.init.normal(std=0.1)
    users = pyembed.Table.memory(seen.shape[0], DIM, init=small, seed=1)
    items = pyembed.Table.memory(seen.shape[1], DIM, init=small, seed=2)
    bias = pyembed.Table.memory(seen.shape[1], 1)
    optimizers = [pyembed.optim.Adagrad(table, lr=LR) for table in (users, items, bias)]
    for _ in range(EPOCHS):
        for at in np.array_split(rng.permutation(len(user)), len(user) // BATCH):
            other = rng.integers(0, items.rows, len(at))
            kept = ~seen[user[at], other]  # an item that the user has is no counter-example
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


def hit_rate(scores: Array, seen: Array, user: Array, item: Array) -> float:
    """Return how often fewer than ten unseen items score higher than the held-out one."""
    unseen = np.where(seen, -np.inf, scores)
    return float(((unseen[user] > unseen[user, item][:, None]).sum(axis=1) < 10).mean())


def main() -> None:
    """Read the imports; five times, hold some out, train, and compare with popularity."""
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
    names, rows = (x[seen.sum(axis=0) >= 5] for x in (names, rows))  # not the rare ones
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for at in np.flatnonzero(np.isin(names, SHOWN)):
        near = np.argsort(-(unit @ unit[at]))[1:5]
        print(f"{names[at]:>17}  {'  '.join(names[near])}")


if __name__ == "__main__":
    main()
