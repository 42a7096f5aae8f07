"""Convert: the same rows with other columns, in a table that appears complete or not at all."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyembed import Table, Vocab, build, init, optim
from pyembed.cli import main
from pyembed.errors import ArgumentError, LockedError
from pyembed.storage import fs
from pyembed.tools.convert import convert
from tests.helpers.child import kill_writer
from tests.helpers.file_systems import Faults


@pytest.fixture
def trained(path: Path) -> Path:
    """A table with vocabulary, id map, meta, and ten steps of Adagrad."""
    build.from_initializer(path, 50, 3, init.normal(), optimizer="adagrad", counts=np.arange(50))
    Vocab([f"t{i}" for i in range(50)], counts=range(50)).save(path)
    with Table.open(path) as t:
        o = optim.Adagrad(t)
        for i in range(10):
            o.step([i, i + 1], np.ones((2, 3), np.float32))
        t.commit(meta={"epoch": 2})
    return path


def test_columns_are_added_and_dropped(trained: Path, tmp_path: Path) -> None:
    """Kept columns have their bits, new ones are zero, and vocabulary, id map and meta stay."""
    new = tmp_path / "new"
    convert(trained, new, optimizer="rowwise_adam", add={"bias": 2})
    with Table.open(trained, "r") as old, Table.open(new) as t:
        assert t.columns == {
            "weight": 3, "sum": 3, "exp_avg": 3, "row_exp_avg_sq": 1, "bias": 2
        }  # fmt: skip
        for name in ("weight", "sum"):
            assert np.array_equal(t.column(name), old.column(name))
        assert not np.concatenate([t.column(name) for name in list(t.columns)[2:]], 1).any()
        assert (t.meta, t.optimizer) == ({"epoch": 2}, {"adagrad": {"steps": 10}})
        assert t.id_map is not None and old.id_map is not None
        assert np.array_equal(t.id_map, old.id_map)
        assert optim.Adagrad(t).steps == 10
        optim.PartialRowwiseAdam(t).step([0], np.ones((1, 3), np.float32))
    assert list(Vocab.load(new)) == list(Vocab.load(trained))
    convert(trained, tmp_path / "bare", drop=["sum"])
    with Table.open(tmp_path / "bare", "r") as t:
        assert (t.columns, t.optimizer) == ({"weight": 3}, {})


def test_the_command_that_an_error_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An optimizer works after the command that its error message gives."""
    make = partial(optim.PartialRowwiseAdam, decay_mode="lazy", frequency_power=0.5)
    with Table.create(path, 5, 2) as t, pytest.raises(ArgumentError) as caught:
        make(t)
    command = str(caught.value).split("pyembed convert ")[1].replace("NEW", f"{path}2").split()
    assert main(["convert", *command, "-q"]) == 0
    assert "last_step" in capsys.readouterr().out
    with Table.open(f"{path}2") as t:
        make(t)


def test_many_chunks_and_a_bare_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are copied in chunks, the last one shorter; a .npy becomes a table."""
    monkeypatch.setattr("pyembed.tools.convert.CHUNK_FLOATS", 100)
    rows = np.random.default_rng(1).standard_normal((997, 7), np.float32)
    np.save(tmp_path / "a.npy", rows)
    convert(tmp_path / "a.npy", tmp_path / "t", optimizer="adam")
    with Table.open(tmp_path / "t", "r") as t:
        assert np.array_equal(t.weight, rows)
        assert t.columns == {"weight": 7, "exp_avg": 7, "exp_avg_sq": 7}
        assert t.durability == "process"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": ["weight"]}, "'weight' cannot be dropped; allowed: sum"),
        ({"drop": ["nosuch"]}, "cannot be dropped"),
        ({"add": {"sum": 3}}, "exists already"),
        ({"add": {"a b": 3}}, "column name 'a b'"),
        ({"add": {"a": 0}}, "width 0"),
        ({"optimizer": "sdg"}, "allowed: sgd"),
    ],
)
def test_bad_columns(
    trained: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    """Columns that cannot exist are refused, and no table appears."""
    with pytest.raises(ArgumentError, match=message):
        convert(trained, tmp_path / "new", **arguments)
    assert [file.name for file in tmp_path.iterdir()] == [trained.name]


def test_state_of_another_width(path: Path) -> None:
    """A column with the name of a state and another width is not used as that state."""
    Table.create(path, 3, 2, columns={"sum": 1}).close()
    with pytest.raises(ArgumentError, match="'sum' has width 1, and adagrad needs 2"):
        convert(path, f"{path}2", optimizer="adagrad")


def test_names_that_are_taken(trained: Path) -> None:
    """A name that exists is refused, and so is a table that a writer has open."""
    with pytest.raises(FileExistsError):
        convert(trained, trained)
    with Table.open(trained), pytest.raises(LockedError):
        convert(trained, f"{trained}2")


def test_a_failed_copy_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    """After a sync that fails at the end there is no new table, and the old one is unchanged."""
    before = (trained / "rows.npy").read_bytes()
    system = Faults()
    system.fail("sync")
    with fs.using(system), pytest.raises(OSError, match="injected"):
        convert(trained, tmp_path / "new", optimizer="adam")
    assert [file.name for file in tmp_path.iterdir()] == [trained.name]
    assert (trained / "rows.npy").read_bytes() == before


def step_every_row(table: Table) -> None:
    """Take a step that changes every row."""
    optim.SGD(table, lr=1).step(range(9), np.ones((9, 2), np.float32))


def test_a_table_whose_writer_died(path: Path, tmp_path: Path) -> None:
    """The last commit is converted, not the rows that a dead writer left in the file."""
    Table.create(path, 9, 2).close()
    kill_writer(path, step_every_row)
    assert json.loads((path / "manifest.json").read_text())["state"] == "dirty"
    convert(path, tmp_path / "new", optimizer="adam")
    with Table.open(tmp_path / "new", "r") as t:
        assert not t.weight.any()
        assert t.optimizer == {}


@pytest.mark.parametrize("add", ["a", "a:x", "a:", "a:-1"])
def test_bad_arguments(trained: Path, tmp_path: Path, add: str) -> None:
    """--add without a width is a wrong argument."""
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(trained), "-o", str(tmp_path / "new"), "--add", add])
    assert caught.value.code == 2
