"""Rows of a table on a device equal torch's layers over the same rows, bit for bit.

The device is the CPU, where torch's kernels are those of torch.nn, and a GPU where there is one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyembed.torch as pt
from pyembed import Table
from pyembed.errors import ArgumentError, ClosedError, DTypeError, ReadOnlyError
from pyembed.torch import device_copy
from tests.torch.models import DIM, LAYERS, ROWS, SGD, batches, loss_of, on_disk, theirs, weights

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad


def placed(path: Path, layer: str = "Embedding", **options: Any) -> Any:
    """Make a layer whose rows are a copy of a table's, on the CPU."""
    return getattr(pt, layer)(ROWS, DIM, path=path, placement="device", **options)


def rows_at(path: Path) -> Any:
    """Copy the rows of a table on disk to a tensor."""
    with Table.open(path) as table:
        return torch.from_numpy(np.array(table.weight))


@pytest.mark.parametrize(
    "layer, options",
    [
        ("Embedding", {}),
        ("Embedding", {"padding_idx": 2, "scale_grad_by_freq": True}),
        ("Embedding", {"padding_idx": -1, "sparse": True}),
        ("Embedding", {"max_norm": 1.5, "norm_type": 1.0}),
        *[("EmbeddingBag", {"mode": mode, "padding_idx": 2}) for mode in ("sum", "mean", "max")],
        ("EmbeddingBag", {"mode": "sum", "sparse": True}),
        ("EmbeddingBag", {"max_norm": 1.5}),
    ],
)
def test_training_is_torchs(layer: str, options: Any, path: Path) -> None:
    """Lookups and rows have the bits of torch.nn, and the table has them after a commit."""
    mine, twin = placed(on_disk(path, "adagrad"), layer, **options), theirs(layer, **options)
    steps = [torch.optim.Adagrad(each.parameters(), lr=0.1) for each in (mine, twin)]
    for ids in batches():
        found = []
        for module, step in zip((mine, twin), steps, strict=True):
            step.zero_grad()
            found.append(module(ids))
            loss_of(found[-1]).backward()
            step.step()
        assert torch.equal(*found)
    assert torch.equal(mine.weight, twin.weight)
    assert not torch.equal(mine.weight, weights())
    assert torch.equal(torch.from_numpy(np.array(mine.table.weight)), weights())  # until commit
    mine.commit({"epoch": 1})
    mine.table.close()
    with Table.open(path) as table:
        assert table.meta == {"epoch": 1} and table.generation == 2
        assert not table.column("sum").any()  # torch's optimizer keeps its state itself
    assert torch.equal(rows_at(path), twin.weight)


