"""Both layers as torch's own tests know them: construction, options, state, boundaries."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyembed import Embedding, EmbeddingBag, Table, functional
from pyembed.errors import ArgumentError, IdError
from pyembed.storage import npy

LAYERS: list[Any] = [Embedding, EmbeddingBag]


@pytest.mark.parametrize("layer", ["Embedding", "EmbeddingBag"])
@pytest.mark.parametrize("method", ["__init__", "from_pretrained"])
def test_signatures_are_torchs(layer: str, method: str) -> None:
    """Names, order and defaults of torch's arguments; ours come after them as keywords."""
    torch = pytest.importorskip("torch")
    theirs = inspect.signature(getattr(getattr(torch.nn, layer), method)).parameters.values()
    ours = inspect.signature(getattr(globals()[layer], method)).parameters.values()
    pairs = list(zip(theirs, ours, strict=False))
    assert [(t.name, t.default) for t, _ in pairs] == [(o.name, o.default) for _, o in pairs]
    rest = list(ours)[len(pairs) :]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("padding_idx", range(-6, 6))
def test_padding_idx_range(layer: Any, padding_idx: int) -> None:
    """padding_idx is allowed in -rows..rows-1 and refused elsewhere, by class and function."""
    weight = np.ones((4, 2), np.float32)
    function = functional.embedding if layer is Embedding else functional.embedding_bag
    if -4 <= padding_idx < 4:
        assert layer(4, 2, padding_idx=padding_idx).padding_idx == padding_idx % 4
        function([[0]], weight, padding_idx=padding_idx)
        return
    with pytest.raises(ArgumentError, match=r"allowed: -4\.\.3"):
        layer(4, 2, padding_idx=padding_idx)
    with pytest.raises(ArgumentError, match=r"allowed: -4\.\.3"):
        function([[0]], weight, padding_idx=padding_idx)


def test_functions_are_the_layers() -> None:
    """functional gives what the layers give, on plain, strided and mapped rows."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((20, 9), np.float32)
    for weight in (wide, wide[:, 2:6]):
        ids = rng.integers(0, 20, (5, 4))
        settings: dict[str, Any] = {"padding_idx": 2}
        got = functional.embedding(ids, weight, **settings)
        assert np.array_equal(got, Embedding.from_pretrained(weight, **settings)(ids))
        for mode in ("sum", "mean", "max"):
            got = functional.embedding_bag(ids, weight, mode=mode, **settings)
            expected = EmbeddingBag.from_pretrained(weight, mode=mode, **settings)(ids)
            assert np.array_equal(got, expected)


def test_functions_on_a_map(tmp_path: Path) -> None:
    """An np.memmap is used where it is: a renorm reaches the file."""
    np.save(tmp_path / "w.npy", np.full((3, 2), 3, np.float32))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r+")
    functional.embedding([1], mapped, max_norm=1.0, norm_type=np.inf)
    mapped.flush()
    saved = np.load(tmp_path / "w.npy")
    assert saved[0].tolist() == [3, 3]
    assert abs(saved[1] - 1).max() < 1e-6


@pytest.mark.parametrize("layer", LAYERS)
def test_pretrained_options(layer: Any) -> None:
    """max_norm=2 with norm_type=0.5 scales the source itself; untouched rows stay."""
    rows = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
    e = layer.from_pretrained(rows, max_norm=2.0, norm_type=0.5)
    e([[0, 1]])
    norms = (np.sqrt(np.abs(rows[:2])).sum(1)) ** 2
    assert (norms <= 2.0).all()
    assert rows[2].tolist() == [7, 8, 9]


def test_max_norm_with_unsorted_repeats() -> None:
    """Thousands of repeated ids in any order: each row is scaled once, all copies are equal."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((50, 8), np.float32) * 10
    once = weight.copy()
    e = Embedding.from_pretrained(weight, max_norm=1.0)
    ids = rng.integers(0, 50, (2, 2000))
    rows = e(ids)
    # The factor is rounded to float32 once, each product once more: up to 2^-23 over the limit.
    assert (np.linalg.norm(rows.astype(float), axis=-1) <= 1 + 2**-23).all()
    functional.renorm_(once, np.unique(ids), 1.0)
    assert np.array_equal(weight, once)


def test_gradient_ignores_the_scaling() -> None:
    """The gradient of a lookup with max_norm is that of the plain lookup."""
    e = Embedding(5, 3, max_norm=0.1, seed=1)
    ids, grad = np.array([1, 1, 3]), np.ones((3, 3), np.float32)
    e(ids)
    gradient = np.asarray(e.backward(ids, grad))
    assert gradient.tolist() == [[0] * 3, [2] * 3, [0] * 3, [1] * 3, [0] * 3]


@pytest.mark.parametrize("layer", LAYERS)
def test_no_rows(layer: Any) -> None:
    """A layer without rows takes empty batches, and refuses any id."""
    e = layer(0, 3)
    assert e(np.empty((2, 0), np.int64)).size in (0, 6)
    with pytest.raises(IdError, match="empty table"):
        e([[0]])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("index", [-1, 11, 10, 2**40])
