"""Layers of pyembed.torch and of torch over the same rows, for their tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyembed import Table, optim

torch = pytest.importorskip("torch")

import pyembed.torch as pt  # noqa: E402 -- only where there is torch

ROWS, DIM, STEPS = 12, 4, 6
LAYERS = ("Embedding", "EmbeddingBag")
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
    """Ids with duplicates, some of them the padding row."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, ROWS, shape, generator=generator) for _ in range(count)]


def weights() -> Any:
    """The rows that a test begins with."""
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))


def ours(layer: str = "Embedding", **options: Any) -> Any:
    """A layer over a copy of these rows."""
    return getattr(pt, layer)(ROWS, DIM, _weight=weights(), **options)


def theirs(layer: str = "Embedding", **options: Any) -> Any:
    """Torch's layer over a copy of these rows."""
    return getattr(torch.nn, layer)(ROWS, DIM, _weight=weights(), **options)


def rows_of(layer: Any) -> Any:
    """All rows, as a tensor."""
    return torch.from_numpy(np.array(layer.table.weight))


def on_disk(path: Path, optimizer: str | None = "sgd") -> Path:
    """A committed table with these rows."""
    with Table.create(path, ROWS, DIM, optimizer) as table, table.writing() as weight:
        weight[:] = weights().numpy()
    return path


def loss_of(rows: Any) -> Any:
    """Every element has a gradient of its own."""
    return (rows * torch.arange(rows.numel()).reshape(rows.shape).cos()).sum() + rows.square().sum()


def close(a: Any, b: Any) -> None:
    """Equal within 1e-5."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
