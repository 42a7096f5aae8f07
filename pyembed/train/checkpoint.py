"""Checkpoints: a training that may be stopped at any moment and continues from its last one.

``OUTPUT.partial`` is the table of the model from the beginning, and is renamed at the end. Its
lock keeps other trainings out, and its commits are the checkpoints: rows, optimizer state, and the
settings and progress in its meta change together or not at all. The folder also has the vocabulary
and the text as rows, so texts are read once.

State diagram (the function of `skipgram` on each arrow)::

    absent ──► empty ──_read_text──► settings in meta ──_make_rows──► progress in meta ──► OUTPUT
                                                                           │    ▲
                                                                           └────┘ _train

Each arrow but the first and the last ends in a commit, and the next one needs committed data alone.
All random numbers are a function of the place in the text (see `runs`), so the state of a generator
is not kept. Without checkpoints the steps are the same, and the folder is removed after an error.

Changes of the texts are not noticed: their paths are compared as they were given, and a text that
was read to its end is not read again.
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
from pyembed.storage.fs import Folder
from pyembed.table import Table
from pyembed.train.runs import Place, Runs
from pyembed.train.subword import I64
from pyembed.words.vocab import Vocab

TEXT = "text"  # the file of the text as rows, see `corpus.rewrite_as_rows`


@dataclass
class Progress:
    """The progress of a training.

    Attributes
    ----------
    epoch, block, batch : int
        The place of the next batch; at the end, the epoch after the last one.
    batches, words : int
        The numbers of batches and of words that were trained on, dropped frequent words included.
    loss : float or None
        The loss of a true pair and its negatives, averaged over about the last fifty batches.
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
        """Count one more batch; a batch without pairs has the loss NaN."""
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
    """The table of a training, which is renamed to `output` when the block ends.

    Parameters
    ----------
    output : Path
        The folder to make; it must not exist.
    settings : dict
        Plain JSON with a ``dim``; must agree with the settings in the meta of a checkpoint.
    checkpoint_every : int, optional
        If given, the last commit stays when an exception leaves the block; else nothing stays.
    resume : bool
        Whether to continue from the last checkpoint.
    num_threads : int, optional
        See `Table.create`.

    Yields
    ------
    Table
        The table, without rows or as the last checkpoint left it.

    Raises
    ------
    ArgumentError
        If the output exists, there is nothing to resume, the settings differ from the checkpoint's,
        or another partial folder has its name.
    LockedError
        If another training has the partial folder open.
    DirtyError, FormatError
        If the partial folder has no checkpoint, is damaged, or is something else.
    """
    _require_new(output, checkpoint_every, resume)
    partial = output.with_name(output.name + ".partial")
    if resume:
        table = _reopen(partial, settings, num_threads)
    else:
        table = _create(partial, settings["dim"], checkpoint_every, num_threads)
    try:
        with table:
            yield table
        (partial / TEXT).unlink(missing_ok=True)
        with Folder(partial.parent) as folder:
            folder.rename(partial.name, output.name)
    except BaseException as error:
        # Before the text is read there is nothing to keep, and a bad text would be refused again.
        if checkpoint_every is None or not table.meta or isinstance(error, CorpusError):
            shutil.rmtree(partial, ignore_errors=True)
            left = f"{output} was not made"
        else:
            left = f"{partial} holds the last checkpoint; continue with --resume (resume=True)"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted: {left}") from None
        raise


def _require_new(output: Path, checkpoint_every: int | None, resume: bool) -> None:
    """Refuse an output that exists, and arguments that contradict each other."""
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ArgumentError(f"checkpoint_every = {checkpoint_every}; allowed: 1 or more batches")
    if resume and checkpoint_every is None:
        raise ArgumentError("resume without checkpoint_every; repeat the command that was stopped")
    if os.path.lexists(output):
        raise ArgumentError(f"{output} exists; give another output, or remove it")


def _create(partial: Path, dim: int, checkpoint_every: int | None, threads: int | None) -> Table:
    """A table without rows, as their number is not known before the text is read."""
    durability = "none" if checkpoint_every is None else "process"
    try:
        return Table.create(
            partial, 0, dim, optimizer="adagrad", durability=durability, num_threads=threads
        )
    except FileExistsError:
        raise ArgumentError(
            f"{partial} exists: a training writes to it, or was stopped; in that case continue "
            "with --resume (resume=True), or remove it"
        ) from None


def _reopen(partial: Path, settings: dict[str, Any], threads: int | None) -> Table:
    """The partial table of a training, if it has these settings and is complete."""
    if not os.path.lexists(partial):
        raise ArgumentError(f"there is no {partial} to resume; start without --resume (resume)")
    try:
        table = Table.open(partial, durability="process", num_threads=threads)
    except DirtyError as error:
        what = str(error.strerror).partition(":")[0]  # the rest of the message is about salvage
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
    """Refuse the table of another training, or of other settings."""
    meta = table.meta
    if not meta and not table.rows:  # stopped before its text was read
        meta = {"dim": table.dim}
    elif meta.get("model") != settings["model"]:
        raise FormatError(f"{table.path}: no {settings['model']} training; move it out of the way")
    for name, value in settings.items():
        if (kept := meta.get(name, value)) != value:
            raise ArgumentError(
                f"{name} = {value!r}; the training in {table.path} has {kept!r}: use that, or "
                "remove the folder and start again"
            )


def _require_text(table: Table) -> None:
    """Refuse a text of another length than was written, unless training is done."""
    meta, text = table.meta, text_of(table)
    if not meta or meta.get("progress", {}).get("epoch") == meta["epochs"]:
        return
    if (size := text.stat().st_size) != 4 * meta["tokens"]:
        raise FormatError(
            f"{text}: {size} bytes; {4 * meta['tokens']} were written. Restore it, or remove the "
            "folder and start again"
        )


def folder_of(table: Table) -> Path:
    """The folder of the table, which has all files of the training."""
    assert table.path is not None
    return table.path


def text_of(table: Table) -> Path:
    """The file of the text as rows."""
    return folder_of(table) / TEXT


def load_vocabulary(table: Table) -> tuple[list[str], I64]:
    """The words of a training, and how often each occurred.

    Raises
    ------
    FormatError
        If they are not the words that the table was made for.
    """
    vocab, size = Vocab.load(folder_of(table)), table.meta["vocabulary"]
    if vocab.counts is None or len(vocab) != size:
        raise FormatError(
            f"{table.path}: {len(vocab)} words instead of {size}, or counts are missing; restore "
            "its vocab.* files, or remove the folder and start again"
        )
    return list(vocab), vocab.counts
