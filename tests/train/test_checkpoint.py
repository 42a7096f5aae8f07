"""A training that is stopped and resumed ends with the bits of one that was left alone."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from pyembed import Table, optim
from pyembed.cli import main
from pyembed.errors import ArgumentError, CorpusError, DirtyError, FormatError, LockedError
from pyembed.storage import fs
from pyembed.train import Model, checkpoint, corpus, runs, skipgram, train_skipgram
from tests.helpers import child
from tests.helpers.file_systems import Faults

WORDS = [f"word{i}" for i in range(40)]


def write_text(path: Path, words: int, seed: int = 0) -> Path:
    """Lines of words that occur about as often as those of a language."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, len(WORDS) + 1)
    drawn = rng.choice(WORDS, words, p=chance / chance.sum())
    path.write_text("".join(word + "\n "[i % 11 > 0] for i, word in enumerate(drawn.tolist())))
    return path


class Trainer:
    """A small training of some dozen batches, of several blocks and epochs."""

    def __init__(self, folder: Path) -> None:
        self.text = write_text(folder / "text.txt", 2000)
        self.output, self.partial = folder / "model", folder / "model.partial"
        self.settings: dict[str, Any] = {
            "dim": 8, "epochs": 2, "lr": 0.1, "buckets": 60, "seed": 3, "checkpoint_every": 2
        }  # fmt: skip

    def __call__(self, **changes: Any) -> dict[str, bytes]:
        """Train, and return the model's files."""
        options: dict[str, Any] = (
            {"corpus_paths": [self.text], "output": self.output} | self.settings | changes
        )
        result = train_skipgram(progress=False, **options)
        assert not self.partial.exists()
        return result_in(result.path)

    def whole(self, **changes: Any) -> dict[str, bytes]:
        """The expected files: those of a training that was not interrupted."""
        return self(output=self.output.with_name("whole"), **changes)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def result_in(folder: Path) -> dict[str, bytes]:
    """All files, without the random numbers of commits."""
    files = content(folder)
    fields = json.loads(files["manifest.json"])
    files.pop("changes", None)  # with durability "none" there is none
    del fields["commit"], fields["crc32c"]
    return files | {"manifest.json": json.dumps(fields).encode()}


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Batches of 128 words, four blocks a pass."""
    monkeypatch.setattr(runs, "RUNS_AT_ONCE", 8)
    monkeypatch.setattr(runs, "BLOCK", 600)
    return Trainer(tmp_path)


@contextlib.contextmanager
def stopping(after: int, error: BaseException | None = None) -> Iterator[None]:
    """Raise within batch number `after` + 1, between its two optimizer steps."""
    calls, step = 0, optim.Adagrad.step

    def counted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * after + 2:
            raise error or KeyboardInterrupt
        step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.Adagrad, "step", counted)
        yield


def in_sittings(trainer: Trainer, after: int, **changes: Any) -> tuple[dict[str, bytes], int]:
    """Train, interrupted after so many batches again and again; also returns how often."""
    for interrupted in itertools.count():
        with stopping(after), contextlib.suppress(KeyboardInterrupt):
            return trainer(resume=interrupted > 0, **changes), interrupted
        assert trainer.partial.exists() and not trainer.output.exists()
    raise AssertionError


def begin(trainer: Trainer, after: int = 5) -> dict[str, bytes]:
    """Leave a training with a checkpoint, interrupted after so many batches; returns its files."""
    with stopping(after), pytest.raises(KeyboardInterrupt, match="partial holds the last check"):
        trainer()
    return content(trainer.partial)


# ---- the same bits


@pytest.mark.parametrize(("every", "after"), [(1, 1), (1, 4), (2, 3), (4, 11)])
def test_interrupted_again_and_again(trainer: Trainer, every: int, after: int) -> None:
    """Interrupted in the middle of every k-th batch, it ends with the same files, byte for byte."""
    whole = trainer.whole(checkpoint_every=every)
    meta = json.loads(whole["manifest.json"])["meta"]
    assert meta["progress"]["batches"] >= 20 and meta["progress"]["words"] == meta["words"] == 4000
    files, interrupted = in_sittings(trainer, after, checkpoint_every=every)
    assert interrupted > 1
    assert files == whole
    # Neither does it matter that there are checkpoints.
    plain = trainer(output=trainer.output.with_name("plain"), checkpoint_every=None)
    assert plain["rows.npy"] == whole["rows.npy"]


def one_stream(patch: pytest.MonkeyPatch) -> None:
    """Mutant: random numbers come from one generator, which every resumption seeds again."""
    streams: dict[int, np.random.Generator] = {}

    def generator(seed: int, *place: int) -> np.random.Generator:
        if place == (0, 0) or seed not in streams:
            streams[seed] = np.random.default_rng(seed)
        return streams[seed]

    patch.setattr(runs, "generator", generator)


def rate_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """Mutant: the words that the learning rate depends on are counted from zero."""
    made = checkpoint.Progress
    patch.setattr(skipgram, "Progress", lambda **at: made(**(at | {"words": 0})))


def a_batch_is_left_out(patch: pytest.MonkeyPatch) -> None:
    """Mutant: the first batch after a checkpoint is skipped."""
    add = checkpoint.Progress.add

    def early(at: checkpoint.Progress, batch: runs.Runs, loss: float) -> None:
        add(at, batch, loss)
        at.batch += 1

    patch.setattr(checkpoint.Progress, "add", early)


def nothing_is_taken_back(patch: pytest.MonkeyPatch) -> None:
    """Mutant: rows stay as the interruption left them."""
    patch.setattr("pyembed.storage.file_store.Writer.rollback", lambda store: store.commit(None))


@pytest.mark.parametrize(
    "mutant", [one_stream, rate_begins_anew, a_batch_is_left_out, nothing_is_taken_back]
)
def test_the_comparison_notices_a_mutant(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., None]
) -> None:
    """Each mutant of resuming ends with other rows."""
    mutant(monkeypatch)
    whole = trainer.whole()
    assert in_sittings(trainer, 3)[0]["rows.npy"] != whole["rows.npy"]


def test_killed_again_and_again(tmp_path: Path) -> None:
    """The command, killed by SIGKILL at random moments and resumed, makes the same files."""
    text = str(write_text(tmp_path / "text.txt", 30_000))
    output, rng = tmp_path / "model", np.random.default_rng(1)
    command = ["train", "skipgram", text, "--dim", "8", "--buckets", "500", "--epochs", "12", "-q"]
    command += ["--checkpoint-every", "2", "--threads", "1", "-o"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    kills, manifest = 0, tmp_path / "model.partial" / "manifest.json"

    def generation() -> int:
        with contextlib.suppress(FileNotFoundError):
            return int(json.loads(manifest.read_bytes())["generation"])
        return -1

    while not output.exists():
        resume = ["--resume"] if manifest.exists() else []
        last = generation() + int(rng.integers(1, 10)) if kills < 6 else 1 << 30
        arguments = [sys.executable, "-m", "pyembed", *command, str(output), *resume]
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as training:
            while training.poll() is None and generation() < last:
                time.sleep(0.001)
            time.sleep(float(rng.uniform(0, 0.01)))
            training.kill()
        kills += training.returncode != 0
        assert training.returncode in (0, -signal.SIGKILL)
    assert kills > 0
    assert result_in(output) == result_in(tmp_path / "whole")


def test_full_disk(trainer: Trainer) -> None:
    """A journal that cannot grow is an error, and with room again the training continues."""
    whole = trainer.whole(checkpoint_every=9)
    begin(trainer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, before[1]))
    try:
        with pytest.raises(OSError, match="large|space") as caught:
            trainer(resume=True, checkpoint_every=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    files = trainer(resume=True, checkpoint_every=9)
    assert files["rows.npy"] == whole["rows.npy"]


# ---- before the first checkpoint, and after the last


def test_stopped_while_the_text_was_read(trainer: Trainer) -> None:
    """After a death during reading, the text is read again."""
    whole = trainer.whole()
    Table.create(trainer.partial, 0, 8, "adagrad").close()
    (trainer.partial / "text").write_bytes(b"half")
    with pytest.raises(ArgumentError, match=r"dim = 9; the training in .*model\.partial has 8"):
        trainer(resume=True, dim=9)
    assert trainer(resume=True) == whole


def test_a_text_is_read_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training continues without texts that were read, even if half of its rows are missing."""
    whole, append = trainer.whole(), Table.append

    def full_disk(table: Table, n: int, *recipe: Any) -> None:
        if not recipe:  # the output vectors, which come second
            raise OSError(errno.ENOSPC, "full")
        append(table, n, *recipe)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "append", full_disk)
        with pytest.raises(OSError, match="full"):
            trainer()
    with Table.open(trainer.partial, "r") as table:
        assert table.rows == 0 and table.meta["tokens"] > 2000
    trainer.text.unlink()
    assert trainer(resume=True) == whole


