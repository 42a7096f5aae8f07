"""A training that may be stopped anywhere, and goes on from its last checkpoint.

``OUTPUT.partial`` is the table of the model from the beginning, and gets its name at the end. Its
lock keeps other trainings out, and its commits are the checkpoints: rows, optimizer state, and in
meta the settings and the progress change together or not at all. In the same folder lie the
vocabulary and the text as rows, so that texts are read once.

State diagram (the function of `skipgram` on each arrow)::

    absent ──► empty ──_read_text──► settings in meta ──_make_rows──► progress in meta ──► OUTPUT
                                                                           │    ▲
                                                                           └────┘ _train

Each arrow but the first and the last ends in a commit, and the next needs nothing but what is
committed: whatever is random is a function of the place in the text (`runs.py`), so no state of a
generator is kept. Without checkpoints the same happens, and the folder does not survive an error.

Not done here: to notice that texts have changed. Their paths are compared as they were given, and a
text that was read to its end is not looked at again.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyembed.errors import ArgumentError, CorpusError, DirtyError, FormatError
from pyembed.table import Table
from pyembed.train.runs import Place, Runs
from pyembed.train.subword import I64
from pyembed.words.vocab import Vocab

TEXT = "text"  # the text as rows, see `corpus.rewrite_as_rows`


@dataclass
class Progress:
    """How far a training has come.

    Attributes
    ----------
    epoch, block, batch : int
        The place where the next batch begins; at the end an epoch that is none.
    batches, words : int
        How many were trained on, thinned words included.
    loss : float or None
        Of a true pair and its negatives, averaged over about the last fifty batches.
    """

    epoch: int = 0
    block: int = 0
    batch: int = 0
    batches: int = 0
    words: int = 0
    loss: float | None = None

    @property
    def place(self) -> Place:
        return Place(self.epoch, self.block, self.batch)

    @place.setter
    def place(self, value: Place) -> None:
        self.epoch, self.block, self.batch = value

    def add(self, runs: Runs, loss: float) -> None:
        """One more batch; NaN is the loss of one without pairs."""
        self.place = runs.next
        self.batches += 1
        self.words += runs.read
        if not math.isnan(loss):
            self.loss = loss if self.loss is None else self.loss + 0.02 * (loss - self.loss)


@contextlib.contextmanager
def table_in_training(
    output: Path,
    settings: dict[str, Any],
    checkpoint_every: int | None,
    resume: bool,
    num_threads: int | None,
) -> Iterator[Table]:
    """The table of a training, which is named `output` when the block ends.

    Parameters
    ----------
    output : Path
        Must not exist.
    settings : dict
        Plain JSON with a ``dim``. What a checkpoint has of it in its meta must be the same.
    checkpoint_every : int, optional
        If given, what was committed stays when the block is left by an exception; if not, nothing.
    resume : bool
        Go on with what a training left.
    num_threads : int, optional

    Raises
    ------
    ArgumentError
        An output that exists, nothing to resume, other settings, a partial folder in the way.
    LockedError
        Another training is at it.
    DirtyError, FormatError
        What was left has no checkpoint, is damaged, or is something else.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ArgumentError(f"checkpoint_every = {checkpoint_every}; allowed: 1 or more batches")
    if resume and checkpoint_every is None:
        raise ArgumentError("resume without checkpoint_every; give the same command as before")
    if os.path.lexists(output):
        raise ArgumentError(f"{output} exists; give another output, or remove it")
    partial = output.with_name(output.name + ".partial")
    if resume:
        table = _reopen(partial, settings, num_threads)
    else:
        table = _create(partial, settings["dim"], checkpoint_every, num_threads)
    try:
        with table:
            yield table
        (partial / TEXT).unlink(missing_ok=True)
        partial.rename(output)
    except BaseException as error:
        # Until a text was read there is nothing to keep; and one that teaches nothing never will.
        if checkpoint_every is None or not table.meta or isinstance(error, CorpusError):
            shutil.rmtree(partial, ignore_errors=True)
            left = f"{output} was not made"
        else:
            left = f"{partial} holds the last checkpoint; go on with --resume (resume=True)"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted: {left}") from None
        raise


def _create(partial: Path, dim: int, checkpoint_every: int | None, threads: int | None) -> Table:
    """A table without rows: how many there will be is not known before the text is read."""
    durability = "none" if checkpoint_every is None else "process"
    try:
        return Table.create(
            partial, 0, dim, optimizer="adagrad", durability=durability, num_threads=threads
        )
    except FileExistsError:
        raise ArgumentError(
            f"{partial} exists: a training writes to it, or one was stopped; then go on with "
            "--resume (resume=True), or remove it"
        ) from None


def _reopen(partial: Path, settings: dict[str, Any], threads: int | None) -> Table:
    """What a training left, if it is of these settings and complete."""
    if not os.path.lexists(partial):
        raise ArgumentError(f"there is no {partial} to resume; start without --resume (resume)")
    try:
        table = Table.open(partial, durability="process", num_threads=threads)
    except DirtyError as error:
        what = str(error.strerror).partition(":")[0]  # the rest is of rows that may be salvaged
        what = f"{what}: no checkpoint is left; remove it, and start again without --resume"
        raise DirtyError(error.errno, what, str(partial)) from None
    try:
        _require_same(table, settings)
        _require_text(table)
    except BaseException:
        table.close()
        raise
    return table


def _require_same(table: Table, settings: dict[str, Any]) -> None:
    """Refuse another training's table, and other settings."""
    meta = table.meta
    if not meta and not table.rows:  # stopped before its text was read
        meta = {"dim": table.dim}
    elif meta.get("model") != settings["model"]:
        raise FormatError(f"{table.path}: no {settings['model']} training; move it out of the way")
    for name, value in settings.items():
        if (kept := meta.get(name, value)) != value:
            raise ArgumentError(
                f"{name} = {value!r}; the training in {table.path} has {kept!r}: go on with that, "
                "or remove the folder and start again"
            )


def _require_text(table: Table) -> None:
    """Refuse a text that is not as long as it was, where there is still something to train."""
    meta, text = table.meta, text_of(table)
    if not meta or meta.get("progress", {}).get("epoch") == meta["epochs"]:
        return
    if (size := text.stat().st_size) != 4 * meta["tokens"]:
        raise FormatError(
            f"{text}: {size} bytes; {4 * meta['tokens']} were written. Restore it, or remove the "
            "folder and start again"
        )


def folder_of(table: Table) -> Path:
    """Where the table and all that belongs to the training lie."""
    assert table.path is not None
    return table.path


def text_of(table: Table) -> Path:
    """Where its text lies, as rows."""
    return folder_of(table) / TEXT


def load_vocabulary(table: Table) -> tuple[list[str], I64]:
    """The words of a training, and how often each occurred.

    Raises
    ------
    FormatError
        They are not those that the table was made for.
    """
    vocab, size = Vocab.load(folder_of(table)), table.meta["vocabulary"]
    if vocab.counts is None or len(vocab) != size:
        raise FormatError(
            f"{table.path}: {len(vocab)} words instead of {size}, or counts are missing; restore "
            "its vocab.* files, or remove the folder and start again"
        )
    return list(vocab), vocab.counts
