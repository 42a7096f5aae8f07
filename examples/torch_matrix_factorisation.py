"""Matrix factorisation in torch: which methods does a module call? pyembed against torch.nn.

The model is that of `matrix_factorisation.py`, with autograd instead of hand-written gradients. A
module of Python's standard library is a "user", and the name of a method that it calls is an
"item". Bayesian personalised ranking demands that a user's row agrees better with an item of the
user than with a random item. One call of every module is held out; the hit rate at 10 is the share
of held-out calls among the ten best of those that the module is not yet known to make.

Each seed trains the same model twice: with three `pyembed.torch.Embedding`, their Adagrad and
`pyembed.torch.Optimizer`, and with three `torch.nn.Embedding(sparse=True)` and
`torch.optim.Adagrad`. The weights at the start, the batches, the rule and the loop are the same.
Expect losses that are equal up to rounding from the first batch to the last, and equal hit rates,
well above that of the ten methods that most modules call.

Run it with ``.venv/bin/python examples/torch_matrix_factorisation.py``; it takes a few seconds for
each seed and needs torch. ``--quick`` takes a few seconds.
"""

from __future__ import annotations

import argparse
import functools
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pyembed
import pyembed.torch

DIM, LR, DECAY, BATCH = 32, 0.1, 0.03, 256
# Tests, and modules that some installations lack.
SKIP = {"test", "tests", "site-packages", "dist-packages", "idlelib", "distutils", "lib2to3"}


def calls() -> list[tuple[str, str]]:
    """List the pairs (module, name of a method that it calls), without rare ones."""
    root, pairs = Path(sysconfig.get_path("stdlib")), set()
    for file in root.rglob("*.py"):
        module = file.relative_to(root)
        if not SKIP & set(module.parts):
            text = file.read_text(encoding="utf-8", errors="replace")
            pairs |= {(str(module), name) for name in re.findall(r"\.([A-Za-z_]\w*)\(", text)}
    popular = Counter(name for _, name in pairs)
    pairs = {pair for pair in pairs if popular[pair[1]] >= 3}
    active = Counter(module for module, _ in pairs)
    return sorted(pair for pair in pairs if active[pair[0]] >= 5)


def train(
    tables: list[nn.Module], pairs: Tensor, seen: Tensor, seed: int, epochs: int
) -> list[float]:
    """Train users, items and the items' biases; return the loss of every batch."""
    users, items, biases = model = nn.ModuleList(tables)
    optimizer: torch.optim.Optimizer
    if not isinstance(users, pyembed.torch.Embedding):
        optimizer = torch.optim.Adagrad(model.parameters(), lr=LR)
    else:  # because a batch looks up items twice
        optimizer = pyembed.torch.Optimizer(model)
    torch.manual_seed(seed)
    losses = []
    for _ in range(epochs):
        for batch in pairs[torch.randperm(len(pairs))].split(BATCH):
            other = torch.randint(seen.shape[1], (len(batch),))
            kept = ~seen[batch[:, 0], other]  # an item of the user is not a counter-example
            user, item, other = batch[kept, 0], batch[kept, 1], other[kept]
            x, y, z = users(user), items(item), items(other)
            better = (x * (y - z)).sum(dim=1) + (biases(item) - biases(other))[:, 0]
            decay = x.square().sum() + y.square().sum() + z.square().sum()
            loss = DECAY / 2 * decay - nn.functional.logsigmoid(better).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / len(user))
    return losses


def hit_rate(scores: Tensor, seen: Tensor, held_out: Tensor) -> float:
    """Return how often fewer than ten unseen items score higher than the held-out one."""
    user, item = held_out.T
    unseen = scores.masked_fill(seen, -torch.inf)
    return float(((unseen[user] > unseen[user, item][:, None]).sum(dim=1) < 10).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Read the calls, train twice for each seed, and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer epochs")
    options = parser.parse_args(arguments)
    seeds, epochs = (1, 5) if options.quick else (options.seeds, 20)
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; unset, torch warns

    names = calls()
    users, user = np.unique([module for module, _ in names], return_inverse=True)
    items, item = np.unique([name for _, name in names], return_inverse=True)
    shape = len(users), len(items)
    print(f"{shape[0]} modules call {shape[1]} methods: {len(names):,} pairs\n")
    print("hit rate   pyembed torch.nn  popular  losses differ by at most")
    results = []
    adagrad = functools.partial(pyembed.optim.Adagrad, lr=LR)
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(user))
        pairs = torch.from_numpy(np.stack([user, item], axis=1)[order])
        first = np.zeros(len(user), bool)
        first[np.unique(user[order], return_index=True)[1]] = True  # one pair of each user
        held_out, rest = pairs[first], pairs[~first]
        seen = torch.zeros(shape, dtype=torch.bool)
        seen[rest[:, 0], rest[:, 1]] = True

        torch.manual_seed(seed)
        weights = [0.1 * torch.randn(rows, DIM) for rows in shape] + [torch.zeros(shape[1], 1)]
        ours = [
            pyembed.torch.Embedding.from_pretrained(w.clone(), freeze=False, optimizer=adagrad)
            for w in weights
        ]
        theirs = [nn.Embedding.from_pretrained(w, freeze=False, sparse=True) for w in weights]
        losses, rates = [], []
        for tables in (ours, theirs):
            losses.append(train(tables, rest, seen, seed, epochs))
            x, y, bias = (table.state_dict()["weight"] for table in tables)
            rates.append(hit_rate(x @ y.T + bias[:, 0], seen, held_out))
        rates.append(hit_rate(seen.sum(dim=0).float().expand(shape), seen, held_out))
        results.append(rates)
        gap = np.abs(np.subtract(*losses)).max()
        print(f"seed {seed}   {rates[0]:8.1%} {rates[1]:8.1%} {rates[2]:8.1%}  {gap:.0e}")
    print("mean    ", *(f"{value:8.1%}" for value in np.mean(results, axis=0)))
    print("spread  ", *(f"{value:8.1%}" for value in np.std(results, axis=0)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
