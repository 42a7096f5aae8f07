"""Conformance: every kernel, SIMD level and number of threads gives the bits of `reference`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyembed import _core
from pyembed.errors import ArgumentError, IdError
from tests.reference import kernels
from tests.strategies import DIMS, Batch, bad_ids, batches

HYPER = {
    "lr": 0.05,
    "eps": 1e-8,
    "momentum": 0.9,
    "one_minus_b1": 0.1,
    "one_minus_b2": 0.001,
    "correction": 0.3,
    "decay": 0.01,
    "beta": 1.0,
    "l1": 0.02,
    "l2": 0.03,
}
OF_EACH_STEP = ("step", "keep", "missed_momentum", "missed_lr", "clip_scale")
# The options of a step, each by itself, then all that go together.
OPTIONS: list[dict[str, Any]] = [
    {"clip_value": 0.5},
    {"clip_scale": 0.25},
    {"l2": 0.1},
    {"keep": 0.9},
    {"keep": 0.9, "lazy": True, "step": 50},
    {"max_norm": 1.0},
    {"max_norm": 3.0, "norm_type": 1.0},
    {"skip_nonfinite": True},
    {"frequency_power": 0.5},
    {"frequency_power": 1.3, "lazy": True, "step": 50},
    {
        "skip_nonfinite": True,
        "keep": 0.99,
        "lazy": True,
        "step": 9,
        "clip_value": 1.0,
        "max_norm": 2.0,
    },
]
OPTIONS.append(OPTIONS[-1] | {"frequency_power": 0.7})


def grouped(ids: np.ndarray, grad: np.ndarray | None, rows: int, **more: Any) -> _core.Batch:
    """A grouped batch of the core."""
    dim = 0 if grad is None else grad.shape[-1]
    batch = _core.Batch(np.ascontiguousarray(ids), grad, rows, dim, **more)
    _core.group([batch], 1)
    return batch


def rule_of(name: str, options: dict[str, Any] = kernels.NO_OPTIONS) -> _core.Rule:
    """A rule of the core with these options and the hyper-parameters of all tests."""
    fixed = {name: value for name, value in options.items() if name not in OF_EACH_STEP}
    rule = _core.Rule(name, **fixed)
    for option in OF_EACH_STEP:
        setattr(rule, option, options[option])
    rule.set_hyper(**HYPER)
    return rule


def update(
    columns: tuple[_core.Column, ...], batch: _core.Batch, rule: _core.Rule, threads: int
) -> int:
    """One step of the core; how many rows it left alone."""
    _core.update([_core.Step(rule, batch, columns)], threads)
    return rule.skipped


def state_of(rule: str, dim: int) -> list[int]:
    """The widths of a rule's columns, the weight first."""
    state = _core.RULES[rule][1].values()
    return [dim, *(dim if kind == "element" else 1 for kind in state)]


def cut(array: np.ndarray, widths: list[int]) -> tuple[np.ndarray, ...]:
    ends = np.cumsum(widths)
    return tuple(array[:, end - width : end] for end, width in zip(ends, widths, strict=True))


def table_of(rows: int, widths: list[int], seed: int, integers: int = 1) -> np.ndarray:
    """Rows of all columns, non-negative as squares are; counts and last steps are integers."""
    rng = np.random.default_rng(seed)
    some = np.abs(rng.standard_normal(9973, np.float32))  # a prime: rows differ; fast to repeat
    table = np.resize(some, (rows, sum(widths)))
    table[:, -integers:] = rng.integers(0, 40, (rows, integers))
    return table


def equal(got: np.ndarray, expected: np.ndarray) -> bool:
    """The same bits: NaN equals NaN, and zero differs from minus zero."""
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and (got.tobytes() == expected.tobytes())
    )


@given(batch=batches())
def test_gather(batch: Batch, simd: str, num_threads: int) -> None:
    """gather copies the named rows, into a fresh array and into a given one."""
    table = batch.table()
    expected = kernels.gather(table, batch.ids)
    column = _core.Column(table)
    assert equal(_core.gather(column, batch.ids, None, num_threads), expected)
    out = np.full_like(expected, np.nan)
    assert _core.gather(column, batch.ids, out, num_threads) is out
    assert equal(out, expected)


