"""Protocols of torch other than training: the layers of torch.nn are the expectation."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import pyembed
import pyembed.torch as pt
from pyembed import Table
from pyembed.errors import ArgumentError, LockedError, TableError
from pyembed.torch import ops
from tests.torch.models import (
    DIM,
    LAYERS,
    ROWS,
    SGD,
    batches,
    close,
    loss_of,
    on_disk,
    ours,
    rows_of,
    theirs,
    weights,
)


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer: str, optimizer: Any) -> None:
    """Autocast leaves rows and steps in float32 and casts later layers, as in torch."""
    ids = batches()[0]
    mine, twin = ours(layer, optimizer=optimizer), theirs(layer)
    linear = torch.nn.Linear(DIM, 3)
    for each in (mine, twin):
        with torch.autocast("cpu", torch.bfloat16):
            rows = each(ids)
            out = linear(rows)
        assert (rows.dtype, out.dtype) == (torch.float32, torch.bfloat16)
        out.float().sum().backward()
    if optimizer is None:
        close(mine.weight.grad, twin.weight.grad)
    else:
        close(rows_of(mine), weights() - 0.5 * twin.weight.grad)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [{}, {"optimizer": SGD}, {"_freeze": True}])
def test_export(layer: str, options: dict[str, Any]) -> None:
    """An exported program accepts other sizes, and refuses to run once its layer is gone."""
    module, ids = ours(layer, **options), batches()[0]
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, (ids,), dynamic_shapes=({0: rows},)).module()
    for given in (ids, ids[:2]):
        assert torch.equal(program(given), module(given))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    with pytest.raises(ArgumentError, match="the layer of this graph is gone"):
        program(ids)


def test_weight_tying() -> None:
    """A Parameter can be tied to a dense layer, as in torch; a weight in a table is refused."""
    ids, out = batches()[0], []
    for layer in (ours(), theirs()):
        tied = torch.nn.Linear(DIM, ROWS, bias=False)
        tied.weight = layer.weight
        step = torch.optim.SGD([*layer.parameters(), *tied.parameters()][:1], lr=0.1)
        loss_of(tied(layer(ids))).backward()
        step.step()
        assert tied.weight is layer.weight
        out.append(layer.weight.detach())
    close(*out)
    with pytest.raises(TypeError, match="WeightInTable"):
        torch.nn.Linear(DIM, ROWS).weight = ours(optimizer=SGD).weight


class _Halved(torch.nn.Module):
    """A parametrisation that halves the weight."""

    def forward(self, weight: Any) -> Any:
        return weight / 2


@pytest.mark.parametrize("layer", LAYERS)
def test_parametrised_weight(layer: str) -> None:
    """A parametrised weight can be moved, is looked up, and passes its gradient on."""
    ids, found = batches()[0], []
    for each in (ours(layer), theirs(layer)):
        torch.nn.utils.parametrize.register_parametrization(each, "weight", _Halved())
        each.to("cpu")
        loss_of(each(ids)).backward()
        found.append((each(ids), each.parametrizations.weight.original.grad))
    for mine, expected in zip(*found, strict=True):
        close(mine, expected)


@pytest.mark.parametrize("depth", [0, 1])
def test_share_memory(depth: int) -> None:
    """share_memory shares a Parameter, accepts a frozen table, and refuses a table that learns.

    The refused layer works as before.
    """
    shared, frozen = ours(), ours(_freeze=True)
    layer = ours(optimizer=SGD)
    model = torch.nn.Sequential(layer) if depth else layer
    with pytest.raises(ArgumentError, match="would not see"):
        model.share_memory()
    model.to("cpu")(torch.tensor([1])).sum().backward()
    assert layer.optimizer.steps == 1
    assert shared.share_memory().weight.is_shared()
    assert torch.equal(frozen.share_memory()(torch.arange(ROWS)), weights())


def test_checkpointing() -> None:
    """A checkpointed block runs forward twice and steps once."""
    layer, ids = ours(optimizer=SGD), batches()[0]
    twin = ours(optimizer=SGD)
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpoint(lambda ids: loss_of(layer(ids)), ids, use_reentrant=False).backward()
    loss_of(twin(ids)).backward()
    assert layer.optimizer.steps == 1 and torch.equal(rows_of(layer), rows_of(twin))


# --- data -----------------------------------------------------------------------------------------


class _Rows(torch.utils.data.Dataset[Any]):
    """A dataset of ids, and of the rows that a worker looked up for them."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.ids = layer, torch.stack(batches((4,), 12))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> tuple[Any, Any]:
        with torch.no_grad():
            return self.ids[at], self.layer(self.ids[at])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # from Python 3.12 on
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_data_loader(workers: int, path: Path) -> None:
    """Workers look up rows in a file or in memory while the loop trains another table."""
    frozen = pt.Embedding.from_pretrained(on_disk(path))
    layer, twin = ours(optimizer=SGD), ours(optimizer=SGD)
    loss_of(layer(torch.arange(ROWS))).backward()  # starts threads
    loss_of(twin(torch.arange(ROWS))).backward()
    for source in (frozen, ours(_freeze=True)):
        data = _Rows(source)
        for ids, rows in torch.utils.data.DataLoader(data, batch_size=3, num_workers=workers):
            assert torch.equal(rows, weights()[ids])
            loss_of(layer(ids)).backward()
        for ids in data.ids.split(3):
            loss_of(twin(ids)).backward()
    assert torch.equal(rows_of(layer), rows_of(twin))


