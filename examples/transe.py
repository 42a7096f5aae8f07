"""TransE: embed a knowledge graph, here that of WordNet. pyembed and torch.nn.

A relation is a translation: head + relation should be near tail, and nearer than with a random
entity as head or tail (Bordes et al., NeurIPS 2013). The entities are the synsets of WordNet, with
a norm of at most one, the layer's `max_norm`. The example keeps one of each relation and its
inverse (kind of, has kind); otherwise half of the held-out triples would be known already.

Hits at 10, filtered: the share of held-out triples whose true tail (and true head) is among the ten
nearest entities, without counting other entities that are true as well.

Each seed trains the same model twice: with `pyembed.torch.Embedding`, its Adagrad and
`pyembed.torch.Optimizer`, and with `torch.nn.Embedding(sparse=True)` and `torch.optim.Adagrad`. The
weights at the start, the batches, the rule and the loop are the same. Expect losses that are equal
up to rounding from the first batch to the last, and one rate of hits, some thousand times that of
chance.

Run it with ``.venv/bin/python examples/transe.py``; it takes most of a minute, needs torch, and
WordNet 3.0 in /usr/share/wordnet (``apt install wordnet-base``) or where ``--wordnet`` says.
``--quick`` takes a few seconds.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pyembed
import pyembed.torch

DIM, LR, MARGIN, BATCH, OTHERS, EPOCHS = 50, 0.1, 1.5, 1024, 4, 8
PARTS = ["noun", "verb", "adj", "adv"]
INVERSE = {"~", "~i", "%m", "%p", "%s", "-c", "-r", "-u"}  # of @ @i #m #p #s ;c ;r ;u

Triple = tuple[str, str, str]


def read_triples(folder: Path, parts: list[str]) -> list[Triple]:
    """Return relations between synsets; every synset has two or more of them."""
    found: dict[frozenset[str], Triple] = {}  # one for a pair, as "similar to" goes both ways
    for part in parts:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            # wndb(5): offset, file, type, number of words in hex, two fields for each word, number
            # of pointers, four fields for each: symbol, offset, type, 0000 unless between words.
            fields = line.partition("|")[0].split()
            head, at = fields[0] + fields[2].replace("s", "a"), 5 + 2 * int(fields[3], 16)
            for i in range(at, at + 4 * int(fields[at - 1]), 4):
                symbol, offset, kind, words = fields[i : i + 4]
                if words == "0000" and symbol not in INVERSE:
                    found.setdefault(
                        frozenset([head, offset + kind]), (head, symbol, offset + kind)
                    )
    triples, size = list(found.values()), 0
    while size != len(triples):
        size, known = len(triples), Counter(end for h, _, t in triples for end in (h, t))
        triples = [triple for triple in triples if known[triple[0]] > 1 < known[triple[2]]]
    return triples


def train(entities: nn.Module, relations: nn.Module, triples: Tensor, seed: int) -> list[float]:
    """Train both tables, and return the loss of every batch."""
    model = nn.ModuleList([entities, relations])
    optimizer: torch.optim.Optimizer
    if not isinstance(entities, pyembed.torch.Embedding):
        optimizer = torch.optim.Adagrad(model.parameters(), lr=LR)
    else:  # a step for each batch, in which the entities are looked up three times
        optimizer = pyembed.torch.Optimizer(model)
    torch.manual_seed(seed)
    losses = []
    for _ in range(EPOCHS):
        for batch in triples[torch.randperm(len(triples))].split(BATCH):
            head, relation, tail = batch.T
            others = torch.randint(entities.num_embeddings, (OTHERS, len(batch)))
            is_head = (torch.rand(OTHERS, len(batch)) < 0.5)[:, :, None]
            h, r, t, o = entities(head), relations(relation), entities(tail), entities(others)
            true = (h + r - t).norm(dim=1)
            false = torch.where(is_head, o + r - t, h + r - o).norm(dim=2)
            loss = (MARGIN + true - false).relu().sum() / OTHERS
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / len(batch))
    return losses


def hits_at_10(entities: nn.Module, relations: nn.Module, test: Tensor, triples: Tensor) -> float:
    """Return how often fewer than ten false entities are nearer than the true one."""
    tails, heads = defaultdict(list), defaultdict(list)
    for head, relation, tail in triples.tolist():
        tails[head, relation].append(tail)
        heads[relation, tail].append(head)
    hits = 0
    with torch.no_grad():
        everyone = entities(torch.arange(entities.num_embeddings))
        for part in test.split(500):
            h, r, t = part.T
            also_tails = [tails[head, relation] for head, relation, _ in part.tolist()]
            also_heads = [heads[relation, tail] for _, relation, tail in part.tolist()]
            for guess, true, also in (
                (everyone[h] + relations(r), t, also_tails),
                (everyone[t] - relations(r), h, also_heads),
            ):
                distance = torch.cdist(guess, everyone)
                limit = distance.gather(1, true[:, None])
                for row, known in zip(distance, also, strict=True):
                    row[known] = torch.inf
                hits += int(((distance < limit).sum(dim=1) < 10).sum())
    return hits / (2 * len(test))


def main(arguments: list[str] | None = None) -> None:
    """For each seed, hold out triples, train both kinds of layers, and compare them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="verbs alone, one seed")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    options = parser.parse_args(arguments)
    seeds, parts = (1, ["verb"]) if options.quick else (options.seeds, PARTS)
    if not all((options.wordnet / f"data.{part}").exists() for part in parts):
        print(f"no WordNet in {options.wordnet}: apt install wordnet-base, or give --wordnet")
        return
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns without this setting

    found = read_triples(options.wordnet, parts)
    synsets, ends = np.unique([(h, t) for h, _, t in found], return_inverse=True)
    symbols, relation = np.unique([symbol for _, symbol, _ in found], return_inverse=True)
    ends = ends.reshape(-1, 2)  # flat or not, by the version of numpy
    triples = torch.from_numpy(np.stack([ends[:, 0], relation, ends[:, 1]], axis=1))
    print(f"{len(triples):,} triples of {len(synsets):,} synsets, {len(symbols)} relations")
    print(f"chance: {10 / len(synsets):.2%}\n")

    print("hits at 10  pyembed torch.nn  losses differ by at most")
    results = []
    adagrad = functools.partial(pyembed.optim.Adagrad, lr=LR)
    for seed in range(seeds):
        torch.manual_seed(seed)
        mixed = triples[torch.randperm(len(triples))]
        held_out, rest = mixed[: len(mixed) // 40], mixed[len(mixed) // 40 :]
        held_out = held_out[torch.isin(held_out[:, [0, 2]], rest[:, [0, 2]]).all(dim=1)]
        start = [  # the weight and the max_norm of entities and relations
            (torch.randn(len(synsets), DIM) / DIM**0.5, 1.0),
            (torch.randn(len(symbols), DIM) / DIM**0.5 / 10, None),
        ]
        ours = [
            pyembed.torch.Embedding.from_pretrained(
                weight.clone(), freeze=False, max_norm=norm, optimizer=adagrad
            )
            for weight, norm in start
        ]
        theirs = [
            nn.Embedding.from_pretrained(weight, freeze=False, max_norm=norm, sparse=True)
            for weight, norm in start
        ]
        losses = [train(*tables, rest, seed) for tables in (ours, theirs)]
        hits = [hits_at_10(*tables, held_out, triples) for tables in (ours, theirs)]
        results.append(hits)
        gap = np.abs(np.subtract(*losses)).max()
        print(f"seed {seed}     {hits[0]:8.1%} {hits[1]:8.1%}  {gap:.0e}")
    print("mean      ", *(f"{value:8.1%}" for value in np.mean(results, axis=0)))
    print("spread    ", *(f"{value:8.1%}" for value in np.std(results, axis=0)))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
