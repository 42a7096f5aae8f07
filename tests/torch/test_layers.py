"""Layers of pyembed.torch train and behave as those of torch.nn, which are the expectation."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyembed.torch as pt
from pyembed import Table, optim
from pyembed.errors import ArgumentError, ReadOnlyError
from pyembed.torch import ops, rows
from tests.torch.models import (
    COPIES,
    DIM,
    LAYERS,
    OPTIMIZERS,
    ROWS,
    RULES,
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

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", ["fused", "disk", "parameter"])
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"max_norm": 1.5}], ids=["plain", "padding", "max_norm"]
)
def test_training_is_torchs(name: str, where: str, options: dict[str, Any], path: Path) -> None:
    """Lookups, and the table after some steps, equal those of nn.Embedding(sparse=True)."""
    ours_of, theirs_of = OPTIMIZERS[name]
    twin = theirs(sparse=True, **options)
    step = theirs_of(twin.parameters())
    mine: Any
    if where == "parameter":
        layer = ours(sparse=True, **options)
        mine = theirs_of(layer.parameters())
    elif where == "fused":
        layer, mine = ours(optimizer=ours_of, **options), None
    else:
        rule = RULES[name]
        on_disk(path, rule)
        layer, mine = pt.Embedding(ROWS, DIM, path=path, optimizer=ours_of, **options), None
    for ids in batches():
        step.zero_grad()
        rows, expected = layer(ids), twin(ids)
        close(rows, expected)
        loss_of(expected).backward()
        step.step()
        if mine is not None:
            mine.zero_grad()
        loss_of(rows).backward()
        if mine is not None:
            [found] = layer.weight.grad._indices()
            assert layer.weight.grad.is_sparse and len(found) == len(found.unique())
            mine.step()
        close(rows_of(layer), twin.weight.detach())
    layer.table.close()
    if where == "disk":
        with Table.open(path, "r") as table:  # the trained rows are in the file
            close(torch.from_numpy(np.array(table.weight)), twin.weight.detach())


@pytest.mark.parametrize("layer", LAYERS)
def test_dense_gradient_is_torchs(layer: str) -> None:
    """Without sparse=True, weight.grad is dense, and torch's Adam steps on it."""
    mine, twin = ours(layer, padding_idx=1), theirs(layer, padding_idx=1)
    ids = batches()[0]
    for each in (mine, twin):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.1)
        loss_of(each(ids)).backward()
        optimizer.step()
    close(mine.weight.grad, twin.weight.grad)
    close(mine.weight, twin.weight)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_bags_are_torchs(mode: str, weighted: bool, last: bool, fused: bool) -> None:
    """Bags with offsets equal torch's: rows, table after steps, gradient of per_sample_weights."""
    if weighted and mode != "sum":
        with pytest.raises(ArgumentError, match="mode='sum'"):
            ours("EmbeddingBag", mode=mode)(batches()[0], None, torch.ones(3, 5))
        return
    options = {"mode": mode, "include_last_offset": last, "padding_idx": 3}
    mine = ours("EmbeddingBag", optimizer=SGD if fused else None, **options)
    twin = theirs("EmbeddingBag", **options)
    offsets = torch.tensor([0, 4, 4, 9] + ([15] if last else []))
    for ids in batches((15,)):
        given = [torch.rand(15).requires_grad_() if weighted else None]
        given.append(given[0].detach().clone().requires_grad_() if weighted else None)
        for layer, psw in zip((mine, twin), given, strict=True):
            layer.zero_grad()
            rows = layer(ids, offsets, psw)
            loss_of(rows).backward()
            if layer is twin or not fused:
                torch.optim.SGD(layer.parameters(), lr=0.5).step()
        if weighted:
            close(given[0].grad, given[1].grad)
        close(rows_of(mine), twin.weight.detach())
    close(mine(batches()[0]), twin(batches()[0]))


def test_weights_of_a_frozen_bag_learn() -> None:
    """per_sample_weights of a frozen bag get a gradient, and its weight gets none."""
    bag, ids = ours("EmbeddingBag", mode="sum", _freeze=True), batches()[0]
    psw = torch.ones(3, 5, requires_grad=True)
    bag(ids, None, psw).sum().backward()
    close(psw.grad, weights()[ids].sum(-1))
    assert bag.weight.grad is None


