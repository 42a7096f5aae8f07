"""Refusals of the torch layers are typed errors that leave the rows as they were."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyembed.torch as pt
from pyembed import Table, optim
from pyembed.errors import (
    ArgumentError,
    ClosedError,
    DTypeError,
    IdError,
    NonFiniteError,
    ReadOnlyError,
)
from tests.torch.models import (
    DIM,
    LAYERS,
    ROWS,
    SGD,
    batches,
    on_disk,
    ours,
    rows_of,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_bad_input(layer: str, optimizer: Any) -> None:
    """A wrong dtype, device or id raises a typed error and changes no row."""
    module = ours(layer, optimizer=optimizer)
    good = batches()[0]
    for bad, error in (
        (good.float(), DTypeError),
        (good.bool(), DTypeError),
        (good.numpy(), DTypeError),
        (good.to("meta"), ArgumentError),
        (good - ROWS, IdError),
        (good + ROWS, IdError),
    ):
        with pytest.raises(error):
            module(bad)
    for cast in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises(DTypeError, match="allowed: float32"):
            copy.deepcopy(module).to(cast)(good)
    with pytest.raises(NonFiniteError) if optimizer else pytest.raises(ArithmeticError):
        (module(good) * float("nan")).sum().backward()
        raise ArithmeticError  # as in torch, weight.grad takes a NaN
    assert torch.equal(rows_of(module), weights())


def test_bad_bags() -> None:
    """Wrong offsets and weights of bags are refused before a kernel runs."""
    bag, ids = ours("EmbeddingBag", mode="sum"), torch.arange(6)
    for offsets in (None, torch.tensor([1, 3]), torch.tensor([0, 7]), torch.tensor([0, 4, 2])):
        with pytest.raises(ArgumentError):
            bag(ids, offsets)
    with pytest.raises(DTypeError):
        bag(ids, torch.tensor([0]), torch.ones(6, dtype=torch.float64))
    with pytest.raises(ArgumentError):
        bag(ids, torch.tensor([0]), torch.ones(5))


@pytest.mark.parametrize(
    "options, error",
    [
        ({"table": Table.memory(3, DIM)}, ArgumentError),
        ({"table": Table.memory(ROWS, DIM), "_weight": weights()}, ArgumentError),
        ({"_weight": weights().double()}, DTypeError),
        ({"_weight": weights().numpy()}, DTypeError),
        ({"_weight": weights().to("meta")}, DTypeError),
        ({"_weight": weights()[0]}, ArgumentError),
        ({"dtype": torch.float16}, ArgumentError),
        ({"device": "meta"}, ArgumentError),
        ({"device": "cuda"}, ArgumentError),  # as a Parameter
        ({"padding_idx": ROWS}, ArgumentError),
        ({"seed": 1}, TypeError),
        ({"num_threads": 1}, TypeError),
        ({"optimizer": torch.optim.SGD}, DTypeError),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, DTypeError),
        ({"optimizer": optim.SGD(Table.memory(ROWS, DIM))}, DTypeError),
        ({"optimizer": lambda layer: None}, DTypeError),
        ({"optimizer": SGD, "_freeze": True}, ArgumentError),
    ],
)
def test_bad_construction(options: dict[str, Any], error: type[Exception]) -> None:
    """Arguments that contradict each other or are out of range are refused."""
    with pytest.raises(error):
        pt.Embedding(ROWS, DIM, **options)


def test_files_without_an_optimizer(path: Path) -> None:
    """A file needs optimizer= or a frozen layer; after the refusal it is free to open."""
    on_disk(path)
    with pytest.raises(ArgumentError, match="optimizer="):
        pt.Embedding(ROWS, DIM, path=path)
    with Table.open(path) as table, pytest.raises(ArgumentError, match="optimizer="):
        pt.Embedding(ROWS, DIM, table=table)


def test_read_only_rows_stay_as_they_are(path: Path) -> None:
    """Writing to looked-up rows does not change a read-only file, and max_norm is refused."""
    layer = pt.Embedding(ROWS, DIM, path=on_disk(path), _freeze=True)
    layer(torch.arange(ROWS)).fill_(9)
    layer.state_dict()["weight"].fill_(9)
    assert torch.equal(rows_of(layer), weights())
    with pytest.raises(ReadOnlyError):
        layer.load_state_dict({"weight": weights()})
    layer.table.close()
    layer = pt.Embedding(ROWS, DIM, path=path, _freeze=True, max_norm=0.1)
    with pytest.raises(ReadOnlyError):
        layer(torch.arange(ROWS))


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_double_backward(layer: str, optimizer: Any) -> None:
    """A second derivative is refused before the table changes."""
    module = ours(layer, optimizer=optimizer)
    rows = module(batches()[0])
    with pytest.raises(ArgumentError, match="create_graph"):
        rows.square().sum().backward(create_graph=True)
    assert torch.equal(rows_of(module), weights())


def test_use_after_close() -> None:
    """A closed table raises a typed error in forward and in backward."""
    layer = ours(optimizer=SGD)
    rows = layer(torch.tensor([1]))
    layer.table.close()
    with pytest.raises(ClosedError):
        rows.sum().backward()
    with pytest.raises(ClosedError):
        layer(torch.tensor([1]))


def test_rows_that_changed_in_between() -> None:
    """Backward of max and per_sample_weights refuses rows that changed since forward."""
    ids = batches()[0]
    for options, psw in (({"mode": "max"}, None), ({"mode": "sum"}, torch.ones(3, 5))):
        for optimizer in (SGD, None):
            bag = ours("EmbeddingBag", optimizer=optimizer, **options)
            first, second = bag(ids, None, psw), bag(ids, None, psw)
            first.sum().backward()
            if optimizer is None:
                torch.optim.SGD(bag.parameters(), lr=0.1).step()
            with pytest.raises((ArgumentError, RuntimeError), match=r"changed|modified"):
                second.sum().backward()


def test_layer_may_go_before_backward() -> None:
    """The graph keeps the rows that it needs when the layer is deleted."""
    table = Table.from_array(weights().numpy())
    rows = pt.Embedding(ROWS, DIM, table=table, optimizer=SGD)(torch.tensor([1]))
    rows.sum().backward()
    assert torch.equal(torch.from_numpy(np.array(table.weight[1])), weights()[1] - 0.5)
