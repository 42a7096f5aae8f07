"""`pyembed.torch.Optimizer` with schedulers, states, clipping, and steps of several tables.

Torch's nn.Embedding and torch's optimizers are the expectation.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyembed.torch as pt
from pyembed import Table, optim, schedules
from pyembed.errors import ArgumentError, ClosedError, NonFiniteError, ReadOnlyError
from tests.torch.models import (
    COPIES,
    DIM,
    OPTIMIZERS,
    ROWS,
    SGD,
    STEPS,
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

rates = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: rates.LambdaLR(o, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda o: rates.OneCycleLR(o, 0.3, total_steps=8, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: rates.CosineAnnealingLR(o, 4),
    "SequentialLR": lambda o: rates.SequentialLR(
        o, [rates.ConstantLR(o, 0.5, 2), rates.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda o: rates.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler: str, optimizer: str) -> None:
    """Torch's schedulers change the learning rate of a table as they do for nn.Embedding."""
    ours_of, theirs_of = OPTIMIZERS[optimizer]
    mine, twin = ours(optimizer=ours_of), theirs(sparse=True)
    pairs = [(mine, pt.Optimizer(mine)), (twin, theirs_of(twin.parameters()))]
    driven = [SCHEDULERS[scheduler](each) for _, each in pairs]
    seen = []
    for ids in batches():
        for (layer, stepper), rate in zip(pairs, driven, strict=True):
            stepper.zero_grad()
            loss = loss_of(layer(ids))
            loss.backward()
            stepper.step()
            # a constant loss is a plateau
            rate.step(1.0) if scheduler == "ReduceLROnPlateau" else rate.step()
        close(rows_of(mine), twin.weight.detach())
        seen.append(mine.optimizer.lr)
        assert pairs[0][1].param_groups[0]["lr"] == pairs[1][1].param_groups[0]["lr"]
    assert len(set(seen)) > 1


def test_one_group_for_each_table() -> None:
    """Groups have the order of the modules and their learning rates, which a step applies."""
    slow = functools.partial(optim.Adam, lr=0.25)
    model = torch.nn.ModuleList([ours(optimizer=SGD), torch.nn.Linear(2, 2), ours(optimizer=slow)])
    optimizer = pt.Optimizer(model)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    optimizer.param_groups[1]["lr"] = 0.125
    (model[0](torch.tensor([1])) + model[2](torch.tensor([1]))).sum().backward()
    optimizer.step()
    assert [model[at].optimizer.lr for at in (0, 2)] == [0.5, 0.125]
    assert repr(model[2].optimizer).startswith("Adam(lr=0.125")


def test_state_of_the_groups() -> None:
    """state_dict holds the learning rates; optimizer and scheduler resume from it."""
    layer = ours(optimizer=SGD)
    optimizer = pt.Optimizer(layer)
    scheduler = rates.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    again = ours(optimizer=SGD)
    second = pt.Optimizer(again)
    resumed = rates.StepLR(second, 1, gamma=0.5)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for expected in (0.25, 0.125):
        again(torch.tensor([1])).sum().backward()
        second.step()
        resumed.step()
        assert again.optimizer.lr == expected
    assert layer.optimizer.lr == 0.5