def test_with_dense_layers() -> None:
    """A torch optimizer of model.parameters() does not touch the table, which steps once itself."""
    model = torch.nn.Sequential(ours(optimizer=SGD), torch.nn.Linear(DIM, 1))
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad):
        before, ids = rows_of(model[0]), torch.tensor([5])
        optimizer = make(model.parameters(), lr=0.1)
        model(ids).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"))
        expected = before[5] - 0.5 * model[1].weight[0].detach()
        optimizer.step()
        close(rows_of(model[0])[5], expected)
        assert torch.equal(rows_of(model[0])[:5], before[:5])


def test_step_and_learning_rate() -> None:
    """Each call of the layer is one step, and layer.optimizer.lr sets the learning rate."""
    layer = ours(optimizer=SGD)
    (layer(torch.tensor([1])).sum() + layer(torch.tensor([1])).sum()).backward()
    assert layer.optimizer.steps == 2
    layer.optimizer.lr = 0.0
    before = rows_of(layer)
    layer(torch.tensor([1])).sum().backward()
    assert torch.equal(rows_of(layer), before)


# --- a replacement for torch.nn -------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_fresh_weights_are_torchs(layer: str) -> None:
    """The same seed gives the rows of torch.nn, with a zero padding row, with any placement."""
    found = []
    for make in (getattr(torch.nn, layer), getattr(pt, layer)):
        torch.manual_seed(5)
        found.append(make(ROWS, DIM, padding_idx=-2).weight)
    torch.manual_seed(5)
    fused = getattr(pt, layer)(ROWS, DIM, padding_idx=-2, optimizer=SGD)
    assert torch.equal(*found) and torch.equal(rows_of(fused), found[0])
    assert (fused.num_embeddings, fused.embedding_dim, fused.padding_idx) == (ROWS, DIM, ROWS - 2)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3, "max_norm": 2.0, "sparse": True}])
def test_repr(options: dict[str, Any]) -> None:
    """repr is torch's; with optimizer= it describes the table, a closed one too."""
    assert repr(ours(**options)) == repr(theirs(**options))
    layer = ours(optimizer=SGD, **options)
    assert "12 rows of weight 4" in repr(layer) and "SGD(lr=0.5)" in repr(layer)
    layer.table.close()
    assert "closed" in repr(layer)


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict_both_ways(layer: str, optimizer: Any) -> None:
    """state_dict has only the weight, and loads strictly into torch's layer and back."""
    mine = torch.nn.ModuleDict({"a": getattr(pt, layer)(ROWS, DIM, optimizer=optimizer)})
    twin = torch.nn.ModuleDict({"a": theirs(layer)})
    assert list(mine.state_dict()) == ["a.weight"]
    mine.load_state_dict(twin.state_dict())
    assert torch.equal(rows_of(mine["a"]), weights())
    with torch.no_grad():
        twin["a"].weight.zero_()
    twin.load_state_dict(mine.state_dict())
    assert torch.equal(twin["a"].weight, weights())


@pytest.mark.parametrize("optimizer", [None, SGD])
def test_strict_loading(optimizer: Any) -> None:
    """A missing key, an unknown key and a wrong shape raise torch's error and change nothing."""
    layer = ours(optimizer=optimizer)
    for state, text in (
        ({}, "Missing key"),
        ({"weight": weights(), "bias": weights()}, "Unexpected key.*bias"),
        ({"weight": weights()[1:]}, "size mismatch for weight"),
    ):
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(state)
    assert torch.equal(rows_of(layer), weights())
    found = layer.load_state_dict({"bias": weights()}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["weight"], ["bias"])


def test_state_of_a_large_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """state_dict copies a file that fits; otherwise the error names a remedy, which works."""
    layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=SGD)
    assert torch.equal(layer.state_dict()["weight"], weights())
    monkeypatch.setattr(rows, "STATE_SHARE", 1e-12)
    with pytest.raises(ArgumentError, match="in_state_dict = False"):
        layer.state_dict()
    layer.in_state_dict = False
    assert layer.state_dict() == {} and layer.load_state_dict({})
    layer.table.close()


