"""Initialisers: distributions, streams, and what they refuse."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

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


def test_trunc_normal() -> None:
    """The cut normal has its distribution, stays inside, and leaves no pile at the bounds."""
    for mean, std, a, b in [(0.0, 1.0, -2.0, 2.0), (1.0, 2.0, 2.0, 3.0), (0.0, 1.0, -9.0, 0.5)]:
        recipe = init.trunc_normal(mean, std, a, b)
        values = np.sort(Table.memory(2000, 100, init=recipe, seed=3).weight.ravel())
        assert a <= values[0] <= values[-1] <= b
        assert (values == a).sum() + (values == b).sum() < 3
        phi = np.array([math.erfc(-(x - mean) / std / math.sqrt(2)) / 2 for x in values])
        low, high = (math.erfc(-(x - mean) / std / math.sqrt(2)) / 2 for x in (a, b))
        assert kolmogorov_smirnov(values, (phi - low) / (high - low)) < 2.2


@pytest.mark.parametrize(
    ("recipe", "name", "arguments"),
    [
        (init.xavier_uniform(2.0), "xavier_uniform_", {"gain": 2.0}),
        (init.xavier_normal(0.5), "xavier_normal_", {"gain": 0.5}),
        (init.kaiming_uniform(0.1), "kaiming_uniform_", {"a": 0.1}),
        (init.kaiming_uniform(mode="fan_out"), "kaiming_uniform_", {"mode": "fan_out"}),
        (init.kaiming_normal(nonlinearity="relu"), "kaiming_normal_", {"nonlinearity": "relu"}),
        (init.trunc_normal(0.2, 0.5, -0.1, 1.0), "trunc_normal_", (0.2, 0.5, -0.1, 1.0)),
    ],
)
def test_scales_are_torchs(recipe: init.Initializer, name: str, arguments: object) -> None:
    """Fans, gains and modes are torch's: equal deviation and range (200,000 values each)."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    twin = torch.empty(2000, 100)
    how = getattr(torch.nn.init, name)
    how(twin, **arguments) if isinstance(arguments, dict) else how(twin, *arguments)  # type: ignore[misc]
    ours, theirs = Table.memory(2000, 100, init=recipe).weight, twin.numpy()
    assert abs(ours.std() / theirs.std() - 1) < 0.01
    assert abs(ours.mean() - theirs.mean()) < 0.01 * theirs.std() + 1e-4
    if "uniform" in name:
        assert abs(ours.max() / theirs.max() - 1) < 1e-3


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """The shorter side is orthonormal, times gain."""
    w = Table.memory(*shape, init=init.orthogonal(2.0)).weight.astype(float)
    square = w.T @ w if shape[0] >= shape[1] else w @ w.T
    np.testing.assert_allclose(square, 4 * np.eye(min(shape)), atol=1e-5)


def test_sparse() -> None:
    """Each column has exactly ceil(sparsity * rows) zeros."""
    w = Table.memory(101, 7, init=init.sparse(0.25, std=3.0)).weight
    assert ((w == 0).sum(axis=0) == 26).all()
    assert 2.5 < w[w != 0].std() < 3.5


def test_ones_and_eye() -> None:
    """ones fills with one; eye is the identity, in pieces too."""
    assert (Table.memory(3, 2, init=init.ones()).weight == 1).all()
    assert np.array_equal(Table.memory(5, 3, init=init.eye()).weight, np.eye(5, 3))
    part = np.full((2, 3), 9, np.float32)
    init.eye().fill(part, first_row=1)
    assert part.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_recipes_on_disk(tmp_path: Path) -> None:
    """Recipes that know the shape, or need all rows at once, make the same table on disk."""
    for recipe in (init.xavier_normal(), init.orthogonal(), init.sparse(0.5), init.trunc_normal()):
        with Table.create(tmp_path / "t", 300, 20, "adagrad", init=recipe, seed=2) as t:
            assert np.array_equal(t.weight, Table.memory(300, 20, init=recipe, seed=2).weight)
        shutil.rmtree(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "param", "gain"),
    [
        ("linear", None, 1.0),
        ("sigmoid", None, 1.0),
        ("tanh", None, 5 / 3),
        ("relu", None, math.sqrt(2)),
        ("leaky_relu", None, 1.4141428569978354),
        ("leaky_relu", 0.0, math.sqrt(2)),
        ("leaky_relu", 10.0, math.sqrt(2 / 101)),
        ("selu", None, 0.75),
    ],
)
def test_gains(name: str, param: float | None, gain: float) -> None:
    """The recommended gains are torch's; an unknown nonlinearity is refused."""
    assert init.calculate_gain(name, param) == pytest.approx(gain, rel=1e-15)
    with pytest.raises(ArgumentError, match="nonlinearity = 'gelu'"):
        init.calculate_gain("gelu")