def test_bags_with_offsets_and_weights(path: Path) -> None:
    """Offsets, include_last_offset and per_sample_weights reach torch unchanged."""
    options: Any = {"mode": "sum", "include_last_offset": True}
    bag, twin = placed(on_disk(path), "EmbeddingBag", **options), theirs("EmbeddingBag", **options)
    batch = torch.arange(6), torch.tensor([0, 4, 4, 6]), torch.arange(6.0)
    assert torch.equal(bag(*batch), twin(*batch))


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 4 * DIM, 1 << 20])
def test_only_rows_that_differ_are_written(
    chunk_bytes: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit journals exactly the rows whose bits changed, in chunks of any size."""
    monkeypatch.setattr(device_copy, "CHUNK_BYTES", chunk_bytes)
    layer = placed(on_disk(path), padding_idx=0)
    announced: list[int] = []
    real = layer.table.store.begin_change

    def announce(state: Any, rows: Any) -> Any:
        announced.extend(rows)
        return real(state, rows)

    monkeypatch.setattr(layer.table.store, "begin_change", announce)
    with torch.no_grad():
        layer.weight[3] = float("nan")
        layer.weight[4] = 0.0
        layer.weight[ROWS - 1] += 1
    layer.commit()
    assert announced == [3, 4, ROWS - 1]
    layer.commit()  # a NaN equals its own bits
    assert announced == [3, 4, ROWS - 1]
    with torch.no_grad():
        layer.weight[4] = -0.0
    layer.commit()
    assert announced == [3, 4, ROWS - 1, 4]
    layer.table.close()
    assert np.array_equal(
        rows_at(path).numpy().view(np.int32), layer.weight.detach().numpy().view(np.int32)
    )


def test_commit_where_the_rows_are_in_the_table(path: Path) -> None:
    """layer.commit also commits a table that updates itself, so one loop serves both placements."""
    layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=SGD)
    assert layer.placement == "table"
    loss_of(layer(batches()[0])).backward()
    layer.commit({"epoch": 2})
    expected = torch.from_numpy(np.array(layer.table.weight))
    layer.table.close()
    assert torch.equal(rows_at(path), expected) and not torch.equal(expected, weights())


def test_a_table_in_memory() -> None:
    """A table that is given is the same object, and only commit writes to it."""
    table = Table.memory(ROWS, DIM)
    layer = pt.Embedding(ROWS, DIM, table=table, placement="device")
    assert layer.table is table
    layer.reset_parameters()
    assert not table.weight.any()
    layer.commit()
    assert np.array_equal(table.weight, layer.weight.detach().numpy())


def test_protocols(path: Path) -> None:
    """state_dict, repr, casts and torch.compile work as for a layer with a Parameter."""
    layer, twin = placed(on_disk(path), padding_idx=2), theirs(padding_idx=2)
    assert list(layer.state_dict()) == ["weight"]
    layer.load_state_dict({"weight": weights() + 1})
    twin.load_state_dict({"weight": weights() + 1})
    assert f"{ROWS}, {DIM}" in repr(layer) and "placement='device'" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    ids = batches()[0]
    assert torch.equal(compiled(ids), twin(ids))
    with pytest.raises(ArgumentError, match="one writer"):
        copy.deepcopy(layer)
    assert layer.half()(ids).dtype == torch.float16
    with pytest.raises(DTypeError, match="float32"):
        layer.commit()


def test_refusals(path: Path) -> None:
    """Impossible combinations are refused when the layer is made, and the table is closed."""
    on_disk(path)
    for options, match in (
        ({"placement": "gpu"}, "allowed: table, device, auto"),
        ({"placement": "device", "optimizer": SGD}, "optimizer="),
        ({"placement": "device", "device": "meta"}, "meta"),
        ({"placement": "auto", "optimizer": SGD}, "optimizer="),
        ({"placement": "auto"}, "frozen layers"),
    ):
        with pytest.raises(ArgumentError, match=match):
            pt.Embedding(ROWS, DIM, path=path, **options)
    for options in ({}, {"_weight": weights()}):
        with pytest.raises(ArgumentError, match="path= or table="):
            pt.Embedding(ROWS, DIM, placement="device", **options)
    with Table.open(path, "r") as table, pytest.raises(ReadOnlyError, match="freeze"):
        pt.Embedding(ROWS, DIM, table=table, placement="device")
    assert torch.equal(rows_at(path), weights())


def test_commits_that_are_refused(path: Path) -> None:
    """A commit of a frozen layer, of another shape or to a closed table writes nothing."""
    frozen = pt.Embedding.from_pretrained(on_disk(path), placement="device")
    assert not frozen.weight.requires_grad
    with torch.no_grad():
        frozen.weight[1] = 9
    with pytest.raises(ReadOnlyError):
        frozen.commit()
    frozen.table.close()
    layer = placed(path)
    layer.weight = torch.nn.Parameter(torch.zeros(1, DIM))  # it would broadcast
    with pytest.raises(ArgumentError, match="shape"):
        layer.commit()
    layer.table.close()
    with pytest.raises(ClosedError):
        layer.commit()
    assert torch.equal(rows_at(path), weights())


@pytest.mark.parametrize("layer", LAYERS)
def test_auto(layer: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """placement="auto" copies rows that take half of the free memory; results are the same."""
    on_disk(path)
    size, found = 4 * ROWS * DIM, {}
    for free, expected in ((2 * size, "device"), (2 * size - 1, "table")):
        monkeypatch.setattr(device_copy, "free_bytes", lambda device, free=free: free)
        made = getattr(pt, layer).from_pretrained(path, placement="auto")
        assert made.placement == expected
        assert ("placement='device'" in repr(made)) == (expected == "device")
        found[expected] = made(batches()[0])
        made.table.close()
    torch.testing.assert_close(found["device"], found["table"], rtol=1e-6, atol=1e-6)  # mean
    monkeypatch.undo()
    assert device_copy.free_bytes(torch.device("cpu")) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layer", LAYERS)
def test_on_a_gpu(layer: str, path: Path) -> None:
    """Rows learn on the GPU, and a commit copies them back bit for bit."""
    module = placed(on_disk(path), layer, device="cuda")
    step = torch.optim.SGD(module.parameters(), lr=0.5)
    for ids in batches():
        loss_of(module(ids.cuda()).cpu()).backward()
        step.step()
    module.commit()
    module.table.close()
    assert module.weight.is_cuda and not torch.equal(module.weight.cpu(), weights())
    assert torch.equal(rows_at(path), module.weight.cpu())
    frozen = getattr(pt, layer).from_pretrained(path, placement="auto", device="cuda")
    assert frozen.placement == "device" and frozen(batches()[0].cuda()).is_cuda
