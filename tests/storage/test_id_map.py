"""Rows in the order of frequency: counts, the id map, and rows that stay in memory."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pyembed import Table, build, init, optim
from pyembed.cli import main
from pyembed.errors import ArgumentError, ClosedError, DTypeError, FormatError, IdError
from pyembed.storage import fs, id_map
from tests.helpers import child
from tests.helpers.file_systems import Faults
from tests.strategies import bad_ids

COUNTS = [3, 9, 0, 3, 1]
ID_MAP = [1, 0, 4, 2, 3]
INTEGERS = ["u1", "i2", ">i4", "u4", "i8", ">i8", "u8"]


@pytest.fixture
def ordered(path: Path) -> Path:
    """A committed table of 5 rows in the order of COUNTS; row r holds r."""
    build.from_initializer(path, 5, 2, counts=COUNTS)
    with Table.open(path) as t, t.writing(range(5)) as weight:
        weight[:] = np.arange(5)[:, None]
    return path


# --- counts -----------------------------------------------------------------------------------


@given(
    hnp.arrays(np.int64, st.integers(0, 200), elements=st.integers(0, 9) | st.integers(0, 2**62))
)
def test_by_frequency(counts: NDArray[np.int64]) -> None:
    """Each row once, counts descend along the rows, and equal counts keep the order of the ids."""
    rows = id_map.by_frequency(counts)
    assert rows.dtype == np.int64
    assert sorted(rows) == list(range(len(counts)))
    id_of_row = np.argsort(rows)
    along = [(-int(counts[i]), int(i)) for i in id_of_row]
    assert along == sorted(along)


@pytest.mark.parametrize(
    ("counts", "rows", "error", "message"),
    [
        ([1, -2, 3], None, ArgumentError, r"counts\[1\] = -2 is outside 0\.\.9223372036854775807"),
        (np.array([1, 2**63], "u8"), None, ArgumentError, r"counts\[1\] = 9223372036854775808 is"),
        ([1.0, 2.0], None, DTypeError, r"counts is float64; allowed: integers"),
        (np.zeros(0), None, DTypeError, r"counts is float64"),
        ([True], None, DTypeError, r"counts is bool"),
        ([[1, 2]], None, ArgumentError, r"shape \(1, 2\); allowed: \(rows,\)"),
        ([1, 2], 3, ArgumentError, r"counts has 2 elements; allowed: 3, one for each row"),
        ([], 1, ArgumentError, r"counts has 0 elements; allowed: 1"),
    ],
)
def test_bad_counts(counts: object, rows: int | None, error: type[Exception], message: str) -> None:
    """Counts that are not one count for each id are refused; the error names the element."""
    with pytest.raises(error, match=message):
        id_map.by_frequency(counts, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_counts_from_files(tmp_path: Path, dtype: str) -> None:
    """An .npy of any integer dtype, and a text with any line ends, give the numbers in them."""
    np.save(tmp_path / "counts.npy", np.array(COUNTS, dtype))
    (tmp_path / "counts.txt").write_bytes(b"3\n9\r\n0\n 3\n1")
    for name in ("counts.npy", "counts.txt"):
        counts = id_map.read_counts(tmp_path / name)
        assert counts.dtype == np.int64
        assert counts.tolist() == COUNTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3\n-1\n", r"line 2 is '-1'; allowed: one integer in 0\.\."),
        (b"3\n\n1\n", r"line 2 is ''"),
        (b"3\n1.5\n", r"line 2 is '1\.5'"),
        (b"9223372036854775808\n", r"line 1 is"),
        (b"1 2\n", r"line 1 is '1 2'"),
        (b"\x00" * 1000, r"line 1 is"),
        (b"", r"holds no counts"),
        (np.zeros(0, "i8"), r"holds no counts"),
        (np.zeros(3), r"float64 of shape \(3,\); allowed: an array of integers"),
        (np.zeros((2, 2), "i8"), r"shape \(2, 2\); allowed: one dimension"),
        (np.array([5, 5, -7]), r"counts\[2\] = -7 is outside"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", r"not an \.npy file"),
    ],
)
def test_bad_counts_files(tmp_path: Path, content: bytes | NDArray[np.int64], message: str) -> None:
    """A file that does not hold counts is a FormatError that names the line or element."""
    file = tmp_path / "counts"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        with file.open("wb") as opened:
            np.save(opened, content)
    with pytest.raises(FormatError, match=r"counts.*" + message):
        id_map.read_counts(file)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("rows", [3, 100])
def test_count_ids(tmp_path: Path, dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of any integer dtype and shape, in pieces of any length, are counted as if at once."""
    monkeypatch.setattr(id_map, "CHUNK_IDS", 7)
    ids = np.random.default_rng(0).integers(0, rows, (9, 13)).astype(dtype)
    for name, array in (("c", ids), ("f", np.asfortranarray(ids)), ("scalar", ids[0, 0])):
        np.save(tmp_path / f"{name}.npy", array)
        expected = np.bincount(np.asarray(array, np.int64).ravel(), minlength=rows)
        assert id_map.count_ids(tmp_path / f"{name}.npy", rows).tolist() == expected.tolist()


