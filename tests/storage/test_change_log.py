"""The log of changes: what it says may differ is a superset of what does, or it says nothing."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Table, _core
from pyembed.errors import ArgumentError
from pyembed.storage import change_log, fs
from pyembed.storage.change_log import ChangedRows
from pyembed.storage.fs import Folder
from pyembed.storage.manifest import Manifest
from tests.helpers import child
from tests.helpers.file_systems import Faults, Unsynced

ROWS = 40


@pytest.fixture(autouse=True)
def unsynced() -> Iterator[None]:
    """Make thousands of commits in seconds: power cuts are tested elsewhere."""
    with fs.using(Unsynced()):
        yield


def change(t: Table, rows: list[int]) -> None:
    with t.writing(rows) as weight:
        weight[rows] += 1


def since(path: Path, generation: int) -> list[int] | None:
    """Rows that may differ; None if it is not known."""
    with Table.open(path, "r") as t:
        try:
            with Folder(path) as folder:
                found = ChangedRows(folder, t.committed, generation)
                return [int(row) for rows in found.rows() for row in rows]
        except ArgumentError:
            return None


def history(path: Path, steps: list[list[int]]) -> list[np.ndarray]:
    """The weight at each generation of a table in which these rows changed; row 99 appends."""
    Table.create(path, ROWS, 1).close()
    with Table.open(path) as t:
        found = [t.weight.copy()]
        for rows in steps:
            if 99 in rows:
                t.append(3)
            change(t, [row for row in rows if row < ROWS])
            t.commit(meta={"step": len(found)})
            found.append(t.weight.copy())
    return found


def differ(old: np.ndarray, new: np.ndarray) -> list[int]:
    same = (old == new[: len(old)]).all(axis=1)
    return [*np.flatnonzero(~same).tolist(), *range(len(old), len(new))]


STEPS = st.lists(st.lists(st.sampled_from([0, 1, 7, 8, 9, 39, 99]), max_size=3), max_size=24)


@given(steps=STEPS, most=st.integers(5, 12), exact=st.integers(1, 4))
def test_since_every_generation(steps: list[list[int]], most: int, exact: int) -> None:
    """Of every commit it is known what changed since: exactly for the last ones; for older ones,
    whose records were merged, with rows too many at most."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(change_log, "MOST", most)
        patch.setattr(change_log, "EXACT", exact)
        path = Path(name) / "t"
        weights = history(path, steps)
        for generation, old in enumerate(weights):
            found, truth = since(path, generation), differ(old, weights[-1])
            assert found is not None
            assert found == sorted(set(found))
            assert set(truth) <= set(found)
            if generation >= len(steps) - exact:
                assert found == truth
        assert since(path, len(steps) + 1) is None


def test_the_log_stays_small(path: Path) -> None:
    """Hundreds of commits leave no more than 64 records; of the last 16 they are exact, of an older
    one they name at most the rows of twice as many."""
    with Table.create(path, 2000, 1) as t:
        for step in range(400):
            change(t, [step])
            t.commit()
    with Folder(path) as folder, folder.open("changes") as file:
        records = change_log._read(file)
    assert len(records) <= change_log.MOST
    assert [record.commits[0][0] for record in records[-16:]] == list(range(384, 400))
    for generation in (0, 1, 200, 384, 399, 400):
        found = since(path, generation)
        assert found is not None
        assert set(found) >= set(range(generation, 400))
        assert generation < 384 or found == list(range(generation, 400))
        assert len(found) <= max(16, 2 * (400 - generation))


