"""Finite gradients that float32 cannot add up or square, and divisions by zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyembed import Embedding, EmbeddingBag, SparseGrad, Table, optim
from pyembed.errors import ArgumentError, NonFiniteError
from tests.optim.rules import RULES, Make, every_rule

HUGE = np.full((2, 3), 3e38, np.float32)  # of which two do not add up
ONE_BAG = ([[1, 1]], HUGE[:1])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_norm": 1.0},
    {"clip_value": 1.0},
    {"max_norm": 1.0},
    {"frequency_power": 0.5},
]
SQUARES = sorted(set(RULES) - {"sgd", "momentum", "nesterov", "lars"})


def bag_step(mode: str, **more: Any) -> Callable[[Make, Table], None]:
    """A step from two bags that name one row, whose gradients do not add up."""

    def step(make: Make, table: Table) -> None:
        layer = EmbeddingBag(4, 3, mode=mode, table=table)
        weights = {key: np.full((2, 1), value, np.float32) for key, value in more.items()}
        make(layer).step(layer.bags([[1], [1]], **weights), HUGE)

    return step


def sparse_step(make: Make, table: Table) -> None:
    layer = Embedding(4, 3, table=table, sparse=True)
    gradient = layer.backward([1, 1], HUGE)
    assert isinstance(gradient, SparseGrad)
    make(layer).step(gradient)


def accumulate(make: Make, table: Table) -> None:
    make(table).accumulate([1, 1], HUGE)


def accumulate_twice(make: Make, table: Table) -> None:
    optimizer = make(table)
    optimizer.accumulate([1], HUGE[:1])
    optimizer.accumulate([1], HUGE[:1])
    optimizer.step()


ENTRIES: dict[str, Callable[[Make, Table], None]] = {
    "step": lambda make, table: make(table).step([1, 1], HUGE),
    "scaled by frequency": lambda make, table: make(
        Embedding(4, 3, table=table, scale_grad_by_freq=True)
    ).step([1, 1], HUGE),
    "step_many": lambda make, table: optim.step_many(
        [
            (optim.SGD(Table.memory(4, 3)), [0], np.ones((1, 3), np.float32)),
            (make(table), [1, 1], HUGE),
        ]
    ),
    "accumulate": accumulate,
    "accumulate twice": accumulate_twice,
    "sparse gradient": sparse_step,
    "sums": bag_step("sum"),
    "weighted sums": bag_step("sum", per_sample_weights=2.0),
    "means": bag_step("mean"),
    "maxima": bag_step("max"),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@every_rule
def test_sums_that_overflow_are_refused(
    make: Make, entry: Callable[[Make, Table], None], simd: str
) -> None:
    """Every rule refuses them at every entry point, with every option, before a row changes."""
    for options in OPTIONS:
        table = Table.memory(4, 3)
        with pytest.raises(NonFiniteError):
            entry(lambda target, more=options: make(target, **more), table)
        assert not table.weight.any()
        assert all(count["steps"] == 0 for count in table.store.steps.values())


@pytest.mark.parametrize("name", SQUARES)
def test_squares_that_overflow_are_refused(name: str) -> None:
    """A rule that squares refuses 1e20, unless clipping makes it smaller; the others take it."""
    gradient = np.full((1, 3), 1e20, np.float32)
    table = Table.memory(4, 3)
    with pytest.raises(NonFiniteError, match=r"row 1 add up to 1e\+20"):
        RULES[name](table).step([1], gradient)
    assert not table.weight.any()
    for clip in ({"clip_norm": 1.0}, {"clip_value": 1.0}):
        clipped = Table.memory(4, 3)
        RULES[name](clipped, lr=0.1, **clip).step([1], gradient)
        assert np.isfinite(clipped.weight).all() and clipped.weight[1].all()


@pytest.mark.parametrize("name", sorted(set(RULES) - set(SQUARES)))
def test_rules_without_squares_take_large_gradients(name: str) -> None:
    """A gradient of 1e30 is no reason to refuse where nothing squares it in float32."""
    table = Table.memory(4, 3)
    RULES[name](table, lr=1e-3).step([1], np.full((1, 3), 1e30, np.float32))
    assert np.isfinite(table.weight).all() and table.weight[1].all()


def test_large_gradients_that_add_up() -> None:
    """Only true sums decide: huge gradients of several rows, and two that cancel, are taken."""
    table = Table.memory(4, 3)
    signs = np.array([1, -1, 1], np.float32)[:, np.newaxis]
    optim.SGD(table, lr=0.5).step([1, 1, 2], signs * HUGE[:1])
    assert table.weight[1].tolist() == [0.0] * 3
    assert (table.weight[2] == np.float32(-0.5) * HUGE[0]).all()


@every_rule
def test_rows_that_overflow_are_skipped(make: Make) -> None:
    """nonfinite="skip_row" leaves such a row alone, counts it, and updates the others."""
    for options in OPTIONS:
        table = Table.memory(4, 3)
        optimizer = make(table, nonfinite="skip_row", **options)
        optimizer.step([1, 1, 2], np.concatenate([HUGE, np.ones((1, 3), np.float32)]))
        assert optimizer.skipped == 1 and not table.weight[1].any() and table.weight[2].all()


@pytest.mark.parametrize("first", [[0, 0, 0], [1, 0, -1], [1e-30, 1e-38, 0], [1e-42, -1e-45, 1]])
@every_rule
def test_small_first_gradients(make: Make, first: list[float]) -> None:
    """Gradients of zero and of the smallest numbers leave finite weights in a fresh table."""
    for options in OPTIONS:
        table = Table.from_array(np.full((4, 3), 0.5, np.float32))
        optimizer = make(table, **options)
        for _ in range(3):
            optimizer.step([1], np.array([first], np.float32))
        assert np.isfinite(table.weight).all()


@pytest.mark.parametrize(
    "rule", [optim.Adagrad, optim.RowwiseAdagrad, optim.RMSprop, optim.Adam, optim.LAMB]
)
def test_eps_is_above_zero(rule: Make) -> None:
    """Zero divided by zero is not a number, so every rule that adds eps refuses one of zero."""
    with pytest.raises(ArgumentError, match="eps = 0"):
        rule(Table.memory(4, 3), eps=0.0)


def test_ftrl_divides_by_more_than_zero() -> None:
    """FTRL needs beta or l2, also relative to a learning rate that a schedule changes."""
    with pytest.raises(ArgumentError, match="beta = 0, l2 = 0, lr = 0.1"):
        optim.FTRL(Table.memory(4, 3), beta=0.0)
    optim.FTRL(Table.memory(4, 3), beta=0.0, l2=1.0)
    table = Table.memory(4, 3)
    rising = optim.FTRL(table, lr=lambda step: 1e35 if step else 0.1)
    ones = np.ones((1, 3), np.float32)
    rising.step([1], ones)
    before = table.gather(1)
    with pytest.raises(ArgumentError, match="beta / lr"):
        rising.step([1], ones)
    assert np.array_equal(table.gather(1), before) and rising.steps == 1