@given(batch=batches())
def test_gather_of_strided_rows(batch: Batch, simd: str, num_threads: int) -> None:
    """A column inside wider rows is gathered without its neighbours."""
    table = batch.table(columns=3)
    middle = table[:, batch.dim : 2 * batch.dim]
    expected = kernels.gather(middle, batch.ids)
    assert equal(_core.gather(_core.Column(middle), batch.ids, None, num_threads), expected)


def test_gather_keeps_every_bit(simd: str) -> None:
    """NaN payloads, infinities, subnormals and minus zero are copied as they are."""
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 1, 0x807FFFFF], np.uint32)
    table = np.tile(bits.view(np.float32), (3, 1))
    assert equal(_core.gather(_core.Column(table), np.array([2]), None, 1), table[2:])


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_gather_of_a_large_batch(offset: int, simd: str, num_threads: int) -> None:
    """Outputs past the caches are stored another way: the same rows, at any alignment."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((1000, 20), np.float32)
    ids = rng.integers(0, 1000, _core.STREAM_FLOATS // 20 + 1)
    out = np.empty(ids.size * 20 + 4, np.float32)[offset:][: ids.size * 20].reshape(-1, 20)
    _core.gather(_core.Column(table), ids, out, num_threads)
    assert equal(out, table[ids])


def groups_of(batch: _core.Batch) -> tuple[np.ndarray, ...]:
    return batch.unique_rows, batch.starts, batch.order


def group(ids: np.ndarray, rows: int, threads: int) -> tuple[np.ndarray, ...]:
    """The groups of ids alone."""
    batch = _core.Batch(ids, None, rows, 0)
    _core.group([batch], threads)
    return groups_of(batch)


@given(batch=batches())
def test_group(batch: Batch, num_threads: int) -> None:
    """group is a stable sort: unique rows ascend, positions ascend within a row."""
    found = group(batch.ids, batch.rows, num_threads)
    assert all(map(equal, found, kernels.group(batch.ids, batch.rows)))


@given(several=st.lists(batches(), max_size=5))
def test_group_of_many(several: list[Batch], num_threads: int) -> None:
    """Many batches are grouped as each by itself, also where some are grouped already."""
    made = [_core.Batch(batch.ids, None, batch.rows, 0) for batch in several]
    _core.group(made[1:2], num_threads)
    _core.group(made, num_threads)
    for one, batch in zip(made, several, strict=True):
        assert all(map(equal, groups_of(one), kernels.group(batch.ids, batch.rows)))


@pytest.mark.parametrize("rows", [2**11, 2**11 + 1, 2**22, 2**22 + 1, 2**33, 2**40])
def test_group_of_large_tables(rows: int, num_threads: int) -> None:
    """Every number of sorting passes gives the same groups as numpy's stable sort."""
    ids = np.random.default_rng(rows).integers(0, rows, 5000)
    ids[100:200] = ids[300]
    ids[:2] = 0, rows - 1
    assert all(map(equal, group(ids, rows, num_threads), kernels.group(ids, rows)))


@pytest.mark.parametrize("ids", [[1, 1], [2, 1], [0, 3, 2]])
def test_unique_ids_ascend(ids: list[int]) -> None:
    """A batch that says that its ids are unique and ascending is checked for it."""
    batch = _core.Batch(np.array(ids), None, 4, 0, unique=True)
    with pytest.raises(ArgumentError, match="unique ascending ids"):
        _core.group([batch], 1)
    assert not batch.grouped


# Ids around the sizes at which the sort, or the memory of its result, changes.
SIZES = [n + off for n in (1, 64, 2048, 5461, 16384, 100_000) for off in (0, 1)]


def test_groups_stay_while_others_are_made() -> None:
    """The memory of groups is used again once nobody holds them, and not before."""
    rng = np.random.default_rng(0)
    held: list[tuple[np.ndarray, tuple[np.ndarray, ...]]] = []
    for at in range(6 * len(SIZES)):
        ids = rng.integers(0, 1 << 20, SIZES[at % len(SIZES)])
        held.append((ids, group(ids, 1 << 20, 1 + at % 3)))
        if at % 4 == 3:
            del held[rng.integers(len(held))]
            held[-1] = (held[-1][0], held[-1][1][:1])  # one of the arrays is enough to keep all
        for kept, arrays in held[-8:]:
            assert all(map(equal, arrays, kernels.group(kept, 1 << 20)))


