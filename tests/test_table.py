"""Table: rows in memory and on disk do the same, and refuse the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import pyembed
from pyembed import Table
from pyembed.errors import (
    ArgumentError,
    ClosedError,
    DTypeError,
    IdError,
    ReadOnlyError,
    TableError,
)
from tests.reference import kernels
from tests.strategies import Batch, batches

Maker = Callable[..., Table]


@pytest.fixture(params=["memory", "create"])
def make(request: pytest.FixtureRequest, path: Path) -> Maker:
    """Table.memory, and Table.create in a temporary folder."""
    if request.param == "memory":
        return Table.memory
    return lambda *args, **kwargs: Table.create(path, *args, **kwargs)


def test_shape_and_columns(make: Maker) -> None:
    """A row is the weight, the optimizer's state, then the user's own columns."""
    with make(5, 3, optimizer="adam", columns={"bias": 1}) as t:
        assert t.columns == {"weight": 3, "exp_avg": 3, "exp_avg_sq": 3, "bias": 1}
        assert (t.rows, t.dim, t.nbytes) == (5, 3, 5 * 10 * 4)
        assert t.column("bias").shape == (5, 1)
        assert not t.weight.any()


@given(batch=batches())
def test_gather_and_scatter_add(batch: Batch) -> None:
    """gather and scatter_add take ids of any shape and integer dtype."""
    with Table.from_array(batch.table()) as t:
        assert np.array_equal(t.gather(batch.ids), kernels.gather(batch.table(), batch.ids))
        out = np.empty((*batch.ids.shape, batch.dim), np.float32)
        assert t.gather(batch.ids, out=out) is out
        expected = batch.table()
        sums = kernels.group(batch.ids, batch.rows)
        t.scatter_add(batch.ids, batch.grad(), 0.5, deterministic=True)
        grad = batch.grad().reshape(-1, batch.dim)
        total = kernels.sum_groups(*sums, grad)
        kernels.add_groups(expected, sums[0], total, 0.5)
        assert np.array_equal(t.weight, expected)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8"])
def test_every_integer_dtype(dtype: str) -> None:
    """Ids of every integer dtype, byte order and stride name the same rows."""
    t = Table.memory(100, 3, init=pyembed.init.normal())
    ids = np.array([5, 99, 0, 5, 7, 3], dtype)[::2]
    assert np.array_equal(t.gather(ids), t.weight[[5, 0, 7]])
    assert np.array_equal(t.gather(ids.tolist()), t.weight[[5, 0, 7]])


def test_ragged_ids() -> None:
    """Lists of several lengths are no batch; the error names both ways to make one."""
    with pytest.raises(DTypeError, match=r"lists of several lengths.*offsets.*padding_idx"):
        Table.memory(4, 2).gather([[1], [2, 3]])


def test_no_ids(make: Maker) -> None:
    """An empty list is an empty batch."""
    with make(4, 2) as t:
        assert t.gather([]).shape == (0, 2)
        t.scatter_add([], np.empty((0, 2), np.float32))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[0, 1], [2, -1]], IdError, r"ids\[1, 1\] = -1 is outside 0\.\.3"),
        ([4], IdError, r"ids\[0\] = 4 is outside 0\.\.3"),
        (np.array([1, 2**64 - 1], np.uint64), IdError, r"ids\[1\] = 18446744073709551615"),
        ([0.0, 1.0], DTypeError, r"ids are float64; allowed: integers.*astype"),
        ([True, False], DTypeError, "ids are bool"),
        (["a"], DTypeError, "ids are <U1"),
        ([None], DTypeError, "ids are object"),
        (np.empty(0, np.float32), DTypeError, "ids are float32"),
    ],
)
def test_bad_ids(make: Maker, ids: Any, error: type[Exception], message: str) -> None:
    """Bad ids are one typed error in every call, and leave the table as it was."""
    with make(4, 2, init=pyembed.init.normal()) as t:
        before, values = t.weight.copy(), np.ones((*np.shape(ids), 2), np.float32)
        calls: list[Callable[[], object]] = [
            lambda: t.gather(ids),
            lambda: t.gather(ids, out=values),
            lambda: t.scatter_add(ids, values),
            lambda: t.scatter_add(ids, values, deterministic=True),
            lambda: t.writing(ids).__enter__(),
        ]
        for call in calls:
            with pytest.raises(error, match=message):
                call()
        assert np.array_equal(t.weight, before)
        assert (values == 1).all()
        assert t.state == "clean"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (np.ones((2, 3)), DTypeError, r"values is float64; allowed: float32; use values\.astype"),
        (np.ones((2, 4), np.float32), ArgumentError, r"shape \(2, 4\); expected \(2, 3\)"),
        (np.ones(3, np.float32), ArgumentError, r"shape \(3,\); expected \(2, 3\)"),
        (np.ones((2, 3), ">f4"), DTypeError, "values is >f4"),
    ],
)
def test_bad_values(make: Maker, values: Any, error: type[Exception], message: str) -> None:
    """Values of another dtype or shape are refused, not converted or broadcast."""
    with make(4, 3) as t:
        with pytest.raises(error, match=message):
            t.scatter_add([0, 1], values)
        assert not t.weight.any()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.empty((2, 3)), DTypeError),
        ([[0.0] * 3] * 2, DTypeError),
        (np.empty((3, 2), np.float32), ArgumentError),
        (np.empty((3, 2), np.float32).T, ArgumentError),
        (np.broadcast_to(np.float32(0), (2, 3)), ArgumentError),
    ],
)
def test_bad_out(make: Maker, out: object, error: type[Exception]) -> None:
    """An output that cannot take the rows as they are is refused."""
    with make(4, 3) as t, pytest.raises(error, match="out"):
        t.gather([0, 1], out=out)  # type: ignore[arg-type]


def test_out_inside_the_table() -> None:
    """An output that is the table's own memory is refused."""
    rows = np.zeros((4, 3), np.float32)
    with pytest.raises(ArgumentError, match="overlaps"):
        Table.from_array(rows).gather([0, 1], out=rows[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": -1, "dim": 2}, r"rows = -1; allowed: 0\.\.1099511627776"),
        ({"rows": 2**40 + 1, "dim": 2}, "rows"),
        ({"rows": 1, "dim": 0}, r"dim = 0; allowed: 1\.\.65536"),
        ({"rows": 1, "dim": 65537}, "dim"),
        ({"rows": 1, "dim": 2, "optimizer": "sdg"}, "allowed: sgd, momentum, .*ftrl, or None"),
        ({"rows": 1, "dim": 2, "columns": {"weight": 2}}, "given twice"),
        ({"rows": 1, "dim": 2, "columns": {"a b": 2}}, "column name 'a b'"),
        ({"rows": 1, "dim": 2, "columns": {"b": 0}}, "width 0"),
        ({"rows": 1, "dim": 2, "num_threads": 0}, "num_threads = 0"),
    ],
)
def test_bad_arguments(make: Maker, path: Path, arguments: dict[str, Any], message: str) -> None:
    """Arguments out of range name what is allowed, and nothing is made."""
    with pytest.raises(ArgumentError, match=message):
        make(**arguments)
    assert not path.exists()


