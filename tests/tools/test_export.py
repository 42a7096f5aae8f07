"""Copies, and deltas that bring a copy forward: the same bits, or refused before a row changes."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Table, Vocab, build, init, optim
from pyembed.cli import main
from pyembed.errors import ArgumentError, FormatError, LockedError, TableError
from pyembed.storage import fs
from pyembed.tools.export import apply, export
from pyembed.tools.verify import verify
from tests.helpers.file_systems import Faults, Unsynced


@pytest.fixture
def source(path: Path) -> Path:
    """A table of 50 rows with Adagrad state, at generation 2."""
    Table.create(path, 50, 3, "adagrad", init=init.normal()).close()
    train(path, [1, 2])
    train(path, [3])
    return path


def train(path: Path, rows: list[int], append: int = 0) -> None:
    """One step and a commit."""
    with Table.open(path) as t:
        if append:
            t.append(append)
        optim.Adagrad(t).step(rows, np.ones((len(rows), 3), np.float32))
        t.commit(meta={"rows": rows})


def same(a: Path, b: Path) -> bool:
    """Bit for bit the same commit."""
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (a, b))
    for text in (one, two):
        del text["crc32c"], text["seal"]
    rows = [(folder / "rows.npy").read_bytes() for folder in (a, b)]
    return bool(one == two and rows[0] == rows[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- whole copies -------------------------------------------------------------------------------


def test_a_copy(source: Path, tmp_path: Path) -> None:
    """A copy has a whole commit, checksums and the other files; from a path or an open table."""
    Vocab([f"t{i}" for i in range(50)]).save(source)
    export(source, tmp_path / "a")
    with Table.open(source) as t:
        export(t, tmp_path / "b")
    for copy in (tmp_path / "a", tmp_path / "b"):
        assert same(source, copy)
        assert verify(copy).checked_blocks == 1
        assert list(Vocab.load(copy)) == list(Vocab.load(source))
        with Table.open(copy) as t:
            assert optim.Adagrad(t).steps == 2


def test_a_copy_of_a_table_with_an_id_map(path: Path, tmp_path: Path) -> None:
    """The map goes along, and a delta fits the copy."""
    build.from_initializer(path, 9, 3, init.normal(), optimizer="adagrad", counts=np.arange(9))
    export(path, tmp_path / "copy")
    train(path, [4])
    export(path, tmp_path / "delta", since=0)
    assert apply(tmp_path / "delta", tmp_path / "copy")
    assert same(path, tmp_path / "copy")
    with Table.open(path, "r") as a, Table.open(tmp_path / "copy", "r") as b:
        assert a.id_map is not None and b.id_map is not None
        assert np.array_equal(a.id_map, b.id_map)


def test_damage_is_not_sealed_anew(path: Path, tmp_path: Path) -> None:
    """A sealed table with a row that rotted is not copied as if it were sound."""
    Table.create(path, 4, 2).close()
    with (path / "rows.npy").open("r+b") as file:
        file.seek(4096)
        file.write(b"x")
    with pytest.raises(FormatError, match=r"damaged, in which are rows 0\.\.3"):
        export(path, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("since", [None, 1])
def test_what_cannot_be_exported(source: Path, tmp_path: Path, since: int | None) -> None:
    """Changes without a commit, a table in memory, a bare array, a name that is taken, a table that
    another has open: refused, and nothing appears."""
    new = tmp_path / "new"
    with Table.open(source) as t:
        t.scatter_add([0], np.ones((1, 3), np.float32))
        with pytest.raises(ArgumentError, match="commit them"):
            export(t, new, since=since)
        t.rollback()
        with pytest.raises(LockedError):
            export(source, new, since=since)
    with pytest.raises(ArgumentError, match="in memory"):
        export(Table.memory(3, 2), new, since=since)
    np.save(tmp_path / "bare.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(ArgumentError, match="convert"):
        export(tmp_path / "bare.npy", new, since=since)
    with pytest.raises(FileExistsError):
        export(source, source, since=since)
    assert {file.name for file in tmp_path.iterdir()} == {source.name, "bare.npy"}


# --- deltas -------------------------------------------------------------------------------------


def test_a_delta(source: Path, tmp_path: Path) -> None:
    """Rows that changed, and those that are new, come across; with state, meta and steps."""
    export(source, tmp_path / "copy")
    train(source, [7, 7, 20], append=4)
    train(source, [7, 52])
    export(source, tmp_path / "delta", since=2)
    rows = np.load(tmp_path / "delta" / "rows.npy")
    with Table.open(source, "r") as t:
        expected = np.concatenate([t.weight, t.column("sum")], axis=1)[[7, 20, 50, 51, 52, 53]]
    assert np.array_equal(rows, expected)
    assert apply(tmp_path / "delta", tmp_path / "copy")
    assert same(source, tmp_path / "copy")
    before = contents(tmp_path / "copy")
    assert not apply(tmp_path / "delta", tmp_path / "copy")  # it is there already
    assert contents(tmp_path / "copy") == before


def test_deltas_follow_each_other(source: Path, tmp_path: Path) -> None:
    """A copy is brought forward by each delta in turn, by none out of turn, and can be the source
    of deltas itself."""
    for copy in ("a", "b"):
        export(source, tmp_path / copy)
    for generation in (2, 3, 4):
        train(source, [generation])
        export(source, tmp_path / f"d{generation}", since=generation)
    with pytest.raises(TableError, match="generation 2; .* leads from generation 3 to 4: apply"):
        apply(tmp_path / "d3", tmp_path / "a")
    for generation in (2, 3, 4):
        assert apply(tmp_path / f"d{generation}", tmp_path / "a")
    assert same(source, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "all", since=2)
    assert apply(tmp_path / "all", tmp_path / "b")
    assert same(source, tmp_path / "b")
    with pytest.raises(ArgumentError, match=r"since generation 1 is not known; allowed: 2\.\.5"):
        export(tmp_path / "a", tmp_path / "none", since=1)
    export(tmp_path / "a", tmp_path / "nothing", since=5)
    assert not apply(tmp_path / "nothing", tmp_path / "b")


def test_another_table(source: Path, tmp_path: Path) -> None:
    """A table of the same shape and generation, or a copy that was trained by itself, is not taken
    for a copy."""
    export(source, tmp_path / "copy")
    train(source, [1])
    export(source, tmp_path / "delta", since=2)
    export(source, tmp_path / "later")
    train(source, [2])
    export(source, tmp_path / "next", since=3)
    Table.create(tmp_path / "other", 50, 3, "adagrad").close()
    for rows in ([1], [2]):
        train(tmp_path / "other", rows)
    with pytest.raises(TableError, match="generation 2, but of another table"):
        apply(tmp_path / "delta", tmp_path / "other")
    train(tmp_path / "copy", [1])
    with pytest.raises(
        TableError, match="generation 3, but of another table, or it has commits of its own"
    ):
        apply(tmp_path / "next", tmp_path / "copy")
    with Table.open(tmp_path / "later", "r"), pytest.raises(LockedError):
        apply(tmp_path / "next", tmp_path / "later")
    assert apply(tmp_path / "next", tmp_path / "later")


def test_a_damaged_delta(source: Path, tmp_path: Path) -> None:
    """Whichever byte of a delta is another, or is missing, it is refused before a row changes."""
    export(source, tmp_path / "copy")
    train(source, [1, 30], append=1)
    delta = tmp_path / "delta"
    export(source, delta, since=2)
    before = contents(tmp_path / "copy")
    for file in delta.iterdir():
        data = file.read_bytes()
        data_from = 4096 if file.name == "rows.npy" else 0  # of blanks in a header nothing is lost
        for at in range(data_from, len(data), 3):
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
            with pytest.raises(FormatError):
                apply(delta, tmp_path / "copy")
        for size in (0, len(data) // 2, len(data) - 2):
            file.write_bytes(data[:size])
            with pytest.raises(FormatError):
                apply(delta, tmp_path / "copy")
        file.unlink()
        with pytest.raises((FormatError, FileNotFoundError)):
            apply(delta, tmp_path / "copy")
        file.write_bytes(data)
    assert {**contents(tmp_path / "copy"), "changes": b""} == {**before, "changes": b""}
    assert apply(delta, tmp_path / "copy")
    assert same(source, tmp_path / "copy")


def test_parts_of_two_deltas(source: Path, tmp_path: Path) -> None:
    """Whole files of another delta make no delta."""
    export(source, tmp_path / "copy")
    train(source, [1])
    export(source, tmp_path / "a", since=2)
    train(source, [2])
    export(source, tmp_path / "b", since=2)
    for name in ("rows.npy", "seal.npy", "changes", "delta.json"):
        mixed = tmp_path / f"with {name}"
        shutil.copytree(tmp_path / "a", mixed)
        shutil.copyfile(tmp_path / "b" / name, mixed / name)
        with pytest.raises(FormatError):
            apply(mixed, tmp_path / "copy")
    assert apply(tmp_path / "b", tmp_path / "copy")


@pytest.mark.parametrize(
    ("call", "after"), [("pwrite", 0), ("rename", 0), ("sync", 2), ("sync", 3), ("rename", 1)]
)
def test_a_failed_apply(source: Path, tmp_path: Path, call: str, after: int) -> None:
    """An interruption at any call on the copy's files leaves the copy as it was."""
    export(source, tmp_path / "copy")
    shutil.copytree(source, tmp_path / "before")
    train(source, [1], append=3)
    export(source, tmp_path / "delta", since=2)
    system = Faults()
    system.fail(call, after, KeyboardInterrupt())
    with fs.using(system), pytest.raises(KeyboardInterrupt):
        apply(tmp_path / "delta", tmp_path / "copy")
    with Table.open(tmp_path / "copy", "r") as copy:
        assert copy.generation == 2
    Table.open(tmp_path / "copy").close()
    assert same(tmp_path / "before", tmp_path / "copy")
    assert apply(tmp_path / "delta", tmp_path / "copy")