def test_count_ids_in_fixed_memory(tmp_path: Path) -> None:
    """A stream of 64 MB of ids is counted in less than 20 MB."""
    np.lib.format.open_memmap(tmp_path / "ids.npy", "w+", np.int64, (8 << 20,))
    tracemalloc.start()
    try:
        counts = id_map.count_ids(tmp_path / "ids.npy", 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts[0] == counts.sum() == 8 << 20
    assert peak < 20_000_000


@pytest.mark.parametrize("bad", [-1, 10, 2**63 - 1, -(2**63)])
def test_count_ids_outside(tmp_path: Path, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first id without a row is named with its place in the whole stream."""
    monkeypatch.setattr(id_map, "CHUNK_IDS", 7)
    ids = np.zeros(50, np.int64)
    ids[[31, 32]] = bad
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(IdError, match=rf"ids\[31\] = {bad} is outside 0\.\.9$"):
        id_map.count_ids(tmp_path / "ids.npy", 10)


def test_bad_id_streams(tmp_path: Path) -> None:
    """Floats, pickles, nothing and half a file are no ids; nothing is unpickled."""
    file = tmp_path / "ids.npy"
    for array in (np.zeros(3), np.array([None, "x"], object), np.zeros(0, np.int64)):
        np.save(file, array, allow_pickle=True)
        with pytest.raises(FormatError, match=r"ids\.npy.*(array of integers|no ids)"):
            id_map.count_ids(file, 5)
    np.save(file, np.arange(5))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut short"):
        id_map.count_ids(file, 5)
    file.write_text("0\n1\n")
    with pytest.raises(FormatError, match=r"not an \.npy file"):
        id_map.count_ids(file, 5)


# --- the map of a table -----------------------------------------------------------------------


def test_id_map(ordered: Path) -> None:
    """The map is a .npy file in the table's folder, and the table shows it read-only."""
    assert np.load(ordered / "id_map.npy").tolist() == ID_MAP
    for mode in ("r+", "r", "c"):
        with Table.open(ordered, mode) as t:
            assert t.id_map is not None
            assert t.id_map.tolist() == ID_MAP
            assert not t.id_map.flags.writeable
    with pytest.raises(ClosedError):
        _ = t.id_map


def test_rows_are_those_without_an_order(tmp_path: Path) -> None:
    """Values belong to rows: the order changes the map and nothing else."""
    recipe = init.normal()
    build.from_initializer(tmp_path / "a", 5, 3, recipe, seed=3, optimizer="adam", counts=COUNTS)
    build.from_initializer(tmp_path / "b", 5, 3, recipe, seed=3, optimizer="adam")
    for name in ("rows.npy", "seal.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "b" / "id_map.npy").exists()


@pytest.mark.parametrize("dtype", ["i4", "i8", "u2"])
def test_rows_of(ordered: Path, dtype: str) -> None:
    """Ids of any shape and dtype become their rows."""
    with Table.open(ordered, "r") as t:
        for ids in (np.array(3, dtype), np.array([[0, 1], [4, 0]], dtype), np.zeros((0, 2), dtype)):
            rows = t.rows_of(ids)
            assert rows.dtype == np.int64
            assert rows.shape == ids.shape
            assert np.array_equal(rows, np.array(ID_MAP)[ids])
            assert np.array_equal(t.gather(rows)[..., 0], rows)
        assert t.rows_of([2, 1]).tolist() == [4, 0]


@pytest.mark.parametrize("dtype", ["i4", "i8"])
def test_rows_of_without_a_map(table: Path, dtype: str) -> None:
    """Where ids are rows, in a file or in memory, they come back without a copy."""
    ids = np.array([3, 0, 3], dtype)
    with Table.open(table, "r") as t, Table.memory(4, 2) as memory:
        for each in (t, memory):
            assert each.id_map is None
            assert each.rows_of(ids) is ids


@given(bad=bad_ids(5))
def test_rows_of_bad_ids(tmp_path_factory: pytest.TempPathFactory, bad: int) -> None:
    """An id that the table has not is named, with and without a map."""
    path = tmp_path_factory.mktemp("bad") / "t"
    build.from_initializer(path, 5, 2, counts=COUNTS)
    with Table.open(path, "r") as t, Table.memory(5, 2) as memory:
        for each in (t, memory):
            with pytest.raises(IdError, match=rf"ids\[1, 0\] = {bad} is outside 0\.\.4"):
                each.rows_of([[4], [bad]])


def test_table_of_no_rows(path: Path) -> None:
    """An empty table has an empty map."""
    build.from_initializer(path, 0, 2, counts=[])
    with Table.open(path) as t:
        assert t.id_map is not None
        assert t.rows_of([]).shape == t.id_map.shape == (0,)
        assert t.lock_hot(0) == 0


def test_append_is_refused(ordered: Path) -> None:
    """Rows at the end would have no id, so append says what to do instead."""
    with Table.open(ordered) as t:
        with pytest.raises(ArgumentError, match="id map.*a count of 0"):
            t.append(1)
        assert (t.rows, t.state) == (5, "clean")


@pytest.mark.parametrize(
    "other", [np.arange(4), np.arange(6), np.arange(5, dtype=np.int32), np.zeros((5, 1), np.int64)]
)
def test_map_of_another_table(ordered: Path, other: NDArray[np.int64]) -> None:
    """A map that does not fit the rows is refused, and so is one that was cut short."""
    whole = (ordered / "id_map.npy").read_bytes()
    np.save(ordered / "id_map.npy", other)
    with pytest.raises(FormatError, match=r"id_map\.npy.*allowed: int64 of shape \(5,\)"):
        Table.open(ordered)
    (ordered / "id_map.npy").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"id_map\.npy.*cut short"):
        Table.open(ordered)
    (ordered / "id_map.npy").write_bytes(whole)
    Table.open(ordered).close()


def test_interrupted_build_leaves_nothing(path: Path) -> None:
    """Whichever sync fails before the table appears, the id map's included, nothing is left."""
    survived = 0
    for fail_at in range(20):
        system = Faults()
        system.fail("sync", after=fail_at)
        try:
            with fs.using(system):
                build.from_initializer(path, 5, 2, counts=COUNTS)
            survived = fail_at
            break
        except OSError:
            if path.exists():  # the last sync makes the name durable; the table is whole
                break
            assert list(path.parent.iterdir()) == []
    assert survived or fail_at >= 4  # rows, map, manifest and its folder came before
    with Table.open(path) as t:
        assert t.rows_of(range(5)).tolist() == ID_MAP


# --- rows that stay in memory -----------------------------------------------------------------


def locked_kib() -> int:
    """Memory that this process has locked."""
    return int(re.findall(r"VmLck:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def resident(t: Table) -> NDArray[np.bool_]:
    """For each row of 4096 bytes whether its page is in memory."""
    flags = (ctypes.c_ubyte * t.rows)()
    address = ctypes.c_void_p(t.weight.ctypes.data)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(4096 * t.rows), flags) == 0
    return (np.frombuffer(bytes(flags), np.uint8) & 1).astype(bool)


def test_lock_hot(path: Path) -> None:
    """Exactly the pages of the first rows are locked, until another call or the end."""
    before = locked_kib()
    Table.create(path, 64, 1024).close()
    t, memory = Table.open(path, "r"), Table.memory(64, 1024)
    for each in (t, memory):
        weight = each.weight  # keeps the mapping alive past close
        for n in (8, 3, 0, 5):
            assert each.lock_hot(n) == n
            assert locked_kib() == before + 4 * n
        each.close()
        assert weight.any() == locked_kib() - before == 0
    with pytest.raises(ClosedError):
        t.lock_hot(1)
    with pytest.raises(ArgumentError, match=r"n = 65; allowed: 0\.\.64"), Table.open(path) as t:
        t.lock_hot(65)


def test_lock_hot_counts_all_columns() -> None:
    """Optimizer state is locked too, whether it is in the row or in memory of its own."""
    before = locked_kib()
    t = Table.memory(64, 1024, optimizer="adam")
    assert t.lock_hot(2) == 2
    assert locked_kib() == before + 24
    t.close()
    t = Table.memory(64, 1024)
    optim.Adagrad(t).step([0], np.ones((1, 1024), np.float32))
    assert t.lock_hot(2) == 2
    assert locked_kib() == before + 16
    t.close()
    assert locked_kib() == before


def test_lock_hot_reads_rows(path: Path) -> None:
    """Rows that nobody used are in memory afterwards."""
    Table.create(path, 200, 1024).close()
    with Table.open(path) as t, (path / "rows.npy").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(t)[1:].any():
            pytest.skip("the file system keeps pages in memory")
        assert t.lock_hot(12) == 12
        assert resident(t)[:12].all()


def print_locked_rows(path: Path, where: str, limit: int, grows: bool) -> None:
    """Lock rows, of a table on disk or in memory, under a limit; print counts and warnings.

    With `grows`, the table is in memory and gets a second column, in a separate allocation.
    """
    t = Table.open(path, "r")
    if where == "memory" or grows:
        t = Table.memory(t.rows, t.dim, columns=dict(list(t.columns.items())[1:]))
    if grows:
        t.store.ensure_columns({"sum": t.dim})
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)  # root may lock without limit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = [t.lock_hot(500)]
        status = Path("/proc/self/status").read_text().split()
        counts.append(t.lock_hot(min(1, limit)))
    assert all(w.category is RuntimeWarning for w in caught)
    kib = int(status[status.index("VmLck:") + 1])
    print(json.dumps([counts, kib, [str(w.message) for w in caught]]))


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize(
    ("limit", "dim", "optimizer", "grows", "expected"),
    [
        (65536, 1024, None, False, 16),
        (65536, 128, None, False, 128),
        (65536, 100, None, False, 163),  # row 163 spans two pages
        (65536, 100, "adam", False, 54),
        (65536, 1024, "sgd", True, 8),
        (0, 1024, None, False, 0),
    ],
)
def test_lock_hot_beyond_the_limit(
    path: Path,
    where: str,
    limit: int,
    dim: int,
    optimizer: str | None,
    grows: bool,
    expected: int,
) -> None:
    """As many rows as the process may lock are locked, and a warning says which limit to raise."""
    Table.create(path, 500, dim, optimizer).close()
    run = child.run(print_locked_rows, path, where, limit, grows)
    counts, kib, messages = json.loads(run.stdout)
    assert (counts, 1024 * kib) == ([expected, min(1, limit)], limit)
    (message,) = messages
    assert f"{expected} of 500 rows are locked" in message
    assert f"a limit of {limit:,} bytes" in message
    assert "ulimit -l" in message


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["--counts npy", "--counts text", "--ids"])
def test_build_command(path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """build --order frequency makes a table with an id map, and info says so."""
    source = path.with_name("source")
    with source.open("wb") as file:
        if kind == "--counts npy":
            np.save(file, COUNTS)
        elif kind == "--counts text":
            file.write("".join(f"{count}\n" for count in COUNTS).encode())
        else:
            np.save(file, np.repeat(np.arange(5), COUNTS)[::-1])
    command = ["build", "-q", "-o", str(path), "--rows", "5", "--dim", "2", "--order", "frequency"]
    assert main([*command, kind.split()[0], str(source)]) == 0
    capsys.readouterr()
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id_map"] is True
    with Table.open(path, "r") as t:
        assert t.rows_of(range(5)).tolist() == ID_MAP


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--order", "frequency"], 2, "needs --counts or --ids"),
        (["--counts", "counts.txt"], 2, "and they need it"),
        (["--order", "frequency", "--counts", "counts.txt", "--ids", "x"], 2, "exclude each other"),
        (["--order", "size", "--counts", "counts.txt"], 2, "frequency"),
        (["--order", "frequency", "--counts", "counts.txt"], 2, "counts has 5 elements"),
        (["--order", "frequency", "--counts", "missing"], 1, "missing"),
        (["--order", "frequency", "--ids", "counts.txt"], 1, "not an .npy file"),
    ],
)
def test_build_command_errors(
    options: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong orders end with one message, before any table is begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counts.txt").write_text("3\n9\n0\n3\n1\n")
    (tmp_path / "v.txt").write_text("a 1 2\nb 3 4\n")
    try:
        got = main(["build", "-o", "t", "--rows", "6", "--dim", "2", *options])
    except SystemExit as error:  # argparse's own
        got = int(error.code or 0)
    assert got == status
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["build", "v.txt", "-o", "t", "--order", "frequency", "--counts", "counts.txt"])
    assert "keeps its own order" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["counts.txt", "v.txt"]
