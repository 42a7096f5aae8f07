"""The stores of tables on disk: a reader, a private copy, and a writer.

Each opens the files of a table (`table_files`), maps the rows of the last commit, and looks after
the mapping's pages (`page_cache`). A writer has a transaction (`transaction`) as well.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import mmap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyembed import _core
from pyembed._checks import F32, IdArray
from pyembed.errors import ArgumentError, ReadOnlyError
from pyembed.init import Initializer
from pyembed.storage import manifest as manifests
from pyembed.storage import recovery
from pyembed.storage.columns import fresh_rows
from pyembed.storage.manifest import Manifest
from pyembed.storage.page_cache import PageCache, Stats
from pyembed.storage.recovery import Progress
from pyembed.storage.store import NO_ROWS, Store, require_width
from pyembed.storage.table_files import CLEAN, BareFile, TableFolder
from pyembed.storage.transaction import JournaledTransaction, Transaction

I64 = NDArray[np.int64]


def open_store(
    path: Path,
    mode: str,
    live: bool = False,
    salvage: bool = False,
    memory_limit: int | None = None,
    durability: str | None = None,
    num_threads: int = 1,
    progress: Progress = recovery.silent,
) -> Reader | PrivateCopy | Writer:
    """Open a table, or a bare .npy file.

    Parameters
    ----------
    path : Path
    mode : {"r", "r+", "c"}
        Read; read and write; write to a private copy that never reaches the file.
    live, salvage : bool
        See `Table.open`.
    memory_limit : int, optional
        Bytes.
    durability : {"process", "power", "none"}, optional
        From the next change on, instead of the table's own.
    num_threads : int
        Number of threads that write the journal.
    progress : function
        Shows the progress of a recovery.

    Raises
    ------
    LockedError, DirtyError, FormatError, FileNotFoundError
    """
    writable = mode == "r+"
    files: BareFile
    if path.is_dir():
        files = TableFolder(path, writable, not live, salvage)
    else:
        files = BareFile(path, writable, not live)
    try:
        if mode == "r":
            return Reader(files, live or salvage, memory_limit, progress)
        if mode == "c":
            return PrivateCopy(files, salvage, memory_limit, progress)
        return Writer(files, salvage, memory_limit, durability, num_threads, progress)
    except BaseException:
        files.close()
        raise


class _MappedStore(Store):
    """The mapping of a file, and its columns: the part that the stores of this module share.

    Parameters
    ----------
    files : BareFile or TableFolder
        Closed by `release`.
    mode : {"r", "r+", "c"}
    array : float32 array of shape (rows, stride)
        The mapping.
    memory_limit : int or None
        Bytes.

    Attributes
    ----------
    path : Path
    mode : str
    array : float32 array of shape (rows, stride)
    """

    def __init__(self, files: BareFile, mode: str, array: F32, memory_limit: int | None) -> None:
        super().__init__(copy.deepcopy(files.manifest.optimizer))
        self.path, self.mode = files.path, mode
        self._files, self.array = files, array
        self.id_map = files.load_id_map()
        self._page_cache = PageCache(files.file, array, memory_limit, mode == "r+")
        self.attach(array, files.manifest.columns, self._page_cache.pages)

    @property
    def manifest(self) -> Manifest:
        """The last commit, and whether rows changed since."""
        return self._files.manifest

    def ensure_columns(self, widths: Mapping[str, int]) -> None:
        """Require that the file has these columns.

        Raises
        ------
        ArgumentError
            If it lacks one; it says how to convert the table.
        """
        _ = self.weight_column
        columns = self.columns
        for name, width in widths.items():
            if name not in columns:
                missing = [f"{n}:{w}" for n, w in widths.items() if n not in columns]
                options = " ".join(f"--add {column}" for column in missing)
                raise ArgumentError(
                    f"{self.path} has no column {name!r}, only {', '.join(columns)}; make a "
                    f"table that has it: pyembed convert {self.path} -o NEW {options}"
                )
            require_width(columns[name], name, width)

    def _columns_to_change(self, state: Mapping[str, int]) -> tuple[_core.Column, ...]:
        self._page_cache.before_change()
        if not state:
            return (self.weight_column,)
        if not state.keys() <= self.columns.keys():
            self.ensure_columns(state)
        return self.columns_of(state)

    def append(self, n: int, init: Initializer, seed: int, num_threads: int) -> None:
        """Refuse: only a writer of a folder appends."""
        raise _no_append(self.path)

    def stats(self) -> Stats:
        """Return how much of the file is in memory, and what batches found there."""
        return self._page_cache.stats()

    def location(self) -> tuple[str, str] | None:
        """Return the path and the mode to open the table again.

        Raises
        ------
        TableError
            If the path leads to another folder now.
        """
        self._files.require_at_path()
        return str(self.path), self.mode

    def release(self) -> None:
        """Release the mapping and the lock; memory stays mapped as long as an array shows it."""
        self.detach()
        self.array = np.zeros((0, 1), np.float32)
        self._page_cache.close()
        self._page_cache.rows = self.array
        self._files.close()

    def close(self, commit: bool) -> None:
        """Release the files; nothing is to be committed."""
        self.release()

    def abandon(self) -> None:
        """Release the files of a table that was dropped."""
        self.release()


class Reader(_MappedStore):
    """A table on disk that is read.

    Parameters
    ----------
    files : BareFile or TableFolder
    as_is : bool
        Whether a dirty table is mapped as it is, instead of at its last commit.
    memory_limit : int or None
        Bytes.
    progress : function
        Shows the progress of a recovery.
    """

    def __init__(
        self, files: BareFile, as_is: bool, memory_limit: int | None, progress: Progress
    ) -> None:
        array = files.map_commit(mmap.ACCESS_READ, as_is, progress)
        array.flags.writeable = False
        super().__init__(files, "r", array, memory_limit)

    def begin_change(self, state: Mapping[str, int], rows: I64) -> tuple[_core.Column, ...]:
        """Refuse."""
        _ = self.weight_column
        raise self._refusal()

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Refuse."""
        raise self._refusal()

    def rollback(self) -> None:
        """Refuse."""
        raise self._refusal()

    def _refusal(self) -> ReadOnlyError:
        what = 'the table is open for reading; open it with mode="r+"'
        return ReadOnlyError(errno.EROFS, what, str(self.path))