def test_old_commits_are_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes older than the limit of commits are unknown, and take no space."""
    monkeypatch.setattr(change_log, "KEPT", 100)
    with Table.create(path, 4, 1) as t:
        for _ in range(400):
            t.commit(meta={})
    assert since(path, 0) is None
    assert since(path, 399 - 100) == []


@given(rows=st.lists(st.integers(0, 2**28 - 1), max_size=50).map(lambda r: sorted(set(r))))
def test_any_rows(rows: list[int]) -> None:
    """Rows of any ranges come back; dense ones are a bitmap, at most one bit a row."""
    for numbers in (np.array(rows, np.int64), np.arange(9, 30_009)):
        bits: dict[int, dict[int, int]] = {}
        for row in numbers.tolist():
            part = bits.setdefault(row >> 24, {})
            part[row % 2**24 >> 3] = part.get(row % 2**24 >> 3, 0) | 1 << row % 8
        parts = [
            (number, np.array(list(part), np.uint32), np.array(list(part.values()), np.uint8))
            for number, part in sorted(bits.items())
        ]
        with tempfile.TemporaryDirectory() as name:
            folder = Folder(Path(name))
            data = list(change_log.encode(parts, 2**28, [(3, 1), (4, 2)]))
            folder.replace("changes", data)
            assert sum(map(len, data)) < 37 * (1 + len(parts)) + 32 + min(6 * len(numbers), 4_000)
            state = Manifest(2**28, {"weight": 1}, generation=4, commit=f"{2:016x}")
            parts_found = ChangedRows(folder, state, 3).rows()
            found = [row for part in parts_found for row in part.tolist()]
            folder.close()
            assert found == numbers.tolist()


# --- what is not known --------------------------------------------------------------------------


def answers(path: Path, weights: list[np.ndarray]) -> Iterator[bool]:
    """For each generation: was there an answer? It must not be wrong."""
    for generation, old in enumerate(weights):
        found = since(path, generation)
        if found is not None:
            assert set(differ(old, weights[-1])) <= set(found)
        yield found is not None


def test_every_damaged_byte(path: Path) -> None:
    """Whichever byte of the log is another, or where it is cut, no answer is wrong."""
    weights = history(path, [[1], [99], []])
    log = path / "changes"
    data = log.read_bytes()
    assert all(answers(path, weights))
    for at in range(len(data)):
        for flip in (0x01, 0xFF):
            log.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            known = list(answers(path, weights))
            assert known[-1]  # since the last commit nothing changed
            assert not all(known)
        log.write_bytes(data[:at])
        assert not any(list(answers(path, weights))[:-1])
    log.unlink()
    assert not any(list(answers(path, weights))[:-1])


def test_the_check_of_damage_can_fail(path: Path) -> None:
    """A record that leaves out a row, with right checksums, makes an answer wrong."""
    weights = history(path, [[1], [2]])
    log = path / "changes"
    data = log.read_bytes()
    first, second = data[: len(data) // 2], data[len(data) // 2 :]
    ends = [(int(g), int(c)) for g, c in np.frombuffer(first[-32:], "<u8").reshape(2, 2)]
    no_row = (0, np.zeros(1, np.uint32), np.zeros(1, np.uint8))
    log.write_bytes(b"".join(change_log.encode([no_row], ROWS, ends)) + second)
    with pytest.raises(AssertionError):
        list(answers(path, weights))


@pytest.mark.parametrize(
    "entry",
    [
        change_log._entry(b"ROWS", 1, b"\xff\xff\xff\x00\x01"),
        change_log._entry(b"ROWS", 1, b"\x00\x00\x00\x00\x01", number=2**40),
        change_log._entry(b"BITS", 2**21 + 1, bytes(2**21 + 1)),
        change_log._entry(b"ROWS", 0, b""),
        change_log._entry(b"DONE", 0, b""),
        change_log._entry(b"MORE", 1, b"12345"),
    ],
)
def test_right_sums_of_odd_content(tmp_path: Path, entry: bytes) -> None:
    """A part whose sums are right and whose content makes no sense is refused."""
    done = _end(entry[: change_log.UNIT])
    (tmp_path / "changes").write_bytes(entry + done)
    state = Manifest(ROWS, {"weight": 1}, generation=4, commit=f"{2:016x}")
    with pytest.raises(ArgumentError, match="export the whole table"):
        list(ChangedRows(Folder(tmp_path), state, 3).rows())


def _end(headers: bytes) -> bytes:
    ends = np.array([(3, 1), (4, 2)], "<u8").tobytes()
    return change_log._entry(b"DONE", 2, ends, 0, ROWS, _core.crc32c(headers))


def die_before_the_manifest(path: Path) -> None:
    """Change a row, and die in the commit where the manifest would get its name."""
    with fs.using(Faults()) as system:
        assert isinstance(system, Faults)
        t = Table.open(path)
        change(t, [5])
        system.fail("rename", when=lambda *_: child.die())
        t.commit()


def test_a_record_of_no_commit(path: Path) -> None:
    """The record of a writer that died before its manifest is ignored and overwritten."""
    history(path, [[1]])
    size = (path / "changes").stat().st_size
    child.run(die_before_the_manifest, path, status=-signal.SIGKILL)
    assert (path / "changes").stat().st_size > size
    assert since(path, 0) == [1]
    Table.open(path).close()
    assert since(path, 0) == [1]
    with Table.open(path) as t:
        change(t, [2])
    assert since(path, 0) == [1, 2]
    assert since(path, 1) == [2]


def test_rolled_back_changes_are_not_logged(path: Path) -> None:
    """Rows that a rollback brought back are not among those that changed."""
    history(path, [[1]])
    with Table.open(path) as t:
        change(t, [2, 3])
        t.append(2)
        t.rollback()
        change(t, [4])
    assert since(path, 0) == [1, 4]


@pytest.mark.parametrize("how", ["none", "salvage"])
def test_a_gap(path: Path, how: str) -> None:
    """Without a journal, or after a salvage, nobody knows what changed; from then on it is known
    again."""
    history(path, [[1]])
    if how == "none":
        with Table.open(path, durability="none") as t:
            change(t, [2])
    else:
        child.run(die_before_the_manifest, path, status=-signal.SIGKILL)
        Table.open(path, salvage=True).close()
    assert (since(path, 0), since(path, 1), since(path, 2)) == (None, None, [])
    with Table.open(path, durability="process") as t:
        change(t, [3])
    assert (since(path, 1), since(path, 2)) == (None, [3])


def test_a_log_that_cannot_be_written(path: Path) -> None:
    """It fails no commit; the changes of then are unknown, and later ones are known."""
    history(path, [[1]])
    system = Faults()
    with fs.using(system), Table.open(path) as t:
        change(t, [2])
        system.fail("open", error=28, when=lambda file, *_: file.name == "changes")
        t.commit()
        system.work()
        change(t, [3])
        t.commit()
    assert t.generation == 3
    assert (since(path, 0), since(path, 1), since(path, 2)) == (None, None, [3])