STATEFUL = {
    "Adagrad": functools.partial(optim.Adagrad, lr=0.1),
    "Adam": functools.partial(optim.Adam, lr=0.1),
    "momentum": functools.partial(optim.SGD, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_the_tables(name: str, tmp_path: Path) -> None:
    """Training continues with the same bits from the state_dicts of a model and an Optimizer."""
    seen = []
    model = pt.Embedding(ROWS, DIM, _weight=weights(), optimizer=STATEFUL[name])
    optimizer = pt.Optimizer(model)
    for step, ids in enumerate(batches()):
        if step == 3:
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
        loss_of(model(ids)).backward()
        optimizer.step()
    again = pt.Embedding(ROWS, DIM, optimizer=STATEFUL[name])
    second = pt.Optimizer(again)
    saved = torch.load(tmp_path / "saved.pt")
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for ids in batches()[3:]:
        seen.append(loss_of(again(ids)))
        seen[-1].backward()
        second.step()
    assert torch.equal(rows_of(again), rows_of(model)) and again.optimizer.steps == STEPS


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_state_that_does_not_fit(change: str) -> None:
    """State that is missing or of other shapes is refused, and neither rates nor rows change."""
    layer = ours(optimizer=STATEFUL["Adam"])
    optimizer = pt.Optimizer(layer)
    saved = optimizer.state_dict()
    if change == "missing":
        saved["state"] = {}
    else:
        saved["state"][0]["exp_avg"] = torch.ones(1, DIM)
    saved["param_groups"][0]["lr"] = 9.0
    with pytest.raises(ArgumentError, match="state 0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_state_that_would_be_lost() -> None:
    """A layer that steps in backward and keeps state in memory refuses to save its rows alone."""
    layer = ours(optimizer=STATEFUL["Adagrad"])
    layer.state_dict()
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(ArgumentError, match=r"pyembed\.torch\.Optimizer"):
        layer.state_dict()
    pt.Optimizer(layer)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("copied", COPIES)
def test_averages_of_parameters(copied: Any) -> None:
    """A lookup notices an average that missed the rows, and layer.weight averages them."""
    model = torch.nn.Sequential(ours(optimizer=SGD), torch.nn.Linear(DIM, 1))
    average = torch.optim.swa_utils.AveragedModel(model)
    average(torch.tensor([1]))
    average.update_parameters(model)
    with pytest.raises(ArgumentError, match=r"layer\.weight\.lerp_"):
        average(torch.tensor([1]))
    rows = copied(model[0])
    for ids in batches():
        loss_of(model[0](ids)).backward()
        expected = rows_of(rows).lerp(rows_of(model[0]), 0.25)
        rows.weight.lerp_(model[0].weight.detach(), 0.25)
        assert torch.equal(rows_of(rows), expected) and rows(ids).shape == (*ids.shape, DIM)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_keep_the_rate(copied: Any) -> None:
    """A copy of a layer keeps the learning rate when that of the original changes."""
    layer = ours(optimizer=SGD)
    optimizer = pt.Optimizer(layer)
    second = copied(layer)
    optimizer.param_groups[0]["lr"] = 0.125
    layer(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert second.optimizer.lr == 0.5 and layer.optimizer.lr == 0.125
    second(torch.tensor([1])).sum().backward()
    assert torch.equal(rows_of(second)[1], weights()[1] - 0.5)


def test_step_has_a_closure() -> None:
    """step calls a closure with gradients enabled and returns its loss, as in torch."""
    layer = ours(optimizer=SGD)
    optimizer = pt.Optimizer(layer)

    def closure() -> Any:
        loss = layer(torch.tensor([1])).sum()
        loss.backward()
        return loss

    assert optimizer.step() is None and layer.optimizer.steps == 0
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.numel() == 1 and layer.optimizer.steps == 1


def test_refusals() -> None:
    """A model without tables, a schedule as lr, and parameters that would not learn are refused."""
    with pytest.raises(ArgumentError, match="no layer"):
        pt.Optimizer(torch.nn.Sequential(ours(), torch.nn.Linear(2, 2)))
    scheduled = functools.partial(optim.SGD, lr=schedules.linear(1.0, 10))
    layer = ours(optimizer=scheduled)
    with pytest.raises(ArgumentError, match="schedule of its own"):
        pt.Optimizer(layer)
    assert layer.optimizer.lr == 1.0
    optimizer = pt.Optimizer(ours(optimizer=SGD))
    for given in (torch.nn.Linear(2, 2).parameters(), torch.nn.Parameter(torch.ones(2))):
        with pytest.raises(ArgumentError, match="would not learn"):
            optimizer.add_param_group({"params": given})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clip_norm_is_clip_grad_norm(most: float) -> None:
    """clip_norm of the table's optimizer equals torch's clip_grad_norm_ on nn.Embedding."""
    mine, twin = ours(optimizer=functools.partial(optim.SGD, lr=0.5, clip_norm=most)), theirs()
    stepper = torch.optim.SGD(twin.parameters(), lr=0.5)
    for ids in batches():
        loss_of(mine(ids)).backward()
        stepper.zero_grad()
        loss_of(twin(ids)).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), most)
        stepper.step()
        close(rows_of(mine), twin.weight.detach())
    assert mine.embedding_dim == DIM


@pytest.mark.parametrize("most", [0.5, 1e6])
@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy])
def test_one_norm_of_all_tables(most: float, copied: Any) -> None:
    """clip_norm of an Optimizer equals clip_grad_norm_ of all weights, in a copy too."""
    mine = torch.nn.ModuleList([ours(optimizer=SGD, padding_idx=2), ours(optimizer=SGD)])
    twins = torch.nn.ModuleList([theirs(padding_idx=2), theirs()])
    mine, optimizer = copied((mine, pt.Optimizer(mine, clip_norm=most)))
    stepper = torch.optim.SGD(twins.parameters(), lr=0.5)
    for ids in batches():
        for layers, each in ((mine, optimizer), (twins, stepper)):
            each.zero_grad()
            for scale, layer in enumerate(layers, 1):
                (scale * loss_of(layer(ids))).backward()
            if layers is twins:
                torch.nn.utils.clip_grad_norm_(twins.parameters(), most)
            each.step()
        for layer, twin in zip(mine, twins, strict=True):
            close(rows_of(layer), twin.weight.detach())


