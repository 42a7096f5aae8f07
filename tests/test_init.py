"""Initialisers: distributions, streams, and what they refuse."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Table, init
from pyembed.errors import ArgumentError


def kolmogorov_smirnov(values: np.ndarray, cdf: np.ndarray) -> float:
    """The largest distance of the sample's distribution from `cdf` of the sorted values, times
    sqrt(n): above 2.2 for one sample in 10,000 of the right distribution."""
    n = values.size
    steps = np.arange(n + 1) / n
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    return float(distance * math.sqrt(n))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-3.0, 0.01), (100.0, 5.0)])
def test_normal(mean: float, std: float) -> None:
    """normal has the normal distribution (Kolmogorov-Smirnov, 200,000 values)."""
    values = np.sort(Table.memory(2000, 100, init=init.normal(mean, std), seed=3).weight.ravel())
    z = (values.astype(float) - mean) / (std * math.sqrt(2))
    cdf = np.array([0.5 * (1 + math.erf(x)) for x in z])
    assert kolmogorov_smirnov(values, cdf) < 2.2


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, 0.25), (3.0, 3.0)])
def test_uniform(low: float, high: float) -> None:
    """uniform has the uniform distribution and stays within its bounds."""
    values = np.sort(Table.memory(2000, 100, init=init.uniform(low, high), seed=3).weight.ravel())
    assert low <= values[0] <= values[-1] <= high
    if high > low:
        assert kolmogorov_smirnov(values, (values - low) / (high - low)) < 2.2


def test_neighbours_are_independent() -> None:
    """Rows, columns and streams of other seeds are uncorrelated (|r| < 4.5 / sqrt(n))."""
    n = 40_000
    a = Table.memory(n, 32, init=init.normal(), seed=1).weight.astype(float)
    b = Table.memory(n, 32, init=init.normal(), seed=2).weight.astype(float)
    pairs = [(a[:, 0], a[:, 1]), (a[:, 0], a[:, 16]), (a[1:, 5], a[:-1, 5]), (a[:, 3], b[:, 3])]
    pairs.append((a[:, 0] ** 2, a[:, 16] ** 2))  # the two normals of one Box-Muller pair
    for x, y in pairs:
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / math.sqrt(x.size)


@given(
    rows=st.integers(1, 80),
    dim=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 80), max_size=4),
    threads=st.integers(1, 3),
)
def test_pieces_make_the_whole(rows: int, dim: int, cuts: list[int], threads: int) -> None:
    """However a table is cut into calls, it gets the same rows."""
    recipe = init.normal(0.5, 2.0)
    whole = np.empty((rows, dim), np.float32)
    recipe.fill(whole, seed=9, num_threads=1)
    pieces = np.empty_like(whole)
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for first, last in itertools.pairwise(edges):
        recipe.fill(pieces[first:last], 9, first, threads)
    assert np.array_equal(whole, pieces)


def test_constants() -> None:
    """constant and zeros set every element."""
    assert (Table.memory(3, 4, init=init.constant(2.5)).weight == 2.5).all()
    assert not Table.memory(3, 4, init=init.zeros()).weight.any()


def test_state_columns_start_as_zero() -> None:
    """The initialiser fills the weight alone."""
    t = Table.memory(100, 4, "adam", {"bias": 1}, init=init.normal())
    assert t.weight.all()
    for name in ("exp_avg", "exp_avg_sq", "bias"):
        assert not t.column(name).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: init.normal(std=-1),
        lambda: init.normal(mean=math.nan),
        lambda: init.uniform(1, 0),
        lambda: init.uniform(0, math.inf),
        lambda: init.constant(math.nan),
        lambda: init.normal().fill(np.zeros((1, 1), np.float32), seed=-1),
        lambda: init.normal().fill(np.zeros((1, 1), np.float32), seed=2**64),
    ],
)
def test_bad_parameters(make: object) -> None:
    """Parameters without a meaning are refused."""
    with pytest.raises(ArgumentError, match="allowed"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal", init.normal()),
        ("normal:1,2", init.normal(1, 2)),
        ("uniform:-1,1", init.uniform(-1, 1)),
        ("constant:3", init.constant(3)),
        ("zeros", init.zeros()),
    ],
)
def test_parse(text: str, expected: init.Initializer) -> None:
    """The command line's spelling."""
    assert init.parse(text) == expected


@pytest.mark.parametrize("text", ["", "gauss", "normal:a", "normal:1,2,3", "constant", "zeros:1"])
def test_parse_refuses(text: str) -> None:
    """Anything else names what is allowed or what is no number."""
    with pytest.raises(ArgumentError, match="initialiser"):
        init.parse(text)