def test_float_size_is_a_type_error(make: Maker) -> None:
    """A size that is no integer is refused, not truncated."""
    with pytest.raises(DTypeError, match="rows = 4.0 is a float"):
        make(4.0, 2)


def test_weight_is_read_only(make: Maker) -> None:
    """A plain write through the view is impossible; a block of writing() is the way."""
    with make(4, 2) as t:
        with pytest.raises(ValueError, match="read-only"):
            t.weight[0] = 1
        with t.writing([1, 2]) as weight:
            weight[[1, 2]] = [[1, 2], [3, 4]]
        assert t.gather([2, 1]).tolist() == [[3, 4], [1, 2]]
        with pytest.raises(ValueError, match="read-only"):
            weight[0] = 1


def test_append_equals_a_larger_table(make: Maker) -> None:
    """A table that grew has the rows and columns of one that was made at once."""
    init = pyembed.init.normal()
    whole = Table.memory(1000, 7, "adagrad", init=init, seed=5)
    with make(400, 7, "adagrad", init=init, seed=5) as t:
        t.append(600, init=init, seed=5)
        t.append(0)
        assert np.array_equal(t.weight, whole.weight)
        assert t.column("sum").shape == (1000, 7)
        t.append(2)
        assert not t.gather([1000, 1001]).any()