def test_refusals_of_one_norm() -> None:
    """A bad norm and a second norm are refused, and the layers then still step in backward."""
    model = torch.nn.ModuleList(
        [ours(optimizer=SGD), ours(optimizer=functools.partial(optim.SGD, lr=0.5, clip_norm=2.0))]
    )
    with pytest.raises(ArgumentError, match="clip_norm = -1"):
        pt.Optimizer(model[0], clip_norm=-1.0)
    with pytest.raises(ArgumentError, match="2.0 of its own"):
        pt.Optimizer(model, clip_norm=1.0)
    model[0](torch.tensor([1])).sum().backward()
    assert model[0].optimizer.steps == 1


# --- several tables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason, error",
    [
        ("overflow", NonFiniteError),
        ("rate", ArgumentError),
        ("closed", ClosedError),
        ("read-only", ReadOnlyError),
    ],
)
def test_all_tables_or_none(reason: str, error: type[Exception], path: Path) -> None:
    """If one table refuses a step, rows, rates and pending gradients of all stay as they were.

    Once its gradients are dropped, the other tables take their step and training continues.
    """
    adam, ids = functools.partial(optim.Adam, lr=0.5), torch.tensor([[1, 3], [3, 4]])
    third = ours(optimizer=SGD)
    if reason == "read-only":
        third = pt.Embedding(ROWS, DIM, table=Table.open(on_disk(path), "r"), optimizer=SGD)
    model = torch.nn.ModuleList([ours(optimizer=adam), ours("EmbeddingBag", optimizer=adam), third])
    twins = [ours(optimizer=adam), ours("EmbeddingBag", optimizer=adam)]
    table, optimizer = third.table, pt.Optimizer(model)
    twin = pt.Optimizer(torch.nn.ModuleList(twins))
    for layer in (*model, *twins):
        for _ in range(2):
            scale = 1.5e38 if layer is third and reason == "overflow" else 1
            (layer(ids) * scale).sum().backward()
    if reason == "closed":
        table.close()
    optimizer.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = 0.25
    optimizer.param_groups[2]["lr"] = -1.0 if reason == "rate" else 0.125
    for _ in range(2):
        with pytest.raises(error):
            optimizer.step()
        assert all(torch.equal(rows_of(layer), weights()) for layer in model[:2])
        assert reason == "closed" or torch.equal(rows_of(third), weights())
        assert [each.optimizer.steps for each in model] == [0, 0, 0]
        assert [each.optimizer.lr for each in model] == [0.5, 0.5, 0.5]
    third.optimizer.discard()
    for _ in range(2):
        optimizer.step()
        twin.step()
        for layer, other in zip(model, twins, strict=False):
            assert torch.equal(rows_of(layer), rows_of(other)) and layer.optimizer.steps > 0
        for each in (optimizer, twin):
            each.zero_grad()
        for layer in (*model[:2], *twins):
            layer(ids).sum().backward()
    table.close()


def test_zero_grad_after_a_refusal() -> None:
    """zero_grad drops refused gradients of all tables, and the next batch is a normal step."""
    model = torch.nn.ModuleList([ours(optimizer=SGD), ours(optimizer=SGD)])
    optimizer, ids = pt.Optimizer(model), torch.tensor([1])
    for scale in (3e38, 3e38):
        for layer in model:
            (layer(ids) * scale).sum().backward()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(rows_of(layer), weights()) for layer in model)
    for layer in model:
        layer(ids).sum().backward()
    optimizer.step()
    assert all(torch.equal(rows_of(layer)[1], weights()[1] - 0.5) for layer in model)


def test_two_layers_over_one_table() -> None:
    """Two layers over a table each take a step, in module order, with separate rates."""
    fast, slow = (functools.partial(optim.Adam, lr=lr) for lr in (0.5, 0.125))
    first = ours(optimizer=fast)
    second = pt.Embedding(ROWS, DIM, table=first.table, optimizer=slow, padding_idx=1)
    optimizer = pt.Optimizer(torch.nn.ModuleList([first, second]))
    table = Table.from_array(weights().numpy())
    single = optim.Adam(table, lr=0.5), optim.Adam(table, lr=0.125)
    for ids in batches():
        for layer in (first, second):
            layer(ids).sum().backward()
        optimizer.step()
        rows, grad = ids.numpy(), np.ones((*ids.shape, DIM), np.float32)
        single[0].step(rows, grad)
        kept = rows != 1  # not the padding row
        single[1].step(rows[kept], grad[kept])
        assert np.array_equal(first.table.weight, table.weight)
    assert first.optimizer.steps == single[0].steps == 2 * len(batches())


def test_two_layers_with_one_optimizer() -> None:
    """Two layers with one optimizer take one step, at the learning rate of the first."""
    first = ours(optimizer=SGD)
    second = pt.Embedding(ROWS, DIM, table=first.table, optimizer=lambda _: first.optimizer)
    optimizer = pt.Optimizer(torch.nn.ModuleList([first, second]))
    optimizer.param_groups[1]["lr"] = 0.125
    for layer in (first, second):
        layer(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert first.optimizer.steps == 1 and torch.equal(rows_of(first)[1], weights()[1] - 2 * 0.5)