def test_groups_of_several_callers() -> None:
    """Threads that group at a time do not meet in memory that is used again."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 1 << 20, n) for n in (5_000, 40_000, 60_000, 100_000)]

    def caller(at: int) -> bool:
        ids = batches[at % len(batches)]
        expected = kernels.group(ids, 1 << 20)
        return all(all(map(equal, group(ids, 1 << 20, 1), expected)) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(caller, range(8)))


@given(batch=batches(), scale=st.booleans())
def test_sum_groups(batch: Batch, scale: bool, simd: str, num_threads: int) -> None:
    """Gradients of equal ids are summed in the order of the batch, whatever the threads."""
    grad = batch.grad().reshape(-1, batch.dim)
    groups = kernels.group(batch.ids, batch.rows)
    found = _core.sum_groups(
        grouped(batch.ids, grad, batch.rows, scale_by_count=scale), num_threads
    )
    assert equal(found, kernels.sum_groups(*groups, grad, scale))


@given(batch=batches(), alpha=st.sampled_from([1.0, -0.25, 1e-3]))
def test_add_groups(batch: Batch, alpha: float, simd: str, num_threads: int) -> None:
    """The deterministic scatter-add gives the bits of the reference and leaves the skipped row."""
    grad = batch.grad().reshape(-1, batch.dim)
    groups = kernels.group(batch.ids, batch.rows)
    skip = int(groups[0][0]) if groups[0].size else -1
    got, expected = batch.table(), batch.table()
    made = grouped(batch.ids, grad, batch.rows, skip_row=skip)
    _core.add_groups(_core.Column(got), made, alpha, num_threads)
    sums = kernels.sum_groups(*groups, grad)
    kernels.add_groups(expected, groups[0], sums, np.float32(alpha), skip)
    assert equal(got, expected)


@given(batch=batches(), alpha=st.sampled_from([1.0, -0.25, 1e-3]), first=st.booleans())
def test_scatter_add(batch: Batch, alpha: float, first: bool, simd: str) -> None:
    """On one thread the additions happen in the order of the batch, grouped or not."""
    got, expected = batch.table(), batch.table()
    made = _core.Batch(batch.ids, batch.grad(), batch.rows, batch.dim)
    if first:
        _core.group([made], 1)
    _core.scatter_add(_core.Column(got), made, alpha, 1)
    kernels.scatter_add(expected, batch.ids, batch.grad(), alpha)
    assert equal(got, expected)


@pytest.mark.parametrize("rule", _core.RULES)
@settings(max_examples=10)
@given(batch=batches(), scale=st.booleans(), skip=st.booleans())
def test_update(
    batch: Batch, rule: str, scale: bool, skip: bool, simd: str, num_threads: int
) -> None:
    """A step gives the bits of the reference, and rows that are not in the batch keep theirs."""
    grad = batch.grad().reshape(-1, batch.dim)
    groups = kernels.group(batch.ids, batch.rows)
    skip_row = int(groups[0][-1]) if skip and groups[0].size else -1
    widths = state_of(rule, batch.dim)
    got, expected = (table_of(batch.rows, widths, batch.seed) for _ in range(2))
    columns = tuple(map(_core.Column, cut(got, widths)))
    made = grouped(batch.ids, grad, batch.rows, skip_row=skip_row, scale_by_count=scale)
    update(columns, made, rule_of(rule), num_threads)
    sums = kernels.sum_groups(*groups, grad, scale)
    kernels.update(cut(expected, widths), groups[0], sums, rule, HYPER, skip_row)
    assert equal(got, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("rule", ["sgd", "momentum", "rowwise_adam"])
@settings(max_examples=5)
@given(batch=batches())
def test_update_with_options(
    batch: Batch, rule: str, options: dict[str, Any], simd: str, num_threads: int
) -> None:
    """The options of a step give the bits of the reference too."""
    grad = batch.grad().reshape(-1, batch.dim)
    groups = kernels.group(batch.ids, batch.rows)
    if "skip_nonfinite" in options and grad.size:
        grad[:: max(1, len(grad) // 3), -1] = [np.nan, np.inf, -np.inf][batch.seed % 3]
    lazy = "lazy" in options
    kept = lazy + ("frequency_power" in options)
    widths = state_of(rule, batch.dim) + kept * [1]
    if rule == "momentum" and lazy:
        options = options | {"missed_momentum": 0.8, "missed_lr": 0.05}
    options = kernels.NO_OPTIONS | options
    got, expected = (table_of(batch.rows, widths, batch.seed, max(1, kept)) for _ in range(2))
    columns = tuple(map(_core.Column, cut(got, widths)))
    before = got.copy()
    found = update(
        columns, grouped(batch.ids, grad, batch.rows), rule_of(rule, options), num_threads
    )
    sums = kernels.sum_groups(*groups, grad)
    skipped = kernels.update(cut(expected, widths), groups[0], sums, rule, HYPER, -1, options)
    assert found == skipped
    assert equal(got, expected)
    others = np.setdiff1d(np.arange(batch.rows), groups[0])
    assert equal(got[others], before[others])
    if lazy and batch.rows < 1000:
        options = options | {"step": 60}
        rows = grouped(np.arange(batch.rows), None, batch.rows, unique=True)
        _core.catch_up(_core.Step(rule_of(rule, options), rows, columns), num_threads)
        kernels.catch_up(cut(expected, widths), options)
        assert equal(got, expected)


@pytest.mark.parametrize("rule", _core.RULES)
@settings(max_examples=5)
@given(batch=batches(), power=st.sampled_from([0.3, 0.5, 1.0]))
def test_update_by_frequency(
    batch: Batch, rule: str, power: float, simd: str, num_threads: int
) -> None:
    """In every rule the learning rate of a row falls with its count, bit for bit as in the twin."""
    grad = batch.grad().reshape(-1, batch.dim)
    groups = kernels.group(batch.ids, batch.rows)
    widths = [*state_of(rule, batch.dim), 1]
    got, expected = (table_of(batch.rows, widths, batch.seed) for _ in range(2))
    skip_row = int(groups[0][-1]) if groups[0].size else -1
    for table in (got, expected):
        table[groups[0][:1], -1] = 2**24
    options = kernels.NO_OPTIONS | {"frequency_power": power}
    columns = tuple(map(_core.Column, cut(got, widths)))
    made = grouped(batch.ids, grad, batch.rows, skip_row=skip_row)
    update(columns, made, rule_of(rule, options), num_threads)
    sums = kernels.sum_groups(*groups, grad)
    kernels.update(cut(expected, widths), groups[0], sums, rule, HYPER, skip_row, options)
    assert equal(got, expected)


@given(several=st.lists(batches(), max_size=4))
def test_update_of_many(several: list[Batch], simd: str, num_threads: int) -> None:
    """Threads share the gradients of all tables; the bits are those of single updates."""
    got, expected, steps = [], [], []
    for batch in several:
        rows = np.resize(np.random.default_rng(1).random(997, np.float32), (70000, batch.dim))
        got.append(rows[: batch.rows].copy())
        expected.append(got[-1].copy())
        grad = batch.grad().reshape(-1, batch.dim)
        groups = kernels.group(batch.ids, batch.rows)
        made = grouped(batch.ids, grad, batch.rows)
        steps.append(_core.Step(rule_of("sgd"), made, (_core.Column(got[-1]),)))
        kernels.update((expected[-1],), groups[0], kernels.sum_groups(*groups, grad), "sgd", HYPER)
    _core.update(steps, num_threads)
    assert all(map(equal, got, expected))


def test_a_step_is_recorded_with_its_rows() -> None:
    """One call changes the rows, counts the step and drops what was accumulated for it."""
    table = np.zeros((4, 2), np.float32)
    rule, columns = rule_of("sgd"), (_core.Column(table),)
    counts: dict[str, dict[str, int]] = {"adam": {"steps": 3}}
    made = grouped(np.array([1, 1]), np.ones((2, 2), np.float32), 4)
    pending, rule.step = [made], 7
    step = _core.Step(rule, made, columns, counts, pending)
    assert counts == {"adam": {"steps": 3}} and pending
    _core.update([step], 1)
    assert counts == {"adam": {"steps": 3}, "sgd": {"steps": 7}} and not pending
    assert table[1].all() and not table[[0, 2, 3]].any()


def test_a_step_refuses_what_does_not_fit() -> None:
    """Columns of another shape, rows that the table lacks, and its own memory as the gradient."""
    table = np.zeros((4, 2), np.float32)
    weight, made = _core.Column(table), grouped(np.array([3]), np.ones((1, 2), np.float32), 4)
    with pytest.raises(ValueError, match="takes 3 columns"):
        _core.Step(_core.Rule("adam"), made, (weight,))
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), not \(4, 2\)"):
        _core.Step(_core.Rule("adagrad"), made, (weight, _core.Column(table[:3])))
    with pytest.raises(ValueError, match="not of 3 of 2"):
        _core.Step(_core.Rule("sgd"), made, (_core.Column(table[:3]),))
    with pytest.raises(ArgumentError, match="shares memory"):
        _core.Step(_core.Rule("sgd"), grouped(np.array([3]), table[:1], 4), (weight,))


@given(batch=batches(), skip=st.booleans())
def test_global_norm(batch: Batch, skip: bool, simd: str, num_threads: int) -> None:
    """The norm of all gradients is summed in one order, without the row that is skipped."""
    rows = np.unique(batch.ids).astype(np.int64)
    grad = batch.table()[rows]
    skip_row = int(rows[0]) if skip and rows.size else -1
    if rows.size > 1:
        grad[-1, 0] = np.inf
    for finite in (False, True):
        expected = kernels.global_norm(rows, grad, skip_row, finite)
        made = grouped(rows, grad, batch.rows, skip_row=skip_row, unique=True)
        assert _core.global_norm(made, finite, num_threads) == expected


@pytest.mark.parametrize("rule", _core.RULES)
@pytest.mark.parametrize("what", ["zeros", "zero weight", "huge", "tiny"])
def test_rules_at_the_edge(rule: str, what: str, simd: str) -> None:
    """Rows and gradients of zeros, and of the largest and smallest numbers, as in the reference."""
    widths = state_of(rule, 17)
    got = np.zeros((4, sum(widths)), np.float32)
    grad = np.zeros((4, 17), np.float32)
    if what != "zeros":
        grad[:] = {"zero weight": 1.0, "huge": 1e30, "tiny": 1e-40}[what]
        got[1:] = 0.0 if what == "zero weight" else grad[0, 0]
    expected = got.copy()
    columns = tuple(map(_core.Column, cut(got, widths)))
    update(columns, grouped(np.arange(4), grad, 4, unique=True), rule_of(rule), 1)
    kernels.update(cut(expected, widths), np.arange(4), grad, rule, HYPER)
    np.testing.assert_array_equal(got, expected)  # a NaN may have another sign
    if what in ("zeros", "zero weight"):
        assert np.isfinite(got).all()


@pytest.mark.parametrize("rule", _core.RULES)
def test_update_of_unique_rows(rule: str, simd: str, num_threads: int) -> None:
    """Gradients that belong to ascending unique rows need no groups."""
    rng = np.random.default_rng(5)
    widths = state_of(rule, 17)
    got, expected = (table_of(300, widths, 5) for _ in range(2))
    rows = np.unique(rng.integers(0, 300, 200))
    grad = rng.standard_normal((rows.size, 17), np.float32)
    columns = tuple(map(_core.Column, cut(got, widths)))
    update(columns, grouped(rows, grad, 300, unique=True), rule_of(rule), num_threads)
    kernels.update(cut(expected, widths), rows, grad, rule, HYPER)
    assert equal(got, expected)


@given(
    dim=DIMS,
    rows=st.integers(0, 50),
    seed=st.integers(0, 2**64 - 1),
    first=st.sampled_from([0, 1, 1000, 2**40 - 1]),
    kind=st.sampled_from(["normal", "uniform"]),
)
def test_fill(
    dim: int, rows: int, seed: int, first: int, kind: str, simd: str, num_threads: int
) -> None:
    """Random rows are the reference's bits, for any cut into rows, inside wider rows too."""
    wide = np.full((rows, dim + 3), 7, np.float32)
    _core.fill(_core.Column(wide[:, :dim]), kind, seed, first, -0.5, 2.0, num_threads)
    assert equal(
        np.ascontiguousarray(wide[:, :dim]),
        kernels.fill((rows, dim), kind, seed, first, -0.5, 2.0),
    )
    assert (wide[:, dim:] == 7).all()