def test_append_keeps_state(make: Maker) -> None:
    """Rows and state written before an append are there after it."""
    with make(3, 2, "adagrad") as t:
        pyembed.optim.Adagrad(t, lr=1.0).step([2], np.ones((1, 2), np.float32))
        t.append(2)
        assert t.gather(2).tolist() == [-1, -1]
        assert t.column("sum")[2].tolist() == [1, 1]


def test_closed(make: Maker) -> None:
    """A closed table says so in every call; closing twice is allowed."""
    t = make(4, 2)
    t.close()
    t.close()
    calls: list[Callable[[], object]] = [
        lambda: t.gather([0]),
        lambda: t.scatter_add([0], np.ones((1, 2), np.float32)),
        lambda: t.weight,
        lambda: t.commit(),
        lambda: t.append(1),
        lambda: t.rows,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="was closed"):
            call()
    assert "closed" in repr(t)


def test_from_array_shares_memory() -> None:
    """A wrapped array stays its owner's: both sides see every write, strided rows included."""
    wide = np.zeros((5, 9), np.float32)
    t = Table.from_array(wide[:, 2:5])
    t.scatter_add([3], np.ones((1, 3), np.float32))
    assert wide[3].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert wide.sum() == 3


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((2, 2)), DTypeError, "float64"),
        ([[1.0]], DTypeError, "list"),
        (np.zeros(4, np.float32), ArgumentError, r"shape \(4,\)"),
        (np.zeros((2, 4), np.float32).T, ArgumentError, "ascontiguousarray"),
        (np.zeros((4, 2), np.float32)[::-1], ArgumentError, "ascontiguousarray"),
    ],
)
def test_bad_arrays(array: object, error: type[Exception], message: str) -> None:
    """An array whose rows a kernel cannot walk is refused with the remedy."""
    with pytest.raises(error, match=message):
        Table.from_array(array)  # type: ignore[arg-type]


def test_read_only_array() -> None:
    """A read-only array can be looked up, not changed."""
    rows = np.ones((4, 2), np.float32)
    rows.flags.writeable = False
    t = Table.from_array(rows)
    assert t.gather(1).tolist() == [1, 1]
    with pytest.raises(ReadOnlyError, match="read-only"):
        t.scatter_add([0], np.ones((1, 2), np.float32))
    with pytest.raises(ReadOnlyError):
        pyembed.optim.SGD(t).step([0], np.ones((1, 2), np.float32))


def test_values_that_are_the_table() -> None:
    """Values or ids that share memory with what is changed are refused: use a copy."""
    rows = np.array([[1], [2]], np.float32)
    t = Table.from_array(rows)
    calls: list[Callable[[], object]] = [
        lambda: t.scatter_add([1, 0], t.weight),
        lambda: pyembed.optim.SGD(t).step([1, 0], t.weight),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"use (values|grad)\.copy"):
            call()
    assert rows.tolist() == [[1], [2]]
    buffer = np.zeros(8, np.int64)
    with pytest.raises(ArgumentError, match="shares memory with the ids"):
        Table.memory(1, 2).gather(buffer, out=buffer.view(np.float32).reshape(8, 2))


def test_wrapped_arrays_do_not_grow() -> None:
    """Appending would leave the caller's array behind, so it is refused."""
    with pytest.raises(ArgumentError, match="array of yours"):
        Table.from_array(np.ones((2, 2), np.float32)).append(1)


def test_too_many_threads() -> None:
    """A number of threads that no system starts is refused, before it ends the process."""
    with pytest.raises(ArgumentError, match=r"allowed: 1\.\.1024"):
        Table.memory(1000, 64, num_threads=60_000)


def test_a_table_larger_than_memory_in_memory() -> None:
    """A table that is too large for memory is an error that names the size and a remedy."""
    with pytest.raises(TableError, match=r"does not fit into memory; use Table\.create"):
        Table.memory(2**40, 64)


def test_unaligned_ids() -> None:
    """Ids at an odd address are copied."""
    ids = np.frombuffer(b"\0" + np.arange(4).tobytes(), np.int64, 4, 1)
    assert Table.memory(4, 1).gather(ids).shape == (4, 1)
