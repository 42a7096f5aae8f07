"""The command line: what it prints, its exit status, and what it leaves behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pyembed import Table
from pyembed.cli import main
from tests.helpers.child import kill_writer


def test_build_and_info(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """build prints the facts about the new table; info prints them again, as JSON too."""
    command = ["build", "-o", str(path), "--rows", "1000", "--dim", "8", "--seed", "4"]
    assert main([*command, "--init", "uniform:-1,1", "--optimizer", "adagrad"]) == 0
    assert "1,000" in capsys.readouterr().out
    with Table.open(path, "r") as t:
        assert t.columns == {"weight": 8, "sum": 8}
        assert -1 <= t.weight.min() < t.weight.max() <= 1
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["columns"] == {"weight": 8, "sum": 8}
    assert (facts["rows"], facts["state"]) == (1000, "clean")
    assert "resident_bytes" not in facts
    assert main(["info", str(path), "--resident", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["resident_bytes"] is None or 0 <= facts["resident_bytes"] <= 4096 + 64_000 + 4096


def add_infinity(table: Table) -> None:
    """Make the first row infinite."""
    table.scatter_add([0], np.full((1, 2), np.inf, np.float32))


def test_verify_and_recover(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verify changes nothing and prints what is wrong; recover rolls back to the last commit."""
    kill_writer(table, add_infinity)
    before = {file.name: file.read_bytes() for file in table.iterdir()}
    assert main(["verify", str(table), "--finite", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "rows": 4, "generation": 1, "state": "dirty", "checked_blocks": None, "nonfinite_rows": 0
    }  # fmt: skip
    assert {file.name: file.read_bytes() for file in table.iterdir()} == before
    assert main(["recover", str(table)]) == 0
    assert "generation" in capsys.readouterr().out
    with Table.open(table, "r") as t:
        assert (t.state, t.gather(0).tolist()) == ("clean", [0, 1])
    kill_writer(table, add_infinity)
    assert main(["recover", str(table), "--salvage"]) == 0
    assert main(["verify", str(table)]) == 0
    assert main(["verify", str(table), "--finite", "-q"]) == 1
    assert "1 rows are not finite" in capsys.readouterr().err
    (table / "rows.npy").write_bytes(b"short")
    assert main(["verify", str(table)]) == 1
    assert "rows.npy" in capsys.readouterr().err


def test_build_from_vectors(path: Path, tmp_path: Path) -> None:
    """build makes a table from a file of vectors."""
    (tmp_path / "v.txt").write_text("a 1 2\nb 3 4\n")
    assert main(["build", str(tmp_path / "v.txt"), "-o", str(path), "-q"]) == 0
    assert np.load(path / "rows.npy").tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "required: COMMAND"),
        (["build", "-o", "x"], 2, "give a file of vectors, or --rows and --dim"),
        (["build", "v.txt", "-o", "x", "--rows", "3"], 2, "for a fresh table"),
        (["build", "-o", "x", "--rows", "3", "--dim", "0"], 2, "dim = 0; allowed: 1..65536"),
        (["build", "-o", "x", "--rows", "3", "--dim", "2", "--init", "gauss"], 2, "normal"),
        (["build", "missing.txt", "-o", "x"], 1, "missing.txt"),
        (["build", "-o", ".", "--rows", "3", "--dim", "2"], 1, "choose a new name"),
        (["info", "missing"], 1, "missing"),
        (["similar", "missing", "word"], 1, "missing"),
        (["train", "skipgram", "missing", "-o", "x"], 1, "missing"),
        (["train", "skipgram", ".", "-o", "x", "--dim", "0"], 2, "dim = 0; allowed: 1 or more"),
        (["train", "skipgram", ".", "-o", "x", "--resume"], 2, "resume without checkpoint_every"),
    ],
)
def test_errors(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong arguments end with 2, failures with 1; one message on stderr, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    try:
        got = main(arguments)
    except SystemExit as error:  # argparse's own
        got = int(error.code or 0)
    captured = capsys.readouterr()
    assert (got, captured.out) == (status, "")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_train_and_similar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train makes word vectors from a text, and similar prints the neighbours of words."""
    rng = np.random.default_rng(0)
    topics = [["sun", "moon", "star", "sky"], ["salt", "milk", "bread", "meal"]]
    lines = [" ".join(rng.choice(topics[i % 2], 10)) for i in range(600)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    model = str(tmp_path / "model")
    options = ["--dim", "16", "--epochs", "10", "--buckets", "100", "--sample", "0", "--seed", "2"]
    assert main(["train", "skipgram", str(tmp_path / "text.txt"), "-o", model, "-q", *options]) == 0
    assert "words_per_second" in capsys.readouterr().out
    assert main(["similar", model, "sun", "milk", "-n", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {word for word, _ in found["sun"]} == {"moon", "star", "sky"}
    assert {word for word, _ in found["milk"]} == {"salt", "bread", "meal"}


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    """doctor prints the facts that a bug report needs."""
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["simd"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C during a build ends it soon, with status 1 and no half-made table."""
    command = [sys.executable, "-m", "pyembed", "build", "-q", "-o", str(tmp_path / "t")]
    arguments = [*command, "--rows", "100000000", "--dim", "8"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as child:
        for _ in range(1000):
            if list(tmp_path.glob("*.creating-*/rows.npy")):
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []
