"""The command line: what it prints, its exit status, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
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


def run(*arguments: str | bytes, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "pyembed", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | variables, check=False)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_any_name_is_printed_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    """No path, token or word stops a command: bytes come back, other characters are escaped."""
    text, folder = os.fsencode(tmp_path / "v.txt"), os.fsencode(tmp_path) + b"/\xfc\xc5\xbc"
    Path(os.fsdecode(text)).write_bytes(b"caf\xe9 1 2\n" + "żółć 3 4\n".encode())
    commands: list[list[str | bytes]] = [
        ["build", text, "-o", folder, "-q"],
        ["info", folder],
        ["info", folder, "--json"],
        ["verify", folder, "-q"],
        ["recover", folder],
        ["convert", folder, "-o", folder + b"2", "-q"],
        ["export", folder, "-o", folder + b"3", "-q"],
        ["doctor"],
    ]
    for command in commands:
        done = run(*command, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b""), command
    printed = run("info", folder, PYTHONIOENCODING=encoding).stdout
    assert {"utf-8": folder, "latin-1": rb"\u017c", "ascii": b"/\xfc\\u017c"}[encoding] in printed
    failures: list[list[str | bytes]] = [
        ["info", folder + b"x"],
        ["similar", folder, b"\xe9"],
        ["verify", b"\xe9"],
    ]
    for failing in failures:
        done = run(*failing, PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        assert done.stderr.startswith(b"pyembed: ")
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_neighbours_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    """similar prints words that stdout cannot encode, and refuses a word that is not UTF-8."""
    (tmp_path / "text.txt").write_text("naïve façade żółć naïve façade żółć\n" * 20)
    model = str(tmp_path / "model")
    options = ["--dim", "4", "--min-count", "1", "--epochs", "1", "--buckets", "10", "-q"]
    assert main(["train", "skipgram", str(tmp_path / "text.txt"), "-o", model, *options]) == 0
    done = run("similar", model, "naïve", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("żółć".encode() if encoding == "utf-8" else b"\\u017c\xf3\\u0142\\u0107") in done.stdout
    done = run("similar", model, b"c\xe4t", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"is not UTF-8; convert it" in done.stderr


@pytest.mark.parametrize("command", [["doctor"], ["--help"], ["info", "missing"]])
def test_a_closed_pipe_is_silence(command: list[str]) -> None:
    """A reader of stdout that has gone causes no message, whatever the command prints."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        arguments = [sys.executable, "-m", "pyembed", *command]
        done = subprocess.run(arguments, stdout=closed, stderr=subprocess.PIPE, check=False)
    assert done.stderr.count(b"\n") == (1 if "missing" in command else 0)
    assert b"Broken" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_message() -> None:
    """Results that cannot be written are a failure with one line that says so."""
    with Path("/dev/full").open("wb") as full:
        arguments = [sys.executable, "-m", "pyembed", "doctor"]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("3 GiB"), r"out of memory \(3 GiB\); free some"),
        (RuntimeError("odd"), r"RuntimeError: odd; this is a fault of pyembed: please report"),
        (UnicodeError("bad"), r"UnicodeError: bad; this is a fault of pyembed"),
    ],
)
def test_no_error_is_a_traceback(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error that no command expects is one line, too; it says how to report it."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("pyembed.cli.show_config", fail)
    assert main(["doctor"]) == 1
    assert re.match(f"pyembed: {message}", capsys.readouterr().err)


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
