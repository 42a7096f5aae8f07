"""Files that an old release wrote are read, recovered and continued exactly as it would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import pyembed
from pyembed import Table, Vocab
from pyembed.errors import DirtyError
from pyembed.storage import manifest
from pyembed.tools.verify import verify
from tests.golden import make

V1 = Path(__file__).parent / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
RECOVERED = [name for name in EXPECTED if name != "none"]  # all that open without salvage
DIRTY = ("process", "power", "none")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def set_boot(path: Path, boot: str) -> None:
    """Rewrite the boot id in the manifest of a dirty table.

    A table with durability "process" opens only on the machine, and in the boot, in which its
    writer died. Neither is that of the golden files, so a test has to pretend it. The change goes
    through the manifest's encoder, because the manifest has a checksum of itself.
    """
    file = path / "manifest.json"
    state = manifest.decode(file.read_bytes(), str(file))
    file.write_bytes(manifest.encode(state.with_changes(boot=boot)))


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden files, in which the boot of the dirty tables is the current one."""
    folder = tmp_path / "v1"
    shutil.copytree(V1, folder)
    set_boot(folder / "process", BOOT_ID.read_text().strip())
    return folder


def content(path: Path) -> dict[str, bytes]:
    """Every byte of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize("name", RECOVERED)
def test_a_table_opens_to_its_last_commit(golden: Path, name: str, mode: str) -> None:
    """Rows, state, meta and steps are those of the last commit; a reader changes no byte."""
    before = content(golden / name)
    with Table.open(golden / name, mode) as table:
        for attribute in ("rows", "columns", "generation", "durability", "meta", "optimizer"):
            assert getattr(table, attribute) == EXPECTED[name][attribute]
        assert make.digest(table) == EXPECTED[name]["digest"]
    if mode != "r+":
        assert content(golden / name) == before


@pytest.mark.parametrize("name", list(EXPECTED))
def test_training_continues_with_the_same_bits(golden: Path, name: str) -> None:
    """The next steps change rows and optimizer state exactly as the old release would have."""
    with Table.open(golden / name, salvage=name == "none") as table:
        make.train(table, EXPECTED[name]["rule"], 3)
        table.commit()
        generation = table.generation
    with Table.open(golden / name, "r") as table:
        assert make.digest(table) == EXPECTED[name]["continued"]
        assert table.generation == generation


@pytest.mark.parametrize("name", DIRTY)
def test_salvage_opens_the_rows_as_they_are(golden: Path, name: str) -> None:
    """A salvaged table holds the rows of the file, appended rows included."""
    with Table.open(golden / name, "r", salvage=True) as table:
        assert table.rows == EXPECTED[name]["salvaged_rows"]
        assert make.digest(table) == EXPECTED[name]["salvaged"]


def test_a_table_without_a_journal_is_refused(golden: Path) -> None:
    """Changes that were not committed, and that no journal can take back, are an error."""
    with pytest.raises(DirtyError, match="it keeps no journal"):
        Table.open(golden / "none")


def test_a_process_table_is_refused_after_a_reboot(golden: Path) -> None:
    """Durability "process" promises nothing about a machine that went down."""
    set_boot(golden / "process", "another boot")
    with pytest.raises(DirtyError, match="the machine went down"):
        Table.open(golden / "process")


def test_an_old_delta_applies(golden: Path) -> None:
    """A delta leads the copy to the last commit, once."""
    assert pyembed.export.apply(golden / "delta", golden / "copy")
    assert not pyembed.export.apply(golden / "delta", golden / "copy")
    with Table.open(golden / "copy", "r") as copy:
        assert make.digest(copy) == EXPECTED["committed"]["digest"]
        assert copy.meta == EXPECTED["committed"]["meta"]
        assert copy.generation == EXPECTED["committed"]["generation"]


def test_an_old_change_log_is_read(golden: Path) -> None:
    """A delta that is exported today from an old change log applies to an old copy."""
    with Table.open(golden / "committed") as table:
        make.train(table, "adam", 1)
        table.commit()
        expected = make.digest(table)
    new = golden / "new"
    pyembed.export.export(golden / "committed", new, since=make.COPY_GENERATION)
    assert pyembed.export.apply(new, golden / "copy")
    with Table.open(golden / "copy", "r") as copy:
        assert make.digest(copy) == expected


def test_an_old_id_map_is_read(golden: Path) -> None:
    """The map gives each id the row that its frequency earned."""
    expected = pyembed.id_map.by_frequency(make.COUNTS)
    with Table.open(golden / "sealed", "r") as table:
        assert table.id_map is not None
        np.testing.assert_array_equal(table.id_map, expected)
        np.testing.assert_array_equal(table.rows_of([3, 0, 3]), expected[[3, 0, 3]])


@pytest.mark.parametrize("name", ["sealed", "words", "copy"])
def test_old_checksums_match(golden: Path, name: str) -> None:
    """A table that was not changed since it was written is compared with its checksums."""
    assert verify(golden / name).checked_blocks == 1


def test_old_vocabularies_are_read(golden: Path) -> None:
    """Tokens come back byte for byte, with their counts."""
    vocabulary = Vocab.load(golden / "vocabulary")
    assert list(vocabulary) == make.TOKENS
    np.testing.assert_array_equal(vocabulary.counts, np.arange(len(make.TOKENS), 0, -1))
    words = Vocab.load(golden / "words")
    assert list(words) == ["one", "two", "three"]
    assert words.counts is None


def test_old_vectors_are_read(golden: Path) -> None:
    """A table that was built from a text file holds the numbers of the text."""
    with Table.open(golden / "words", "r") as table:
        expected = [[1, 2, 3, 4], [-1, 0.5, 0, 8], [0, 0, 0, 0.25]]
        np.testing.assert_array_equal(table.weight, np.array(expected, np.float32))


def test_a_bare_array_opens(golden: Path) -> None:
    """An .npy file of float32 rows is a table with one column."""
    with Table.open(golden / "bare.npy", "r") as table:
        rows = np.arange(make.ROWS * make.DIM, dtype=np.float32) / 8
        np.testing.assert_array_equal(table.weight, rows.reshape(make.ROWS, make.DIM))