@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_copies(layer: str, copied: Any, optimizer: Any) -> None:
    """deepcopy and pickle give an independent layer that starts from the same rows."""
    first = ours(layer, optimizer=optimizer, padding_idx=1)
    ids = batches()[0]
    first(ids)
    second = copied(first)
    assert torch.equal(first(ids), second(ids)) and second.padding_idx == 1
    second(ids).sum().backward()
    if optimizer is None:
        assert first.weight.grad is None and second.weight.grad is not None
    else:
        assert second.optimizer.steps == 1 and first.optimizer.steps == 0
        assert not torch.equal(rows_of(second), weights())
    assert torch.equal(rows_of(first), weights())


def test_saved_whole() -> None:
    """torch.save and torch.load keep the rows of a whole layer."""
    buffer = io.BytesIO()
    torch.save(ours(optimizer=SGD), buffer)
    buffer.seek(0)
    assert torch.equal(rows_of(torch.load(buffer, weights_only=False)), weights())


def test_copies_of_a_file(path: Path) -> None:
    """A copy of a layer that writes a file is refused; a pickle reads the rows of the file."""
    layer = pt.Embedding(ROWS, DIM, path=on_disk(path), optimizer=SGD)
    with pytest.raises(ArgumentError, match="share the layer"):
        copy.deepcopy(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(rows_of(again), weights())
    with pytest.raises(ReadOnlyError):
        again(torch.tensor([1])).sum().backward()
    again.table.close()
    layer.table.close()
    frozen = pt.Embedding.from_pretrained(path)
    assert torch.equal(copy.deepcopy(frozen)(torch.tensor([3])), weights()[3:4])


def test_pretrained_and_frozen(path: Path) -> None:
    """from_pretrained accepts a tensor, an array, a table and a path, frozen by default."""
    ids = batches()[0]
    tensor, array = weights(), weights().numpy()
    array.flags.writeable = False
    for source in (tensor, array, Table.from_array(array), on_disk(path)):
        layer = pt.Embedding.from_pretrained(source, padding_idx=0)
        rows = layer(ids)
        assert torch.equal(rows, weights()[ids]) and not rows.requires_grad
    shared = pt.Embedding.from_pretrained(tensor, freeze=False)
    assert shared.weight.data_ptr() == tensor.data_ptr()  # no copy, as in torch
    bag = pt.EmbeddingBag.from_pretrained(tensor, mode="sum")
    close(bag(ids), weights()[ids].sum(1))
    with pytest.raises(ArgumentError, match=r"\(rows, dim\)"):
        pt.Embedding.from_pretrained(tensor[0])


def test_requires_grad_freezes() -> None:
    """requires_grad_(False) on a model freezes the table, and requires_grad_(True) thaws it."""
    model = torch.nn.Sequential(ours(optimizer=SGD), torch.nn.Linear(DIM, 1))
    model.requires_grad_(False)
    assert not model(torch.tensor([1])).requires_grad
    model.requires_grad_(True)
    model(torch.tensor([1])).sum().backward()
    assert model[0].optimizer.steps == 1
    frozen = pt.Embedding.from_pretrained(Table.from_array(weights().numpy()), freeze=True)
    assert frozen.requires_grad_(True)(torch.tensor([1])).requires_grad


@pytest.mark.filterwarnings("ignore:Full backward hook")  # ids have no gradient
def test_hooks() -> None:
    """Hooks of modules, of the weight and of load_state_dict run."""
    seen = []
    layer, fused = ours(), ours(optimizer=SGD)
    layer.weight.register_hook(lambda grad: seen.append("grad"))
    for each in (layer, fused):
        each.register_forward_hook(lambda *_: seen.append("forward"))
        each.register_full_backward_hook(lambda *_: seen.append("backward"))
        each.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
        each(torch.tensor([1])).sum().backward()
        each.load_state_dict(each.state_dict())
    assert sorted(seen) == sorted(["grad", *2 * ["forward", "backward", "load"]])


def test_functional_call() -> None:
    """functional_call replaces a Parameter for one call, as in torch."""
    out = torch.func.functional_call(ours(), {"weight": weights() * 2}, torch.tensor([1]))
    assert torch.equal(out, weights()[1:2] * 2)


def test_memory_is_shared_with_the_table() -> None:
    """A table in memory and the Parameter over it share their memory."""
    table = Table.memory(ROWS, DIM)
    layer = pt.Embedding(ROWS, DIM, table=table)
    with torch.no_grad():
        layer.weight.fill_(7)
    assert (table.weight == 7).all() and (layer.table.weight == 7).all()


def test_a_parameter_that_moved() -> None:
    """A lookup finds a Parameter whose memory was replaced, shared, or assigned."""
    layer, ids = ours(sparse=True), batches()[0]
    layer(ids)
    for value in (3.0, 4.0, 5.0):
        if value == 3:
            layer.weight.data = torch.full((ROWS, DIM), value)
        elif value == 4:
            layer.share_memory().weight.data.fill_(value)
        else:
            layer.load_state_dict({"weight": torch.full((ROWS, DIM), value)}, assign=True)
        assert (layer(ids) == value).all() and (rows_of(layer) == value).all()
    layer.weight.data = weights().repeat(1, 2)[:, :DIM]  # with other strides
    layer(ids).sum().backward()
    assert torch.equal(layer(ids), weights()[ids]) and layer.weight.grad.is_sparse


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("optimizer", [None, SGD])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler
def test_compiled(layer: str, optimizer: Any, max_norm: float | None, backend: str) -> None:
    """A layer compiles with fullgraph=True and trains as in eager mode, at two shapes."""
    torch._dynamo.reset()
    plain = ours(layer, optimizer=optimizer, max_norm=max_norm)
    model = ours(layer, optimizer=optimizer, max_norm=max_norm)
    compiled = torch.compile(lambda ids: loss_of(model(ids)), fullgraph=True, backend=backend)
    for ids in (*batches(count=2), *batches((4, 3), count=2)):
        loss, expected = compiled(ids), loss_of(plain(ids))
        close(loss, expected)
        loss.backward()
        expected.backward()
        close(rows_of(model), rows_of(plain))
    if optimizer is None:
        close(model.weight.grad, plain.weight.grad)
    else:
        assert model.optimizer.steps == 4


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("optimizer", [None, functools.partial(optim.SGD, lr=0.0)])
def test_ops_are_what_they_say(layer: str, optimizer: Any) -> None:
    """opcheck accepts the lookup op: schema, autograd registration, fake kernel, tracing.

    Tracing compares gradients too. A table's anchor has a gradient (the step) only while traced, so
    `test_compiled` checks that case instead.
    """
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if optimizer is None else []
    module, ids = ours(layer, optimizer=optimizer), batches()[0]
    anchor = module.weight if optimizer is None else module._anchor
    torch.library.opcheck(
        ops.look_up, (anchor, ids, None, None, module._rows.number), test_utils=checks
    )


# --- a GPU and the document -----------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_on_a_gpu(layer: str) -> None:
    """A table with device="cuda" learns as on the CPU, and its rows arrive on the GPU."""
    gpu, cpu = (ours(layer, optimizer=SGD, device=device) for device in ("cuda", "cpu"))
    for ids in batches():
        rows = gpu(ids.cuda())
        assert rows.is_cuda
        loss_of(rows.cpu()).backward()
        loss_of(cpu(ids)).backward()
    close(rows_of(gpu), rows_of(cpu))


def test_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/torch-compatibility.md runs, and the tests that it cites exist."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "torch-compatibility.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "torch-compatibility.md", "exec"), names)
    assert blocks and (tmp_path / "items.pyembed" / "rows.npy").exists()
    cited = re.findall(r"`((?:\w+/)?test_\w+)(?:::(test_\w+))?`", text)
    for module, name in cited:
        source = (Path(__file__).parents[1] / f"{module}.py").read_text()
        assert f"def {name or 'test_'}" in source, (module, name)
    assert cited