def test_threefry_known_answer() -> None:
    """The generator is Threefry4x32-13, by a known answer of its authors' Random123 library."""
    # key 0, counter 0: lane 0 of block 0 of seed 0.
    expected = [0x531C7E4F, 0x39491EE5, 0x2C855A92, 0x3D6ABF9A]
    assert kernels.threefry(0, 0)[:, 0].tolist() == expected


@given(values=st.lists(st.floats(width=32), max_size=200), num_threads=st.integers(1, 3))
def test_all_finite(values: list[float], num_threads: int) -> None:
    """all_finite finds any NaN and any infinity, and nothing else."""
    array = np.array(values, np.float32)
    assert _core.all_finite(array, num_threads) == np.isfinite(array).all()


@pytest.mark.parametrize("where", [0, 1, 16383, 16384, 99_998, 99_999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite_of_large_arrays(where: int, value: float, simd: str, num_threads: int) -> None:
    """A single bad element is found wherever it is."""
    array = np.ones(100_000, np.float32)
    array[where] = value
    assert not _core.all_finite(array, num_threads)


@given(batch=batches(), data=st.data())
def test_bad_ids_change_nothing(batch: Batch, data: st.DataObject, num_threads: int) -> None:
    """An id outside the table is an IndexError with its place, before anything is written."""
    bad = data.draw(bad_ids(batch.rows))
    ids = np.append(batch.ids.ravel().astype(np.int64), bad)
    column = _core.Column(batch.table())
    out = np.full((ids.size, batch.dim), 9, np.float32)
    message = rf"ids\[{ids.size - 1}\] = {bad} is outside 0\.\.{batch.rows - 1}"
    for call in (
        lambda: _core.gather(column, ids, out, num_threads),
        lambda: group(ids, batch.rows, num_threads),
        lambda: _core.check(_core.Batch(ids, None, batch.rows, 0), num_threads),
        lambda: _core.scatter_add(
            column, _core.Batch(ids, out, batch.rows, batch.dim), 1.0, num_threads
        ),
    ):
        with pytest.raises(IdError, match=message):
            call()
    assert (out == 9).all()
    assert equal(column.array, batch.table())


def test_bad_id_position_is_the_first(num_threads: int) -> None:
    """Of several bad ids the first is named, by its index in an array of any rank."""
    ids = np.zeros((40, 50, 3), np.int32)
    ids[11, 7, 2] = -4
    ids[30, 0, 0] = 99
    with pytest.raises(IndexError, match=r"ids\[11, 7, 2\] = -4 is outside 0\.\.9"):
        _core.check_ids(ids, 10, num_threads)


def test_ids_into_an_empty_table() -> None:
    """A table without rows has no valid id, and says so."""
    with pytest.raises(IdError, match=r"ids\[0\] = 0 is outside an empty table"):
        _core.gather(_core.Column(np.empty((0, 3), np.float32)), np.array([0]), None, 1)


def test_simd_levels() -> None:
    """An unknown level is an error that names those there are; nothing is fallen back to."""
    with pytest.raises(ValueError, match="v9.*baseline"):
        _core.use_simd("v9")


def test_output_must_not_overlap() -> None:
    """A gather into the table's own memory is refused."""
    table = np.zeros((8, 4), np.float32)
    with pytest.raises(ValueError, match="overlaps"):
        _core.gather(_core.Column(table), np.array([0, 1]), table[2:4], 1)


def test_crc32c() -> None:
    """The checksum is CRC-32C, by the check value of its definition."""
    assert _core.crc32c(b"123456789") == 0xE3069283
    assert _core.crc32c(b"") == 0


@given(data=st.binary(max_size=300), size=st.integers(1, 80), threads=st.integers(1, 3))
def test_crc32c_of_pieces(data: bytes, size: int, threads: int) -> None:
    """Each piece has the checksum that it has alone, the short one at the end too."""
    alone = [_core.crc32c(data[at : at + size]) for at in range(0, len(data), size)]
    assert _core.crc32c_pieces(data, size, threads) == alone