def test_many_pieces(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta is read and written a few rows at a time."""
    monkeypatch.setattr("pyembed.tools.delta.CHUNK_FLOATS", 40)
    Table.create(path, 500, 3, "adagrad", init=init.normal()).close()
    export(path, tmp_path / "copy")
    train(path, list(range(3, 499, 2)), append=100)
    export(path, tmp_path / "delta", since=0)
    assert np.load(tmp_path / "delta" / "rows.npy").shape == (348, 6)
    assert apply(tmp_path / "delta", tmp_path / "copy")
    assert same(path, tmp_path / "copy")


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["step", "step", "commit", "commit", "rollback", "append", "reopen", "export", "apply"]
        ),
        st.lists(st.integers(0, 19), min_size=1, max_size=4),
    ),
    max_size=40,
)


@given(actions=ACTIONS)
def test_a_copy_that_is_brought_forward(actions: list[tuple[str, list[int]]]) -> None:
    """A copy that gets every delta equals the table, bit for bit, after any series of changes."""
    with tempfile.TemporaryDirectory() as name, fs.using(Unsynced()):
        folder = Path(name)
        t = Table.create(folder / "t", 20, 3, "adagrad", init=init.normal())
        export(t, folder / "copy")
        at = 0
        for number, (action, rows) in enumerate([*actions, ("commit", [0]), ("export", [0])]):
            if action == "step":
                optim.Adagrad(t).step(rows, np.full((len(rows), 3), number, np.float32))
            elif action == "append":
                t.append(rows[0])
            elif action == "commit":
                t.commit(meta={"number": number} if rows[0] % 2 else None)
            elif action == "rollback":
                t.rollback()
            elif action == "reopen":
                t.close()
                t = Table.open(folder / "t")
            elif t.state == "clean":
                export(t, folder / f"d{number}", since=at)
                assert apply(folder / f"d{number}", folder / "copy") == (t.generation > at)
                at = t.generation
                assert same(folder / "t", folder / "copy")
        t.close()


# --- the command --------------------------------------------------------------------------------


def test_the_commands(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """export and apply say what they did; what cannot be is refused with a status."""
    copy, delta = str(tmp_path / "copy"), str(tmp_path / "delta")
    assert main(["export", str(source), "-o", copy, "-q"]) == 0
    assert "sealed:            True" in capsys.readouterr().out
    train(source, [5, 6])
    assert main(["export", str(source), "-o", delta, "--since", "2", "-q"]) == 0
    assert "rows:              2\n" in capsys.readouterr().out
    assert main(["apply", delta, copy, "-q"]) == 0
    assert "changed:           True" in capsys.readouterr().out
    assert main(["apply", delta, copy, "-q"]) == 0
    assert "at generation 3 already; nothing was done" in capsys.readouterr().out
    assert main(["export", str(source), "-o", delta + "2", "--since", "9", "-q"]) == 2
    assert "since generation 9 is not known; allowed: 0..3" in capsys.readouterr().err
    train(source, [5])
    assert main(["export", str(source), "-o", delta + "2", "--since", "3", "-q"]) == 0
    train(Path(copy), [5])
    assert main(["apply", delta + "2", copy, "-q"]) == 1
    assert "it has commits of its own" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"delta\.json"):
        apply(source, copy)
