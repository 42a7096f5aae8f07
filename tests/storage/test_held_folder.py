"""A table stays in the folder that it was opened in, or refuses a change."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pyembed import Table
from pyembed.errors import TableError

ONES = np.ones((1, 2), np.float32)


def test_another_working_directory(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that was opened by a relative path is changed where it was, after os.chdir too."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(table, elsewhere / table.name)
    monkeypatch.chdir(table.parent)
    t = Table.open(table.name)
    assert t.path == table
    os.chdir(elsewhere)
    t.scatter_add([0], ONES)
    t.commit({"a": 1})
    t.close()
    with Table.open(table, "r") as t:
        assert (t.meta, t.gather(0).tolist()) == ({"a": 1}, [1, 2])
    with Table.open(table.name, "r") as t:
        assert (t.meta, t.gather(0).tolist()) == ({}, [0, 1])


def test_a_folder_that_is_renamed(table: Path, tmp_path: Path) -> None:
    """A table follows its folder, whatever gets its name; its path is not used any more."""
    shutil.copytree(table, tmp_path / "other")
    t = Table.open(table)
    table.rename(tmp_path / "moved")
    (tmp_path / "other").rename(table)
    t.scatter_add([0], ONES)
    t.commit()
    with pytest.raises(TableError, match="the folder was moved"):
        pickle.dumps(t)
    t.close()
    with Table.open(tmp_path / "moved", "r") as t:
        assert t.gather(0).tolist() == [1, 2]
    with Table.open(table, "r") as t:
        assert t.gather(0).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["lock", "rows.npy", ""])
def test_a_folder_that_is_gone(table: Path, name: str) -> None:
    """Where the folder, the lock or the rows are gone or replaced, no row changes."""
    t = Table.open(table)
    if name:
        data = (table / name).read_bytes()
        (table / name).unlink()
        (table / name).write_bytes(data)
    else:
        shutil.rmtree(table)
    with pytest.raises(TableError, match="nothing was written; close the table"):
        t.scatter_add([0], ONES)
    assert t.gather(0).tolist() == [0, 1]
    t.close()


def test_a_folder_that_goes_before_a_commit(table: Path) -> None:
    """A commit that would reach no folder is refused."""
    t = Table.open(table)
    t.scatter_add([0], ONES)
    shutil.rmtree(table)
    with pytest.raises(TableError, match="the folder was removed"):
        t.commit()
    with pytest.raises(TableError):
        t.close()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_rows_that_are_a_link(table: Path, tmp_path: Path, link: Callable[..., None]) -> None:
    """Rows shared with another folder by links are read and not written; a real copy is."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for file in table.iterdir():
        link(file, shared / file.name)
    with pytest.raises(TableError, match=r"rows\.npy is a link.*copy the folder"):
        Table.open(shared)
    with Table.open(shared, "r") as t, Table.open(shared, "c") as private:
        private.scatter_add([0], ONES)
        assert t.gather(0).tolist() == [0, 1]
    shutil.copytree(shared, tmp_path / "copy")
    with Table.open(tmp_path / "copy") as t:
        t.scatter_add([0], ONES)
    with Table.open(table, "r") as t:
        assert t.gather(0).tolist() == [0, 1]
