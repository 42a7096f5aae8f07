"""The builder: tables from initialisers and from files of vectors, in fixed memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyembed
from pyembed import Table, build, init
from pyembed.errors import FormatError
from pyembed.storage import direct_writer
from pyembed.words.vocab import Vocab
from tests.helpers import child


def test_from_initializer_is_create(tmp_path: Path) -> None:
    """The builder makes the rows that Table.create makes, file for file."""
    recipe = init.normal(0, 0.1)
    build.from_initializer(tmp_path / "a", 1234, 9, recipe, optimizer="adam", seed=3)
    Table.create(tmp_path / "b", 1234, 9, "adam", init=recipe, seed=3).close()
    for name in ("rows.npy", "seal.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Table.open(tmp_path / "a", "r") as a, Table.open(tmp_path / "b", "r") as b:
        assert a.committed == b.committed.with_changes(commit=a.committed.commit)


def test_same_rows_for_any_number_of_threads(tmp_path: Path) -> None:
    """The number of threads does not change a built table."""
    texts = []
    for num_threads in (1, 2, 3):
        folder = tmp_path / str(num_threads)
        build.from_initializer(folder, 70_000, 33, init.normal(), num_threads=num_threads)
        texts.append((folder / "rows.npy").read_bytes())
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("header", [True, False])
def test_from_text(tmp_path: Path, header: bool) -> None:
    """A file of vectors, with a header or not, becomes rows, state of zeros, and a vocabulary."""
    text = "cat 1 2\ndog 3 4\né 5 -6.5\n"
    (tmp_path / "v.txt").write_text(("3 2\n" if header else "") + text)
    build.from_vectors(tmp_path / "t", tmp_path / "v.txt", optimizer="adagrad")
    with Table.open(tmp_path / "t") as t:
        assert t.weight.tolist() == [[1, 2], [3, 4], [5, -6.5]]
        assert not t.column("sum").any()
        pyembed.optim.Adagrad(t).step([0], np.ones((1, 2), np.float32))
    assert list(Vocab.load(tmp_path / "t")) == ["cat", "dog", "é"]
    assert np.load(tmp_path / "t" / "rows.npy").shape == (3, 4)


@pytest.mark.parametrize(
    "text", ["3 2\ncat 1 2\n", "cat 1 2\ndog 3\n", "cat 1 2\ncat 3 4\n", "cat 1 nan\n", ""]
)
def test_bad_text_leaves_nothing(tmp_path: Path, text: str) -> None:
    """A file that is not what its format says is refused, and no table appears."""
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(FormatError, match=r"v\.txt"):
        build.from_vectors(tmp_path / "t", tmp_path / "v.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["v.txt"]


def build_and_print_peak(path: Path) -> None:
    """Build a large table and print the peak of this process's memory in KiB."""
    build.from_initializer(path, 1_250_000, 64, init.normal(), optimizer="adagrad")
    # Not ru_maxrss, which begins at the peak of the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    print(status[status.index("VmHWM:") + 1])


def test_peak_memory_does_not_grow(tmp_path: Path) -> None:
    """A table of 640 MB is built in less than 300 MB."""
    run = child.run(build_and_print_peak, tmp_path / "t")
    assert (tmp_path / "t" / "rows.npy").stat().st_size == 4096 + 1_250_000 * 512
    assert int(run.stdout) < 300_000


def test_large_tables_are_written_whole(tmp_path: Path) -> None:
    """Several pieces that are written past the page cache at once each reach their place."""
    rows, dim = 3 * direct_writer.PIECE_BYTES // (4 * 37), 37
    build.from_initializer(tmp_path / "t", rows, dim, init.normal(), seed=8)
    with Table.open(tmp_path / "t", "r") as t:
        assert np.array_equal(t.weight, Table.memory(rows, dim, init=init.normal(), seed=8).weight)