class _Steps(torch.utils.data.Dataset[Any]):
    """A dataset whose worker tries to write."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 1

    def __getitem__(self, at: int) -> str:
        try:
            self.layer.optimizer.step([0], weights()[:1].numpy())
        except TableError as error:
            return str(error)
        return ""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_worker_cannot_write(path: Path) -> None:
    """A step in a forked worker on the parent's file is refused."""
    layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=SGD)
    [[text]] = torch.utils.data.DataLoader(_Steps(layer), num_workers=1)
    assert "before a fork" in text
    layer.table.close()


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_lookahead(optimizer: Any, path: Path) -> None:
    """lookahead yields a DataLoader's batches in order, and training is the same without it."""
    twin = ours(optimizer=optimizer)
    if optimizer is None:
        layer = ours()
    else:
        layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=optimizer)
    ids = torch.stack(batches((4,), 12))
    data = torch.utils.data.TensorDataset(ids, ids.float())
    seen = []
    for batch in pyembed.lookahead(
        torch.utils.data.DataLoader(data, batch_size=3), layer, ids=lambda batch: batch[0]
    ):
        seen.append(batch[1])
        loss_of(layer(batch[0])).backward()
    for each in ids.split(3):
        loss_of(twin(each)).backward()
    assert torch.equal(torch.cat(seen), ids.float()) and len(seen) == 4
    assert torch.equal(rows_of(layer), rows_of(twin))
    [last] = pyembed.lookahead(ids[:1], layer)  # a batch that is its ids
    assert torch.equal(last, ids[0])
    layer.table.close()


# --- gradients, ops -------------------------------------------------------------------------------


GRADIENTS = [
    ("Embedding", {}),
    ("Embedding", {"padding_idx": 2}),
    ("EmbeddingBag", {"mode": "sum"}),
    ("EmbeddingBag", {"mode": "mean"}),
    ("EmbeddingBag", {"mode": "max"}),
]


