"""Layers of pyembed.torch and of torch over the same rows, and what their tests share."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyembed.torch as pt
from pyembed import Table, optim

ROWS, DIM, STEPS = 12, 4, 6
LAYERS = ("Embedding", "EmbeddingBag")
COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
RULES = {"SGD": "sgd", "Adagrad": "adagrad", "SparseAdam": "adam"}  # of the tables on disk
SGD = functools.partial(optim.SGD, lr=0.5)
OPTIMIZERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "SGD": (SGD, lambda p: torch.optim.SGD(p, lr=0.5)),
    "Adagrad": (functools.partial(optim.Adagrad, lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    "SparseAdam": (
        functools.partial(optim.Adam, lr=0.1),
        lambda p: torch.optim.SparseAdam(p, lr=0.1),
    ),
}


def batches(shape: tuple[int, ...] = (3, 5), count: int = STEPS) -> list[Any]:
    """Make batches of ids with duplicates, some of them the padding row."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, ROWS, shape, generator=generator) for _ in range(count)]


def weights() -> Any:
    """Make the rows with which a test begins."""
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))


def ours(layer: str = "Embedding", **options: Any) -> Any:
    """Make a layer of pyembed over a copy of these rows."""
    return getattr(pt, layer)(ROWS, DIM, _weight=weights(), **options)


def theirs(layer: str = "Embedding", **options: Any) -> Any:
    """Make torch's layer over a copy of these rows."""
    return getattr(torch.nn, layer)(ROWS, DIM, _weight=weights(), **options)


def rows_of(layer: Any) -> Any:
    """Copy all rows of a layer to a tensor."""
    return torch.from_numpy(np.array(layer.table.weight))


def on_disk(path: Path, optimizer: str | None = "sgd") -> Path:
    """Create and commit a table with these rows."""
    with Table.create(path, ROWS, DIM, optimizer) as table, table.writing() as weight:
        weight[:] = weights().numpy()
    return path


def loss_of(rows: Any) -> Any:
    """Compute a loss with a different gradient for every element."""
    return (rows * torch.arange(rows.numel()).reshape(rows.shape).cos()).sum() + rows.square().sum()


def close(a: Any, b: Any) -> None:
    """Assert equality within 1e-5: both sides compute in float32, in a different order."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