def test_out_of_bounds(layer: Any, index: int) -> None:
    """An id outside the table is one error in forward and backward, with or without weights."""
    e = layer(10, 2)
    ids = np.array([[1, 2, 3], [4, index, 6]])
    with pytest.raises(IdError, match=str(index)):
        e(ids)
    grad = np.ones((2, 3, 2) if layer is Embedding else (2, 2), np.float32)
    with pytest.raises(IdError, match=str(index)):
        e.backward(ids, grad)
    with pytest.raises(IdError, match=str(index)):
        EmbeddingBag(10, 2, mode="sum")(ids, None, np.ones((2, 3), np.float32))


def test_dimensions() -> None:
    """Batches, offsets and weights of other ranks are refused."""
    five = np.zeros((1,) * 5, np.int64)
    with pytest.raises(ArgumentError, match="5 dimensions"):
        EmbeddingBag(4, 2)(five)
    with pytest.raises(ArgumentError, match="offsets have 5 dimensions"):
        EmbeddingBag(4, 2)([0], five)
    for function in (functional.embedding, functional.embedding_bag):
        with pytest.raises(ArgumentError, match=r"allowed: \(rows, dim\)"):
            function([[0]], np.ones((2, 2, 2), np.float32))


@pytest.mark.parametrize("layer", LAYERS)
def test_device_and_dtype(layer: Any) -> None:
    """float32 on the CPU is what there is; numpy's and torch's names for it are taken."""
    torch = pytest.importorskip("torch")
    for dtype in (None, "float32", np.float32, np.dtype("f4"), torch.float32):
        layer(2, 2, device="cpu", dtype=dtype)
    layer(2, 2, device=torch.device("cpu"))
    for dtype in ("float64", np.float16, torch.bfloat16, int):
        with pytest.raises(ArgumentError, match="allowed: float32"):
            layer(2, 2, dtype=dtype)
    with pytest.raises(ArgumentError, match="device = cuda"):
        layer(2, 2, device="cuda")


@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict(layer: Any) -> None:
    """The state is the weight; loading copies it in place, the padding row included."""
    source, target = layer(4, 2, seed=1), layer(4, 2, padding_idx=0, seed=2)
    assert list(source.state_dict()) == ["weight"]
    target.load_state_dict(source.state_dict())
    assert np.array_equal(target.weight, source.weight)
    before = target.weight.copy()
    for bad in ({}, {"weight": before, "bias": before}, {"weight": before[:3]}):
        with pytest.raises(ArgumentError):
            target.load_state_dict(bad)
    assert np.array_equal(target.weight, before)


@pytest.mark.parametrize("layer", LAYERS)
def test_reset_parameters(layer: Any) -> None:
    """Everything is drawn anew, the padding row is zero again, the seed names the draw."""
    e = layer(6, 2, padding_idx=1, seed=1)
    first = e.weight.copy()
    e.reset_parameters(seed=2)
    assert not (e.weight == first).all(axis=1)[[0, 2, 3, 4, 5]].any()
    assert not e.weight[1].any()
    e.reset_parameters(seed=1)
    assert np.array_equal(e.weight, first)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies(layer: Any, clone: Any) -> None:
    """A copy of a layer in memory has its own rows and all settings."""
    e = layer(6, 2, padding_idx=1, max_norm=3.0, seed=1)
    twin = clone(e)
    assert repr(twin) == repr(e)
    assert np.array_equal(twin.weight, e.weight)
    twin.reset_parameters(seed=9)
    assert not np.array_equal(twin.weight, e.weight)


def test_copies_of_a_table_on_disk(path: Path) -> None:
    """A pickle of a layer over a file is small and opens the file again; one writer stays."""
    Table.create(path, 1000, 8).close()
    e = Embedding.from_pretrained(path)
    text = pickle.dumps(e)
    assert len(text) < 1000
    twin = pickle.loads(text)
    assert twin.table.path == path
    assert np.array_equal(twin([7]), e([7]))
    e.table.close()
    twin.table.close()
    with Table.open(path) as table, copy.deepcopy(table) as reader:
        assert table.writable and not reader.writable


def test_ids_beyond_two_billion(tmp_path: Path) -> None:
    """Rows past 2^31, and bytes past 2^33, are where they should be (a sparse file of 12 GB)."""
    file, rows = tmp_path / "large.npy", 3 * 2**30
    with file.open("wb") as f:
        f.write(npy.rows_header(rows, 1))
        f.truncate(npy.HEADER_BYTES + 4 * rows)
    if file.stat().st_blocks * 512 > 2**30:
        pytest.skip("the file system has no sparse files")
    with Table.open(file, "c") as t:  # a writer would fill the holes
        ids = np.array([rows - 1, 2**31, 2**31 - 1, 0, rows - 1])
        t.scatter_add(ids, np.arange(1, 6, dtype=np.float32)[:, None], deterministic=True)
        assert t.gather(ids).ravel().tolist() == [6, 2, 3, 4, 6]
        assert Embedding.from_pretrained(t)([[2**31]]).tolist() == [[[2]]]
        with pytest.raises(IdError):
            t.gather([rows])
