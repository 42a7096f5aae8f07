"""`pyembed.torch.Optimizer` makes one step of several lookups and backwards, as torch's do.

Torch's nn.Embedding and torch's optimizers are the expectation.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyembed.torch as pt
from pyembed import optim
from pyembed.errors import ArgumentError, ClosedError, NonFiniteError
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


def translation(layer: Any, ids: Any) -> Any:
    """Compute a loss of three lookups, as TransE does; some ids occur in several of them."""
    head, tail = layer(ids[0]), layer(ids[1])
    return loss_of(head - tail) + loss_of(head - layer(ids[1:]).mean(0))


def train(pairs: list[tuple[Any, Any]], loss: Callable[[Any, Any], Any] = translation) -> None:
    """Take steps over two backwards each with both layers, and compare the rows."""
    ids = batches()
    for step in range(0, len(ids), 2):
        for layer, optimizer in pairs:
            optimizer.zero_grad()
            for micro in ids[step : step + 2]:
                loss(layer, micro).backward()
            optimizer.step()
        close(rows_of(pairs[0][0]), pairs[1][0].weight.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("on", ["memory", "disk"])
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"max_norm": 1.5}], ids=["plain", "padding", "max_norm"]
)
def test_one_step_for_all(name: str, on: str, options: dict[str, Any], path: Path) -> None:
    """Three lookups in a forward and two backwards in a step give the rows of torch."""
    ours_of, theirs_of = OPTIMIZERS[name]
    if on == "disk":
        on_disk(path, RULES[name])
        mine = pt.Embedding(ROWS, DIM, path=path, optimizer=ours_of, **options)
    else:
        mine = ours(optimizer=ours_of, **options)
    twin = theirs(sparse=True, **options)
    train([(mine, pt.Optimizer(mine)), (twin, theirs_of(twin.parameters()))])
    assert mine.optimizer.steps == 3
    mine.table.close()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags(mode: str, weighted: bool) -> None:
    """Bags, whose backward reads rows again, give the rows of torch: rows change in a step only."""
    if weighted and mode != "sum":
        return
    mine = ours("EmbeddingBag", mode=mode, optimizer=SGD)
    twin = theirs("EmbeddingBag", mode=mode)
    given: dict[int, list[Any]] = {id(mine): [], id(twin): []}

    def loss(layer: Any, ids: Any) -> Any:
        psw = (ids / 8.0 + 1).requires_grad_() if weighted else None
        given[id(layer)].append(psw)
        return loss_of(layer(ids, None, psw)) + loss_of(layer(ids.flip(1), None, psw))

    train([(mine, pt.Optimizer(mine)), (twin, torch.optim.SGD(twin.parameters(), lr=0.5))], loss)
    for psw, expected in zip(*given.values(), strict=True) if weighted else ():
        close(psw.grad, expected.grad)


def test_counts_scale_within_a_lookup() -> None:
    """scale_grad_by_freq counts within each lookup, as torch does."""
    mine, twin = ours(optimizer=SGD, scale_grad_by_freq=True), theirs(scale_grad_by_freq=True)
    train([(mine, pt.Optimizer(mine)), (twin, torch.optim.SGD(twin.parameters(), lr=0.5))])


@pytest.mark.parametrize("most", [2.0, 1e6])
def test_clip_norm_is_that_of_the_step(most: float) -> None:
    """clip_norm clips the sum of all backwards, as clip_grad_norm_ before the step does."""
    mine, twin = ours(optimizer=functools.partial(optim.SGD, lr=0.5, clip_norm=most)), theirs()
    stepper = torch.optim.SGD(twin.parameters(), lr=0.5)
    clips = []
    stepper.register_step_pre_hook(
        lambda *_: clips.append(torch.nn.utils.clip_grad_norm_(twin.parameters(), most) > most)
    )
    train([(mine, pt.Optimizer(mine)), (twin, stepper)])
    assert all(clips) if most == 2 else not any(clips)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_lookup_is_the_same_step(name: str) -> None:
    """With one lookup in each step, rows have the same bits with and without an Optimizer."""
    fused, mine = (ours(optimizer=OPTIMIZERS[name][0], padding_idx=2) for _ in range(2))
    optimizer = pt.Optimizer(mine)
    for ids in batches():
        loss_of(fused(ids)).backward()
        loss_of(mine(ids)).backward()
        optimizer.step()
        assert torch.equal(rows_of(fused), rows_of(mine))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler
def test_compiled(backend: str) -> None:
    """A forward that was compiled before the Optimizer was made accumulates too."""
    torch._dynamo.reset()
    mine, twin = ours(optimizer=SGD), theirs(sparse=True)
    compiled = torch.compile(functools.partial(translation, mine), fullgraph=True, backend=backend)
    compiled(batches()[0])
    pairs = [(mine, pt.Optimizer(mine)), (twin, torch.optim.SGD(twin.parameters(), lr=0.5))]
    train(pairs, lambda layer, ids: compiled(ids) if layer is mine else translation(layer, ids))
    assert mine.optimizer.steps == 3


# --- pending gradients ----------------------------------------------------------------------------


def test_nothing_pending() -> None:
    """zero_grad and step drop pending gradients, and a step without any does nothing.

    Of two tables, the one without a lookup takes no step.
    """
    model = torch.nn.ModuleList([ours(optimizer=SGD), ours("EmbeddingBag", optimizer=SGD)])
    optimizer = pt.Optimizer(model)
    optimizer.step()
    loss_of(model[0](torch.tensor([1]))).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(rows_of(layer), weights()) for layer in model)
    for _ in range(2):
        optimizer.step()
        model[0](torch.tensor([1])).sum().backward()
    optimizer.step()
    optimizer.step()
    assert torch.equal(rows_of(model[0])[1], weights()[1] - 0.5 * 2)
    assert [layer.optimizer.steps for layer in model] == [1 + 1, 0]


def test_errors_keep_what_is_pending() -> None:
    """A refused backward or step changes no row, and the step can be repeated."""
    layer = ours(optimizer=SGD)
    optimizer, ids = pt.Optimizer(layer), torch.tensor([1])
    layer(ids).sum().backward()
    with pytest.raises(NonFiniteError):
        (layer(ids) * float("nan")).sum().backward()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ArgumentError, match="-1"):
        optimizer.step()
    assert torch.equal(rows_of(layer), weights()) and layer.optimizer.steps == 0
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert torch.equal(rows_of(layer)[1], weights()[1] - 0.25)


def test_rows_that_changed_in_between() -> None:
    """Backward of mode="max" refuses a graph from before the last step."""
    bag, ids = ours("EmbeddingBag", mode="max", optimizer=SGD), batches()[0]
    optimizer = pt.Optimizer(bag)
    first, second = bag(ids), bag(ids)
    first.sum().backward()
    optimizer.step()
    before = rows_of(bag)
    with pytest.raises(ArgumentError, match="changed between"):
        second.sum().backward()
    optimizer.step()
    assert torch.equal(rows_of(bag), before)


def test_rows_that_are_skipped() -> None:
    """nonfinite="skip_row" does not change a row that got a NaN in one of the backwards."""
    layer = ours(optimizer=functools.partial(optim.SGD, lr=0.5, nonfinite="skip_row"))
    optimizer = pt.Optimizer(layer)
    layer(torch.tensor([1, 3])).sum().backward()
    (layer(torch.tensor([1])) * float("nan")).sum().backward()
    optimizer.step()
    expected = weights()
    expected[3] -= 0.5
    assert torch.equal(rows_of(layer), expected) and layer.optimizer.skipped == 1


def test_closed_table() -> None:
    """Backward and step of a closed table raise ClosedError; zero_grad still works."""
    layer = ours(optimizer=SGD)
    optimizer, rows = pt.Optimizer(layer), layer(torch.tensor([1]))
    rows.sum().backward(retain_graph=True)
    layer.table.close()
    with pytest.raises(ClosedError):
        rows.sum().backward()
    with pytest.raises(ClosedError):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


def test_loss_scaling_is_refused() -> None:
    """Torch's GradScaler, which cannot unscale pending gradients, refuses to step."""
    layer = ours(optimizer=SGD)
    optimizer, scaler = pt.Optimizer(layer), torch.amp.GradScaler("cpu")
    scaler.scale(layer(torch.tensor([1])).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    assert torch.equal(rows_of(layer), weights())


# --- the layers of an Optimizer -------------------------------------------------------------------


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_copies_belong_to_none(layer: str, copied: Any) -> None:
    """A copy of a layer belongs to no Optimizer: it has no pending gradients, and steps at once."""
    first = ours(layer, optimizer=SGD)
    optimizer, ids = pt.Optimizer(first), torch.tensor([[1]])
    first(ids).sum().backward()
    second = copied(first)
    second(ids).sum().backward()
    assert torch.equal(rows_of(second)[1], weights()[1] - 0.5)
    assert torch.equal(rows_of(first), weights())
    optimizer.step()
    assert torch.equal(rows_of(first), rows_of(second))


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_both(copied: Any) -> None:
    """A model and its Optimizer that are copied together train together, as in torch."""
    layer, twin = ours(optimizer=SGD), theirs()
    both = layer, pt.Optimizer(layer)
    train([copied(both), (twin, torch.optim.SGD(twin.parameters(), lr=0.5))])
    assert torch.equal(rows_of(layer), weights())


def test_two_optimizers() -> None:
    """Two Optimizers step at separate rates; the first to step takes the pending gradients."""
    layer = ours(optimizer=SGD)
    fast, slow = pt.Optimizer(layer), pt.Optimizer(layer)
    slow.param_groups[0]["lr"] = 0.25
    for each in (slow, fast):
        layer(torch.tensor([1])).sum().backward()
        each.step()
        (slow if each is fast else fast).step()
    assert torch.equal(rows_of(layer)[1], weights()[1] - 0.25 - 0.5)


def test_lifetimes() -> None:
    """An Optimizer keeps the tables of its layers alive, and no cycle keeps a layer alive."""
    layer = ours(optimizer=SGD)
    table, gone = layer.table, weakref.ref(layer)
    optimizer = pt.Optimizer(layer)
    layer(torch.tensor([1])).sum().backward()
    del layer
    optimizer.step()
    assert torch.equal(torch.from_numpy(table.gather(1)), weights()[1] - 0.5)
    del optimizer
    assert gone() is None
