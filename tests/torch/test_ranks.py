"""In DistributedDataParallel (two processes, gloo, CPU) tables stay the same on all ranks.

One process with the joined batch is the expectation, bit for bit: gradients are halved, which is
exact, and summed in the order of the ranks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pyembed.torch as pt
from pyembed import Table, optim
from pyembed.errors import ArgumentError, LockedError
from tests.torch.models import DIM, ROWS, on_disk, ours, rows_of, weights

WORLD, STEPS = 2, 3
SGD = functools.partial(optim.SGD, lr=0.25)  # unlike Adagrad, it shows a wrong factor
ADAGRAD = functools.partial(optim.Adagrad, lr=0.1)
BAG = {"mode": "sum", "scale_grad_by_freq": True, "padding_idx": 2}
Case = dict[str, Any]
CASES: dict[str, tuple[str, Case]] = {
    "rows": ("Embedding", {"scale_grad_by_freq": True, "padding_idx": 2}),
    "bags": ("EmbeddingBag", BAG),
    "max": ("EmbeddingBag", {"mode": "max"}),
    "one step": ("EmbeddingBag", BAG),
}


def batch_of(rank: int, step: int, layer: str) -> tuple[Any, ...]:
    """Make a batch: another number of ids on each rank, once none."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    count = 0 if (rank, step) == (1, 1) else 5 + rank
    ids = torch.randint(0, ROWS, (count,), generator=generator)
    return (ids,) if layer == "Embedding" else (ids, torch.tensor([0, count // 2]))


def arguments(layer: str, options: Case, rank: int, step: int) -> tuple[Any, ...]:
    """Make the arguments of the layer: a batch, with weights for a sum of bags."""
    given = batch_of(rank, step, layer)
    weighs = layer == "EmbeddingBag" and options["mode"] == "sum"
    return (*given, given[0] / 8 + 1) if weighs else given


def coefficients(rows: Any, rank: int) -> Any:
    """Make a different gradient for each element, which can be halved exactly."""
    return (torch.arange(rows.numel()).reshape(rows.shape) % 7 - 3 + rank).float()


def train(model: Any, layer: str, options: Case, ranks: list[int], once: Any = None) -> None:
    """Train on the batches of these ranks; for several ranks on the joined batch and mean loss.

    Given an Optimizer, all backwards are one step.
    """
    for step in range(STEPS):
        given = [arguments(layer, options, rank, step) for rank in ranks]
        joined = [torch.cat(parts) for parts in zip(*given, strict=True)]
        if len(joined) > 1:
            ends = np.cumsum([0, *(len(each[0]) for each in given)])
            joined[1] = torch.cat([g[1] + int(end) for g, end in zip(given, ends, strict=False)])
        rows = model(*joined)
        sizes = [len(each[min(1, len(each) - 1)]) for each in given]
        parts = zip(rows.split(sizes), ranks, strict=True)
        losses = [(part * coefficients(part, rank)).sum() for part, rank in parts]
        (torch.stack(losses).sum() / len(losses)).backward()
    if once is not None:
        once.step()


def on_a_rank(rank: int, folder: str) -> None:
    """Run all cases on one rank and save the rows for the test."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    wrapped, found = torch.nn.parallel.DistributedDataParallel, {}
    for name, (kind, options) in CASES.items():
        layer = ours(kind, optimizer=SGD, **options)
        if rank:
            with layer.table.writing() as weight:
                weight += 1  # rank 0 sends its rows, as DDP does with parameters
        once = pt.Optimizer(layer) if name == "one step" else None
        train(wrapped(layer), kind, options, [rank], once)
        found[name] = rows_of(layer)
    path = on_disk(Path(folder) / f"{rank}.pyembed", "adagrad")
    with Table.open(path) as table:
        layer = pt.Embedding(ROWS, DIM, table=table, optimizer=ADAGRAD)
        train(wrapped(layer), "Embedding", {}, [rank])
        found["file"] = rows_of(layer)
    found |= with_dense_layers(rank, wrapped) | refused(rank, wrapped, Path(folder))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def with_dense_layers(rank: int, wrapped: Any) -> dict[str, Any]:
    """Train a table, a Parameter and a dense layer in one model, once under no_sync()."""
    torch.manual_seed(rank)
    parts = [ours(optimizer=ADAGRAD), torch.nn.Linear(DIM, DIM), ours(sparse=False)]
    model = torch.nn.ModuleList(parts)
    model.forward = lambda ids: model[1](model[0](ids)) + model[2](ids)
    outer = wrapped(model)
    stepper = torch.optim.SGD(model.parameters(), lr=0.1)
    with outer.no_sync():
        outer(torch.tensor([rank, 1])).square().mean().backward()
    outer(torch.tensor([rank, 3])).square().mean().backward()
    stepper.step()
    return {"model": [rows_of(model[0]), *(p.detach().clone() for p in model.parameters())]}


def refused(rank: int, wrapped: Any, folder: Path) -> dict[str, Any]:
    """Collect the messages of what the ranks refuse."""
    found = []

    def attempt(error: type[Exception], call: Callable[[], Any]) -> None:
        try:
            call()
        except error as raised:
            found.append(str(raised))

    ids = torch.tensor([1])
    attempt(ArgumentError, lambda: wrapped(ours(optimizer=ADAGRAD, max_norm=1.0))(ids))
    rate = functools.partial(optim.SGD, lr=0.1 + rank)
    attempt(ArgumentError, lambda: wrapped(ours(optimizer=rate))(ids))
    layer = ours(optimizer=ADAGRAD)
    if rank:
        pt.Optimizer(layer)
    attempt(ArgumentError, lambda: wrapped(layer)(ids))
    joined = wrapped(torch.nn.Sequential(ours(optimizer=ADAGRAD), torch.nn.Linear(DIM, 1)))

    def in_join() -> None:
        with joined.join():
            joined(ids)

    attempt(ArgumentError, in_join)
    path = folder / "0.pyembed"
    table = Table.open(path) if rank == 0 else None
    dist.barrier()
    if rank:
        attempt(LockedError, lambda: Table.open(path))
        table = Table.open(folder / "1.pyembed", "r")
    layer = pt.Embedding(ROWS, DIM, table=table, optimizer=ADAGRAD)
    attempt(ArgumentError, lambda: wrapped(layer)(ids))
    dist.barrier()
    layer.table.close()
    return {"refused": found}


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs gloo")
def test_two_processes(tmp_path: Path) -> None:
    """Every table equals that of one process with the joined batch; all ranks refuse together.

    Cases: batches of different lengths, one of them empty; bags with weights, offsets and maxima;
    scale_grad_by_freq, which counts in the joined batch; a file for each rank; a model with dense
    layers; three backwards as one step.
    """
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for name, (kind, options) in (CASES | {"file": ("Embedding", {})}).items():
        layer = ours(kind, optimizer=ADAGRAD if name == "file" else SGD, **options)
        once = pt.Optimizer(layer) if name == "one step" else None
        train(layer, kind, options, list(range(WORLD)), once)
        for found in ranks:
            assert torch.equal(found[name], rows_of(layer)), name
        assert not torch.equal(rows_of(layer), weights())
    for mine, others in zip(*(found["model"] for found in ranks), strict=True):
        assert torch.equal(mine, others)
    for rank, texts in enumerate(found["refused"] for found in ranks):
        words = ["max_norm of the optimizer", "rank 1 has", "Optimizer or not", "join()"]
        words += [*["0.pyembed"] * rank, "rank 1 has"]
        assert len(texts) == len(words)
        assert all(word in text for word, text in zip(words, texts, strict=True))