def test_stopped_before_it_got_its_name(trainer: Trainer) -> None:
    """A finished training that only has to be renamed is not trained again."""
    whole = trainer.whole()
    system = Faults()
    system.fail("rename", when=lambda source, target: source == trainer.partial)
    with fs.using(system), pytest.raises(OSError, match="injected"):
        trainer()
    assert not (trainer.partial / "text").exists()
    with stopping(0):  # there is no batch left
        assert trainer(resume=True) == whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_kept_of_half_a_text(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Interrupted while it reads, a training leaves nothing, with checkpoints too."""

    def read(*_: Any) -> Any:
        raise error("stop")

    monkeypatch.setattr(corpus, "tokenize", read)
    with pytest.raises(error, match="was not made" if error is KeyboardInterrupt else "stop"):
        trainer()
    assert list(trainer.text.parent.iterdir()) == [trainer.text]


def test_nothing_is_kept_of_a_text_without_pairs(trainer: Trainer) -> None:
    """A text without pairs leaves nothing, with checkpoints too."""
    trainer.text.write_text("one\ntwo\n" * 9)
    with pytest.raises(CorpusError, match="no line has two words"):
        trainer(checkpoint_every=1)
    assert list(trainer.text.parent.iterdir()) == [trainer.text]


# ---- what is kept


def test_a_checkpoint_can_be_asked(trainer: Trainer) -> None:
    """The last checkpoint is a model with neighbours and progress."""
    begin(trainer, after=5)
    with Model(trainer.partial) as model:
        progress = model.table.meta["progress"]
        assert len(model.similar(["word1"], 5)[0]) == 5
    assert progress["batches"] == 4 and 0 < progress["words"] < 4000
    assert progress["loss"] > 0


def test_message_of_the_command(
    trainer: Trainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C prints how to continue, and the same command with --resume continues."""
    monkeypatch.chdir(trainer.output.parent)
    command = ["train", "skipgram", "text.txt", "-o", "model", "--dim", "8", "--buckets", "9", "-q"]
    command += ["--checkpoint-every", "1"]
    with stopping(3):
        assert main(command) == 1
    said = "pyembed: interrupted: model.partial holds the last checkpoint; continue with --resume"
    assert capsys.readouterr().err.startswith(said)
    assert main(command) == 2
    assert "model.partial exists: " in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--resume"]) == 2
    assert "model exists; give another output" in capsys.readouterr().err


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, r"there is no .*model\.partial to resume"),
        ({"resume": True, "checkpoint_every": None}, "resume without checkpoint_every"),
        ({"checkpoint_every": 0}, "checkpoint_every = 0; allowed: 1 or more"),
    ],
)
def test_nothing_to_resume(trainer: Trainer, options: dict[str, Any], message: str) -> None:
    """Resuming nothing, and checkpoints every 0 batches, are errors that make nothing."""
    with pytest.raises(ArgumentError, match=message):
        trainer(**options)
    assert list(trainer.text.parent.iterdir()) == [trainer.text]


