"""`weight` of a layer over a table: an operation of torch works as on a Parameter, or raises."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyembed.torch as pt
from pyembed.errors import ArgumentError, DTypeError
from tests.torch.models import DIM, LAYERS, ROWS, SGD, batches, on_disk, ours, rows_of, weights

init = nn.init


def _assign(weight: Any) -> None:
    weight.data = torch.ones(ROWS, DIM)


def _clear_padding(weight: Any) -> None:
    weight[2].fill_(0)
    weight.data[3] = 0
    init.constant_(weight[4:6], 0)


WRITES: dict[str, Callable[[Any], object]] = {
    "normal": lambda w: init.normal_(w, 0, 0.02),
    "uniform": lambda w: init.uniform_(w, -1, 1),
    "xavier": init.xavier_uniform_,
    "kaiming": init.kaiming_normal_,
    "trunc_normal": lambda w: init.trunc_normal_(w, std=0.02),
    "orthogonal": init.orthogonal_,
    "constant": lambda w: init.constant_(w, 2),
    "zeros": init.zeros_,
    "data.copy_": lambda w: w.data.copy_(torch.ones(ROWS, DIM)),
    "data.normal_": lambda w: w.data.normal_(mean=0.0, std=0.02),
    "data.uniform_": lambda w: w.data.uniform_(-0.1, 0.1),
    "data.zero_": lambda w: w.data.zero_(),
    "data *=": lambda w: operator.imul(w.data, 2),
    "data =": _assign,
    "parts": _clear_padding,
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    """Initialisers and in-place operations give a table in memory the values of a Parameter."""
    mine, twin = ours(optimizer=SGD), nn.Embedding.from_pretrained(weights(), freeze=False)
    for layer in (mine, twin):
        torch.manual_seed(1)
        with torch.no_grad():
            WRITES[name](layer.weight)
    assert torch.equal(rows_of(mine), twin.weight.detach())


@pytest.mark.parametrize("name", WRITES)
def test_a_file_is_not_overwritten(name: str, path: Path) -> None:
    """The same operations on a table in a file raise an error, and no row changes."""
    layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=SGD)
    with (
        pytest.raises((ArgumentError, RuntimeError), match=r"run to run|inference"),
        torch.no_grad(),
    ):
        WRITES[name](layer.weight)
    assert torch.equal(rows_of(layer), weights())
    layer.table.close()


READS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda w: w.shape,
    "size": lambda w: w.size(1),
    "numel": lambda w: w.numel(),
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "requires_grad": lambda w: w.requires_grad,
    "grad": lambda w: w.grad,
    "len": len,
    "mean": lambda w: w.mean().item(),
    "norm": lambda w: torch.linalg.norm(w).item(),
    "row": lambda w: w[3].tolist(),
    "element": lambda w: float(w.detach()[3, 1]),
    "rows": lambda w: w[torch.tensor([[1, 2], [3, 3]])].tolist(),
    "mask": lambda w: w[torch.arange(ROWS) > 7].tolist(),
    "equal": lambda w: (w == weights()).all().item(),
    "torch.equal": lambda w: torch.equal(w, weights()),
    "linear": lambda w: nn.functional.linear(torch.ones(2, DIM), w).tolist(),
    "matmul": lambda w: (torch.ones(2, DIM) @ w.t()).tolist(),
    "arithmetic": lambda w: (1 - 2 * w / 4 + w).tolist(),
    "numpy": lambda w: w.detach().cpu().numpy().tolist(),
    "array": lambda w: np.asarray(w.data).tolist(),
    "clone": lambda w: w.clone().tolist(),
    "lookup": lambda w: nn.functional.embedding(torch.tensor([1, 5]), w).tolist(),
}


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("name", READS)
def test_reads(name: str, where: str, path: Path) -> None:
    """Attributes and operations give the results of a Parameter, for rows in memory and files."""
    layer = ours(optimizer=SGD)
    if where == "file":
        layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=SGD)
    twin = nn.Embedding.from_pretrained(weights(), freeze=False)
    assert READS[name](layer.weight) == READS[name](twin.weight)
    layer.table.close()


def test_copies_are_tensors() -> None:
    """A deepcopy of the weight is a tensor of its own."""
    layer = ours(optimizer=SGD)
    found = copy.deepcopy(layer.weight)
    assert type(found) is torch.Tensor and torch.equal(found, weights())
    found.zero_()
    assert torch.equal(rows_of(layer), weights())


def test_gradients_of_the_weight() -> None:
    """weight[ids] trains as layer(ids); any other gradient of the weight is refused in backward."""
    layer, twin = ours(optimizer=SGD), ours(optimizer=SGD)
    ids, x = batches()[0], torch.ones(2, DIM, requires_grad=True)
    layer.weight[ids].square().sum().backward()
    twin(ids).square().sum().backward()
    assert torch.equal(rows_of(layer), rows_of(twin)) and layer.optimizer.steps == 1
    for lost in (lambda w: nn.functional.linear(x, w), lambda w: w.norm(), lambda w: w[1]):
        with pytest.raises(ArgumentError, match="learn from layer"):
            (lost(layer.weight) * 1).sum().backward()
    nn.functional.linear(x, layer.weight.detach()).sum().backward()
    assert x.grad is not None and torch.equal(rows_of(layer), rows_of(twin))


def test_freezing_through_the_weight() -> None:
    """weight.requires_grad = False freezes the layer, and True unfreezes it."""
    layer = ours(optimizer=SGD)
    layer.weight.requires_grad = False
    assert not layer(torch.tensor([1])).requires_grad and not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    layer(torch.tensor([1])).sum().backward()
    assert layer.optimizer.steps == 1


def _replace(layer: Any) -> None:
    layer.weight = nn.Parameter(weights())


def _tie(layer: Any) -> None:
    layer.weight = nn.Linear(DIM, ROWS).weight


def _other_shape(layer: Any) -> None:
    layer.weight.data = torch.ones(1, DIM)


def _gradient(layer: Any) -> None:
    layer.weight.grad = torch.ones(ROWS, DIM)


@pytest.mark.parametrize("write", [_replace, _tie, _other_shape, _gradient])
def test_what_a_table_refuses(write: Callable[[Any], None]) -> None:
    """A replaced or tied weight, data of another shape and an assigned gradient are refused."""
    layer = ours(optimizer=SGD)
    with pytest.raises(ArgumentError, match=r"weight|allowed"):
        write(layer)
    assert torch.equal(rows_of(layer), weights())


def test_optimizers_of_torch() -> None:
    """Torch's optimizers and a dense layer refuse the weight of a table."""
    layer = ours(optimizer=SGD)
    with pytest.raises(TypeError, match="WeightInTable"):
        torch.optim.SGD([layer.weight], lr=0.1)
    with pytest.raises(ArgumentError, match="updates itself"):
        torch.optim.SGD(layer.weight, lr=0.1)
    with pytest.raises(TypeError, match="WeightInTable"):
        nn.Linear(DIM, ROWS).weight = layer.weight