@pytest.mark.filterwarnings("ignore:Input #")  # gradcheck asks for float64
@pytest.mark.parametrize("layer, options", GRADIENTS, ids=str)
def test_gradients_are_differences(layer: str, options: dict[str, Any]) -> None:
    """Gradients equal finite differences exactly, by torch's gradcheck in float32.

    Rows are linear in the weight, as long as no maximum moves to another row. Weights are multiples
    of 1/4, the difference is 1/16 and bags have 4 ids, so nothing is rounded.
    """
    ids = torch.tensor([[1, 3, 3, 5], [0, 7, 11, 1]])  # not the padding row: it has no gradient
    values = torch.arange(ROWS * DIM).reshape(ROWS, DIM) * 7 % (ROWS * DIM) / 4
    module = ours(layer, **options)

    def look_up(weight: Any) -> Any:
        return torch.func.functional_call(module, {"weight": weight}, ids)

    given = values.requires_grad_()
    assert torch.autograd.gradcheck(look_up, given, eps=1 / 16, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:Input #")
@pytest.mark.parametrize("optimizer", [None, SGD])
def test_gradients_of_weights_are_differences(optimizer: Any) -> None:
    """Gradients of per_sample_weights equal finite differences exactly."""
    bag, ids = ours("EmbeddingBag", mode="sum", optimizer=optimizer), batches((2, 4))[0]
    bag.load_state_dict({"weight": (weights() * 4).round() / 4})
    bag.requires_grad_(False)
    given = (torch.arange(8.0) / 4).reshape(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda given: bag(ids, None, given), given, eps=1 / 16, atol=0, rtol=0
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_ops_of_training(layer: str, weighted: bool) -> None:
    """opcheck accepts the ops that compiled training calls: backward and max_norm."""
    if weighted and layer == "Embedding":
        return
    options = {"mode": "sum"} if layer == "EmbeddingBag" else {}
    module, ids = ours(layer, max_norm=1.0, **options), batches()[0]
    psw = torch.ones(3, 5) if weighted else None
    grad = torch.ones_like(module(ids))
    weight, checks = module.weight.detach(), ["test_schema", "test_faketensor"]
    given = (weight, ids, None, psw, module._rows.number, grad, True, weighted)
    torch.library.opcheck(ops.backward, given, test_utils=checks)
    torch.library.opcheck(ops.renorm, (weight, ids, module._rows.number), test_utils=checks)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # a warning of torch, in forward mode
@pytest.mark.parametrize("optimizer", [None, SGD])
def test_transforms_are_refused(optimizer: Any) -> None:
    """torch.func and forward mode raise torch's error and give no wrong derivative."""
    module, ids = ours(optimizer=optimizer), batches()[0]
    before = rows_of(module)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.vmap(module)(ids)
    if optimizer is None:

        def look_up(weight: Any) -> Any:
            return torch.func.functional_call(module, {"weight": weight}, ids).sum()

        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(look_up)(weights())
        forward = torch.autograd.forward_ad
        with forward.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            look_up(forward.make_dual(weights(), weights()))
    assert torch.equal(rows_of(module), before)


def test_another_writer(path: Path) -> None:
    """A table with another writer is refused with its path in the error, and stays as it is."""
    with Table.open(on_disk(path)) as table:
        for how in ({"optimizer": SGD}, {"_freeze": True}):
            with pytest.raises(LockedError, match="items.pyembed"):
                pt.Embedding(ROWS, DIM, path=path, **how)
        assert torch.equal(torch.from_numpy(table.gather(range(ROWS))), weights())


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_another_kind(layer: str, optimizer: Any) -> None:
    """Gradients of a wrong shape or dtype are refused; expanded gradients are accepted."""
    module, ids = ours(layer, optimizer=optimizer), batches()[0]
    twin = theirs(layer)
    for change in (lambda grad: grad[:1], lambda grad: grad.double()):
        rows = module(ids)
        rows.register_hook(change)
        with pytest.raises(RuntimeError, match=r"shape|size|type"):
            rows.sum().backward()
    assert torch.equal(rows_of(module), weights())
    module(ids).sum().backward()  # an expanded gradient, with strides of 0
    twin(ids).sum().backward()
    if optimizer is None:
        close(module.weight.grad, twin.weight.grad)
    else:
        close(rows_of(module), weights() - 0.5 * twin.weight.grad)
