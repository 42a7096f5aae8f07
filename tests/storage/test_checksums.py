"""Checksums of rows: taken while a table is written, compared by verify, gone with a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Table, _core, build, init
from pyembed.cli import main
from pyembed.errors import FormatError, LockedError
from pyembed.storage import checksums, direct_writer
from pyembed.tools.convert import convert
from pyembed.tools.verify import verify

MIB = 1 << 20


@pytest.fixture
def sealed(path: Path) -> Path:
    """12 MiB and a bit of rows of 260 bytes: 13 blocks, in two pieces of the writer."""
    build.from_initializer(path, 50_000, 65, init.normal())
    return path


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 0x10]))


def test_every_writer_of_whole_tables_seals(path: Path, tmp_path: Path) -> None:
    """Created, built, or converted: numpy finds the CRC of each MiB, without the header."""
    Table.create(path, 9_000, 65, init=init.normal()).close()
    convert(path, tmp_path / "b", optimizer="adagrad")
    (tmp_path / "v.txt").write_text("a 1 2\nb 3 4\n")
    build.from_vectors(tmp_path / "c", tmp_path / "v.txt")  # whose number of rows comes last
    Table.create(tmp_path / "d", 0, 2).close()
    for folder in (path, tmp_path / "b", tmp_path / "c", tmp_path / "d"):
        data = (folder / "rows.npy").read_bytes()
        parts = [data[max(at, 4096) : at + MIB] for at in range(0, len(data), MIB)]
        assert np.load(folder / "seal.npy").tolist() == [_core.crc32c(part) for part in parts]
        assert verify(folder).checked_blocks == len(parts)


@given(at=st.integers(4096, 4096 + 260 * 50_000 - 1))
def test_damage_is_found_and_named(sealed: Path, at: int) -> None:
    """Whichever byte of the rows rots, verify says in which rows, a MiB of them."""
    flip(sealed / "rows.npy", at)
    try:
        with pytest.raises(FormatError, match="1 of 13 blocks of 1 MiB are damaged") as caught:
            verify(sealed)
    finally:
        flip(sealed / "rows.npy", at)
    first, last = str(caught.value).split("which are rows ")[1].split(";")[0].split("..")
    assert int(first) <= (at - 4096) // 260 <= int(last) < 50_000
    assert 260 * (int(last) - int(first) - 1) < MIB


def test_many_damaged_blocks(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours are named together, and a long list is cut."""
    for at in (5000, MIB, 2 * MIB + 9, 12 * MIB + 50_000):
        flip(sealed / "rows.npy", at)
    with pytest.raises(FormatError, match=r"4 of 13 .* rows 0\.\.12083, 48380\.\.49999; restore"):
        verify(sealed)
    for block in (4, 6, 8):
        flip(sealed / "rows.npy", block * MIB)
    monkeypatch.setattr(checksums, "NAMED", 2)
    with pytest.raises(FormatError, match="and 3 places more; restore"):
        verify(sealed)


def test_the_seal_itself_is_checked(sealed: Path, tmp_path: Path) -> None:
    """A seal that is damaged, or of another table, is not believed."""
    flip(sealed / "seal.npy", 140)
    with pytest.raises(FormatError, match="seal.npy: damaged, or of another table"):
        verify(sealed)
    Table.create(tmp_path / "other", 3, 2, init=init.normal()).close()
    (sealed / "seal.npy").write_bytes((tmp_path / "other" / "seal.npy").read_bytes())
    with pytest.raises(FormatError, match="seal.npy: damaged, or of another table"):
        verify(sealed)


def test_a_change_ends_the_seal(path: Path) -> None:
    """Looking at rows, a commit of meta alone, and changes that are taken back keep it; the first
    commit of changed rows ends it, and the file goes."""
    with Table.create(path, 4, 2) as t:
        t.gather([1])
        t.commit(meta={"a": 1})
    assert verify(path).checked_blocks == 1
    with Table.open(path) as t:
        t.scatter_add([0], np.ones((1, 2), np.float32))
        t.append(3)
        t.rollback()
    assert verify(path).checked_blocks == 1
    with Table.open(path) as t:
        t.scatter_add([0], np.ones((1, 2), np.float32))
    assert verify(path).checked_blocks is None
    assert not (path / "seal.npy").exists()


def test_the_command_says_what_it_checked(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pyembed verify` fails for damage; of rows that changed it says that there is no checksum."""
    assert main(["verify", str(sealed), "-q"]) == 0
    assert "checked_blocks:    13" in capsys.readouterr().out
    with Table.open(sealed) as t:
        t.scatter_add([0], np.ones((1, 65), np.float32))
        with pytest.raises(LockedError):
            verify(sealed)
        t.rollback()
    flip(sealed / "rows.npy", 7 * MIB)
    assert main(["verify", str(sealed), "-q"]) == 1
    assert "in which are rows 28215..32248" in capsys.readouterr().err
    with Table.open(sealed) as t:
        t.append(1)
    assert main(["verify", str(sealed), "-q"]) == 0
    assert "have no checksum" in capsys.readouterr().out


def test_short_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's pieces and the reader's give the same sums, whatever their sizes."""
    monkeypatch.setattr(direct_writer, "PIECE_BYTES", 2 * MIB)
    Table.create(tmp_path / "t", 40_000, 33, init=init.normal()).close()
    monkeypatch.setattr(checksums, "READ_BYTES", MIB)
    assert verify(tmp_path / "t").checked_blocks == 6