def test_other_settings(trainer: Trainer) -> None:
    """A setting that differs from the checkpoint's is refused by name, and the checkpoint stays."""
    files = begin(trainer)
    others: dict[str, Any] = {
        "dim": 9, "window": 4, "negative": 4, "min_count": 4, "epochs": 3, "lr": 0.2, "sample": 0.1,
        "minn": 2, "maxn": 7, "buckets": 61, "seed": 4, "suffixes": [".py"], "exclude": ["x"],
        "encoding_errors": "replace",
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(ArgumentError, match=rf"^{name} = .*; the training in .* has "):
            trainer(resume=True, **{name: value})
    with pytest.raises(ArgumentError, match="paths = '2 paths, .* has '1 paths, "):
        trainer(resume=True, corpus_paths=[trainer.text, trainer.text])
    assert content(trainer.partial) == files
    assert trainer(resume=True, num_threads=2) == trainer.whole()


def cut(path: Path) -> None:
    """Cut a file in half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("text", cut), ("text", Path.unlink), ("rows.npy", cut), ("rows.npy", Path.unlink),
        ("manifest.json", cut), ("vocab.txt", cut), ("vocab.txt", Path.unlink),
        ("vocab.counts.npy", cut), ("lock", Path.unlink),
    ],
)  # fmt: skip
def test_damaged_checkpoint(trainer: Trainer, name: str, damage: Callable[[Path], None]) -> None:
    """A file that is missing or cut short is named, and the others stay."""
    begin(trainer)
    damage(trainer.partial / name)
    files = content(trainer.partial)
    with pytest.raises((FormatError, FileNotFoundError), match=name):
        trainer(resume=True)
    assert content(trainer.partial) == files


def test_vocabulary_of_another_training(trainer: Trainer) -> None:
    """Words that the rows were not made for are refused, and so are words without counts."""
    begin(trainer)
    (trainer.partial / "vocab.counts.npy").unlink()
    with pytest.raises(FormatError, match="40 words instead of 40, or counts are missing"):
        trainer(resume=True)
    (trainer.partial / "vocab.txt").write_text("a\n")
    with pytest.raises(FormatError, match="1 words instead of 40"):
        trainer(resume=True)


def test_folder_that_is_no_training(trainer: Trainer) -> None:
    """Another table in the place of the partial folder is left unchanged."""
    Table.create(trainer.partial, 3, 8, "adagrad").close()
    files = content(trainer.partial)
    with pytest.raises(FormatError, match=r"model\.partial: no skipgram training"):
        trainer(resume=True)
    assert content(trainer.partial) == files


def train_until_the_first_step(text: Path, output: Path) -> None:
    """Train without checkpoints, and die after the first step."""
    whole = skipgram._Model.step

    def step(*arguments: Any) -> NoReturn:
        whole(*arguments)
        child.die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skipgram._Model, "step", step)
        skipgram.train_skipgram([text], output, dim=8, epochs=2, lr=0.1, buckets=60, seed=3)


def test_killed_without_checkpoints(trainer: Trainer) -> None:
    """The folder of a killed training without checkpoints is refused, with a remedy."""
    child.run(train_until_the_first_step, trainer.text, trainer.output, status=-signal.SIGKILL)
    with pytest.raises(DirtyError, match=r"no journal: no checkpoint is left; remove it.*partial"):
        trainer(resume=True)
    shutil.rmtree(trainer.partial)
    trainer()


def test_two_trainings_at_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a training runs, neither a second nor a resumed one can use its folder."""
    whole = trainer.whole()
    seen: list[Collection[str]] = []
    step = skipgram._Model.step

    def twice(*arguments: Any) -> float:
        if not seen:
            with pytest.raises(LockedError, match=r"model\.partial"):
                trainer(resume=True)
            with pytest.raises(ArgumentError, match="a training writes to it"):
                trainer()
            seen.append(content(trainer.partial).keys())
        return step(*arguments)

    monkeypatch.setattr(skipgram._Model, "step", twice)
    assert trainer() == whole
    assert "text" in seen[0]