# --- models of others -----------------------------------------------------------------------------


def _init_weights(module: nn.Module) -> None:
    """Initialise as GPT and BERT do."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
        module.weight.data.normal_(mean=0.0, std=0.02)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight.data[module.padding_idx].zero_()


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_models_initialise_it(layer: str, optimizer: Any) -> None:
    """model.apply(init_weights) finds the layer, and gives it the rows of torch.nn."""
    found = []
    options = {"padding_idx": 1}
    twin = getattr(nn, layer)(ROWS, DIM, **options)
    for each in (getattr(pt, layer)(ROWS, DIM, optimizer=optimizer, **options), twin):
        torch.manual_seed(5)
        nn.Sequential(each).apply(_init_weights)
        found.append(each.weight.detach().clone())
    assert isinstance(each, getattr(nn, layer)) and torch.equal(*found)


def test_a_parameter_of_another_width() -> None:
    """A new Parameter changes embedding_dim, lookups, gradients and repr, as its shape says."""
    layer = ours(sparse=True)
    layer.weight = nn.Parameter(torch.ones(7, 2))
    layer(torch.tensor([6])).sum().backward()
    assert (layer.num_embeddings, layer.embedding_dim) == (7, 2)
    assert layer.weight.grad.shape == (7, 2) and "7, 2" in repr(layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_positional_arguments(layer: str) -> None:
    """Arguments in torch's order mean the same, in the constructor and in from_pretrained."""
    extra = (0,) if layer == "Embedding" else (1.5,)
    mine = getattr(pt, layer).from_pretrained(weights(), True, *extra)
    twin = getattr(nn, layer).from_pretrained(weights(), True, *extra)
    assert (mine.padding_idx, mine.max_norm) == (twin.padding_idx, twin.max_norm)


def test_defaults_of_torch(tmp_path: Path) -> None:
    """A default device or dtype that the rows cannot have, and a missing folder, are refused."""
    with torch.device("meta"), pytest.raises(ArgumentError, match="outside of"):
        pt.Embedding(ROWS, DIM)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ArgumentError, match=r"dtype=torch\.float32"):
            pt.Embedding(ROWS, DIM)
        assert pt.Embedding(ROWS, DIM, dtype=torch.float32).weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(FileNotFoundError, match=r"Table\.create"):
        pt.Embedding(ROWS, DIM, path=tmp_path / "none", optimizer=SGD)


def test_casts_and_tracers() -> None:
    """A cast layer and a tracer of torch.fx get errors that name the remedy."""
    layer = ours(optimizer=SGD)
    with pytest.raises(DTypeError, match=r"layer\.float\(\)"):
        layer.to(torch.bfloat16)(torch.tensor([1]))
    assert layer.float()(torch.tensor([1])).shape == (1, DIM)
    with pytest.raises(DTypeError, match=r"torch\.export"):
        torch.fx.symbolic_trace(layer)
    with pytest.raises(ArgumentError, match="not its parameters"):
        pt.Optimizer(layer.parameters())