class PrivateCopy(_MappedStore):
    """A table on disk whose changes stay in this process; parameters as those of `Reader`."""

    def __init__(
        self, files: BareFile, as_is: bool, memory_limit: int | None, progress: Progress
    ) -> None:
        array = files.map_commit(mmap.ACCESS_COPY, as_is, progress)
        super().__init__(files, "c", array, memory_limit)
        self._transaction = Transaction(files)  # only for its check of a fork; it never begins

    def begin_change(self, state: Mapping[str, int], rows: I64) -> tuple[_core.Column, ...]:
        """Return the columns to change; the system copies a page at its first change."""
        _ = self.weight_column
        self._transaction.require_usable()
        return self._columns_to_change(state)

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Refuse."""
        refusal = "a private copy has no commit; open the table with mode='r+'"
        raise ReadOnlyError(errno.EROFS, refusal, str(self.path))

    def rollback(self) -> None:
        """Refuse: there is no journal."""
        self._transaction.rollback(lambda: None)


class Writer(_MappedStore):
    """A table on disk that changes; recovered first, if its last writer died.

    Parameters
    ----------
    files : BareFile or TableFolder
        Open for writing.
    salvage : bool
        Whether a dirty table is committed as it is, instead of recovered.
    memory_limit : int or None
        Bytes.
    durability : {"process", "power", "none"} or None
        From the next change on, instead of the table's own.
    num_threads : int
        Number of threads that write the journal.
    progress : function
        Shows the progress of a recovery.
    """

    def __init__(
        self,
        files: BareFile,
        salvage: bool,
        memory_limit: int | None,
        durability: str | None,
        num_threads: int,
        progress: Progress,
    ) -> None:
        super().__init__(files, "r+", files.recover(salvage, progress), memory_limit)
        try:
            if durability is not None and durability != files.manifest.durability:
                files.save_durability(durability)
            if isinstance(files, TableFolder) and files.manifest.durability != "none":
                self._transaction: Transaction = JournaledTransaction(files, num_threads)
            else:
                self._transaction = Transaction(files)
        except BaseException:
            self._page_cache.close()
            raise
        self._transaction.attach(self.array, self._page_cache.pages)

    @property
    def transaction(self) -> Transaction:
        """The state of the writer between two commits."""
        return self._transaction

    @property
    def keeps_journal(self) -> bool:
        """Whether `begin_change` needs the rows that will change."""
        return self._transaction.keeps_journal

    @property
    def is_training(self) -> bool:
        """Whether rows changed since the last commit, so that more are likely to."""
        return self._files.manifest.state == "dirty"

    def begin_change(self, state: Mapping[str, int], rows: I64) -> tuple[_core.Column, ...]:
        """Keep the old content of rows, and return the columns to change."""
        _ = self.weight_column
        self._transaction.protect(rows)
        return self._columns_to_change(state)

    def write_ahead(self, ids: IdArray, owner: object) -> None:
        """Keep the old content of rows before a step asks for it, where that saves a wait."""
        self._transaction.write_ahead(ids, owner)

    def append(self, n: int, init: Initializer, seed: int, num_threads: int) -> None:
        """Add rows at the end."""
        widths, rows = self.manifest.columns, self.array.shape[0]
        self.append_chunks(fresh_rows(widths, rows, n, init, seed, num_threads), n)

    def append_chunks(self, chunks: Iterable[F32], count: int) -> None:
        """Add rows at the end, from chunks; the next commit counts them.

        Raises
        ------
        TableError
            If the disk has not enough space; the table is then as it was.
        ReadOnlyError
            If it is a bare .npy file.
        """
        files, before = self._files, self.array
        if not isinstance(files, TableFolder):
            raise _no_append(self.path)
        self._transaction.protect(NO_ROWS)
        try:
            self._show(files.grow(before.shape[0], count, chunks))
        except BaseException:
            with files.poisoned_on_failure():
                self._show(before)
                files.cut_to(before.shape[0])
            raise

    def _show(self, array: F32) -> None:
        """Take another number of rows for those of the table."""
        self.array = self._page_cache.rows = array
        self._transaction.attach(array, self._page_cache.pages)
        self.attach(array, self.manifest.columns, self._page_cache.pages)

    def commit(self, meta: dict[str, Any] | None) -> None:
        """Sync the rows, then save the manifest that commits them; do nothing without a change."""
        before = self.manifest
        if before.state == "clean" and before.optimizer == self.steps and meta is None:
            self._transaction.require_usable()
            return
        meta = before.meta if meta is None else meta
        self.commit_as(before.generation + 1, self._files.file.system.token(), meta, self.steps)

    def commit_as(
        self, generation: int, commit: str, meta: dict[str, Any], optimizer: Mapping[str, Any]
    ) -> None:
        """Commit with these fields of the manifest, which may be those of another table.

        Raises
        ------
        ArgumentError
            If meta cannot be stored; nothing is committed then.
        """
        self._transaction.require_usable()
        before = self.manifest
        state = before.with_changes(
            generation=generation,
            commit=commit,
            meta=meta,
            optimizer=optimizer,
            rows=self.array.shape[0],
            seal=before.seal if before.state == "clean" else "",
            **CLEAN,
        )
        # The round trip refuses a meta that cannot be stored, and copies it.
        self._transaction.commit(manifests.decode(manifests.encode(state), str(self.path)))

    def rollback(self) -> None:
        """Bring rows, steps and meta back to the last commit.

        Raises
        ------
        ArgumentError
            If the table keeps no journal.
        DirtyError
            If the journal is damaged; nothing is changed then.
        """
        self._transaction.rollback(self._show_commit)

    def _show_commit(self) -> None:
        """Show the number of rows and the steps of the last commit."""
        if self.manifest.rows != self.array.shape[0]:
            self._show(self.array[: self.manifest.rows])
        self.steps.clear()
        self.steps.update(copy.deepcopy(self.manifest.optimizer))

    def close(self, commit: bool) -> None:
        """Commit, or roll back if there is a journal, and release the files."""
        try:
            if commit:
                self.commit(None)
            elif self.keeps_journal:
                with contextlib.suppress(OSError):  # the next writer recovers
                    self.rollback()
        finally:
            self.release()

    def release(self) -> None:
        """Release journal, mapping, files and lock, without a commit."""
        transaction = self._transaction
        transaction.close()
        sound = not transaction.is_forked and not transaction.is_poisoned
        if sound and self.manifest.state == "clean":
            self._files.remove_obsolete()
        super().release()

    def abandon(self) -> None:
        """Commit and close a table that was dropped, or is open when Python exits, and warn."""
        transaction = self._transaction
        forgotten = self.manifest.state == "dirty" and not transaction.is_forked
        try:
            if forgotten and not transaction.is_poisoned:
                self.commit(None)
        finally:
            self.release()
        if forgotten:
            message = f"{self.path} was not closed; its changes are committed now"
            warnings.warn(message, ResourceWarning, stacklevel=2)


def _no_append(path: Path | None) -> ReadOnlyError:
    return ReadOnlyError(errno.EROFS, 'append needs a table folder open "r+"', str(path))
