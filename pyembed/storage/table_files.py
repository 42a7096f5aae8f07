"""The files of an open table: a folder with its lock, manifest and rows, or a bare .npy file.

A table is a folder::

    rows.npy        float32, C order, shape (rows, stride), header padded to 4096 bytes
    manifest.json   the committed state, see `manifest`
    undo0, undo1    the rollback journal while rows change, see `journal`
    changes         which rows changed from commit to commit, see `change_log`
    lock            held by flock: exclusively by a writer, shared by readers
    seal.npy        checksums, if no commit changed rows since they were written, see `checksums`
    id_map.npy      optional: the row of each id, see `id_map`; never changes

The folder is held by its descriptor until it is closed. Sizes are compared with the manifest before
anything is mapped, and space is allocated before it is mapped, so no access to a mapping raises
SIGBUS because a file is too short or a disk is full.

Both kinds sync rows before they save the manifest that commits them. After a failed sync, or a
failed or interrupted change of the manifest, they are poisoned: the content of the disk is unknown.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyembed._checks import F32
from pyembed.errors import FormatError, LockedError, TableError
from pyembed.storage import checksums, id_map, journal, manifest, recovery
from pyembed.storage.fs import PASSING, File, Folder, open_file
from pyembed.storage.journal import Replay
from pyembed.storage.manifest import Manifest
from pyembed.storage.npy import HEAD_BYTES, HEADER_BYTES, read_rows, rows_header
from pyembed.storage.recovery import Progress

CLEAN = {"state": "clean", "salt": "", "boot": ""}


class BareFile:
    """A bare .npy file as a table with the one column ``weight``; its manifest is in memory alone.

    Parameters
    ----------
    path : Path
    writable, lock : bool
        Whether the file is opened for writing, and locked.

    Attributes
    ----------
    path : Path
    manifest : Manifest
    rows : int
        Number of rows in the file.
    poisoned : bool
        Whether a sync failed.
    folder : None
    """

    folder: Folder | None = None

    def __init__(self, path: Path, writable: bool, lock: bool) -> None:
        self._file = open_file(path, os.O_RDWR if writable else os.O_RDONLY)
        self.path, self.poisoned = self._file.path, False
        try:
            if lock:
                _take_lock(self._file, writable, self.path)
            self.rows, stride, self._offset = _read_header(self._file)
            self.manifest = Manifest(self.rows, {"weight": stride})
            if writable:
                self._file.fill_holes()
        except BaseException:
            self._file.close()
            raise

    @property
    def file(self) -> File:
        """The file of the rows."""
        return self._file

    def map(self, rows: int, access: int) -> F32:
        """Map rows; `access` is that of `mmap`."""
        return self._file.map_rows(self._offset, rows, self.manifest.stride, access)

    def map_commit(self, access: int, as_is: bool, progress: Progress) -> F32:
        """Map the rows for a reader or a private copy."""
        return self.map(self.rows, access)

    def recover(self, salvage: bool, progress: Progress) -> F32:
        """Map the rows for a writer."""
        return self.map(self.rows, mmap.ACCESS_WRITE)

    def save_durability(self, durability: str) -> None:
        """Do nothing: there is no journal."""

    def load_id_map(self) -> NDArray[np.int64] | None:
        """Return None: there is no id map."""
        return None

    def require_held(self) -> None:
        """Do nothing: the file is held by its descriptor, and no other file belongs to it."""

    def require_at_path(self) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def poisoned_on_failure(self) -> Iterator[None]:
        """Poison the files if the block ends with an exception: it is half done."""
        try:
            yield
        except BaseException:
            self.poisoned = True
            raise

    def sync_rows(self) -> None:
        """Sync the rows. The first failure is final: a second try would prove nothing."""
        with self.poisoned_on_failure():
            self._file.sync()

    def save(self, state: Manifest) -> None:
        """Keep the manifest."""
        self.manifest = state

    def finish(self, state: Manifest) -> None:
        """Sync the rows, then save the manifest that describes them."""
        self.sync_rows()
        self.save(state)

    def remove_obsolete(self) -> None:
        """Do nothing: no other file belongs to it."""

    def close(self) -> None:
        """Close the file, and free its lock."""
        _free_lock(self._file)
        self._file.close()


class TableFolder(BareFile):
    """The folder of a table.

    Parameters
    ----------
    path : Path
    writable, lock : bool
        Whether files are opened for writing, and the table is locked.
    salvage : bool
        Whether rows may be taken as the file has them.

    Attributes
    ----------
    folder : Folder
    rows : int
        Number of rows in the file: in a dirty table, more than its manifest may say.
    """

    folder: Folder

    def __init__(self, path: Path, writable: bool, lock: bool, salvage: bool) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        with contextlib.ExitStack() as opened:
            self.folder = opened.enter_context(Folder(path))
            self.path, self.poisoned = self.folder.path, False
            self._lock = opened.enter_context(self.folder.open("lock", flags))
            if lock:
                _take_lock(self._lock, writable, self.path)
            self._file = opened.enter_context(self.folder.open("rows.npy", flags))
            if writable:
                self._require_own_rows()
            text = self.folder.read("manifest.json")
            self.manifest = manifest.decode(text, str(self.path / "manifest.json"))
            self._read_rows(salvage)
            if writable:
                self._file.fill_holes()
            self._opened = opened.pop_all()

    def _require_own_rows(self) -> None:
        """Refuse to write rows that are a link: they may be committed rows of another folder."""
        status = self.folder.stat("rows.npy")
        if stat.S_ISLNK(status.st_mode) or status.st_nlink > 1:
            raise TableError(
                errno.EMLINK,
                "rows.npy is a link, or has a second name, so a change would reach another folder "
                "too; copy the folder (cp -rL) and open the copy, or open it with mode='r' or 'c'",
                str(self.path),
            )

    def _read_rows(self, salvage: bool) -> None:
        """Compare the size of the rows with the manifest."""
        state, size = self.manifest, self._file.size
        recovers = state.state == "dirty" and not salvage
        if recovers or self._file.read_at(HEADER_BYTES, 0) == rows_header(state.rows, state.stride):
            # A power cut during recovery may have cut off rows that the header on the disk still
            # counts. The next recovery writes the header again.
            self.rows, stride, self._offset = state.rows, state.stride, HEADER_BYTES
        else:
            self.rows, stride, self._offset = _read_header(self._file)
        expected = HEADER_BYTES + 4 * state.rows * state.stride
        if state.state == "clean":
            sound = self.rows == state.rows and size == expected
        else:  # rows were appended, perhaps in part
            sound = self.rows >= state.rows and size >= HEADER_BYTES + 4 * self.rows * stride
        if not sound or (stride, self._offset) != (state.stride, HEADER_BYTES):
            raise FormatError(
                f"{self._file.path}: {size} bytes with a header of {self._offset} for "
                f"({self.rows}, {stride}); its manifest asks for {expected} with {HEADER_BYTES} "
                f"for ({state.rows}, {state.stride}): "
                "it was cut short, or is of another table; restore it from a copy"
            )

    def map_commit(self, access: int, as_is: bool, progress: Progress) -> F32:
        """Map the rows of the last commit for a reader or a private copy.

        Parameters
        ----------
        access : int
            That of `mmap`.
        as_is : bool
            Whether a dirty table is mapped as it is. Otherwise its last commit is a private copy.
        progress : function
            Shows the progress of a recovery.

        Raises
        ------
        DirtyError
            If the journal cannot bring the rows back.
        """
        if self.manifest.state == "clean" or as_is:
            return self.map(self.rows, access)
        replay = recovery.judge(self.folder, self.manifest, progress=progress)
        array = self.map(self.manifest.rows, mmap.ACCESS_COPY)
        recovery.put_back(array, replay, None, progress)
        return array

    def recover(self, salvage: bool, progress: Progress) -> F32:
        """Map the rows of the last commit for a writer, brought back in the file if need be.

        Parameters
        ----------
        salvage : bool
            Whether the rows of a dirty table are committed as they are.
        progress : function
            Shows the progress.

        Raises
        ------
        DirtyError
            If the journal cannot bring the rows back.
        """
        array = self.map(self.rows, mmap.ACCESS_WRITE)
        if self.manifest.state == "clean":
            return array
        if not salvage:
            replay = recovery.judge(self.folder, self.manifest, progress=progress)
            self.put_back(array, replay, progress)
            self.save_clean()
            return array
        self._file.truncate(HEADER_BYTES + 4 * self.rows * self.manifest.stride)
        number, commit = self.manifest.generation + 1, self._file.system.token()
        new = {"rows": self.rows, "seal": "", "generation": number, "commit": commit, **CLEAN}
        self.finish(self.manifest.with_changes(**new))
        return array

    def save_durability(self, durability: str) -> None:
        """Save another durability."""
        self.save(self.manifest.with_changes(durability=durability))

    def load_id_map(self) -> NDArray[np.int64] | None:
        """Map the id map, if the table has one."""
        return id_map.load(self.folder, self.manifest.rows)

    def require_held(self) -> None:
        """Refuse a change if the open files are no longer those of the folder.

        Raises
        ------
        TableError
            With errno ESTALE.
        """
        if not (self.folder.has(self._lock) and self.folder.has(self._file)):
            what = (
                "the folder was removed, or its files were replaced, while the table was open; "
                "nothing was written; close the table, restore the folder and open it again"
            )
            raise TableError(errno.ESTALE, what, str(self.path))

    def require_at_path(self) -> None:
        """Refuse a use of the path if it no longer leads to the folder.

        Raises
        ------
        TableError
            With errno ESTALE.
        """
        if not self.folder.is_at_path():
            what = "the folder was moved while the table was open; open it under its new name"
            raise TableError(errno.ESTALE, what, str(self.path))

    def save(self, state: Manifest) -> None:
        """Replace the manifest. A failure poisons the table, unless it passes and changed nothing.

        A full disk, too many open files, and too little memory are met before the rename.
        """
        try:
            self.folder.replace("manifest.json", [manifest.encode(state)])
        except BaseException as error:
            # The file may be the new one already, or not.
            passing = isinstance(error, OSError) and error.errno in PASSING
            self.poisoned = self.poisoned or not passing
            raise
        self.manifest = state

    def put_back(self, array: F32, replay: Replay, progress: Progress = recovery.silent) -> None:
        """Write the rows of a journal into the mapped file, cut appended ones off, and sync."""
        recovery.put_back(array, replay, self._file, progress)
        self.cut_to(self.manifest.rows)
        self.sync_rows()

    def save_clean(self) -> None:
        """Save that the rows are those of the last commit."""
        self.save(self.manifest.with_changes(**CLEAN))

    def cut_to(self, rows: int) -> None:
        """Set header and size of the file to a number of rows."""
        stride = self.manifest.stride
        self._file.write_at([rows_header(rows, stride)], 0)
        self._file.truncate(HEADER_BYTES + 4 * rows * stride)

    def grow(self, rows: int, count: int, chunks: Iterable[F32]) -> F32:
        """Append chunks of rows to the file: allocate, write, sync, map, then set the header.

        After an exception `cut_to` makes the file what it was.

        Returns
        -------
        float32 array of shape (rows + count, stride)
            The new mapping.

        Raises
        ------
        TableError
            If the disk has not enough space.
        """
        stride, at = self.manifest.stride, HEADER_BYTES + 4 * rows * self.manifest.stride
        self._file.allocate(at, 4 * count * stride)
        for chunk in chunks:
            at = self._file.write_at([chunk], at)
        self.sync_rows()  # this syncs earlier changes of rows as well
        array = self.map(rows + count, mmap.ACCESS_WRITE)
        self._file.write_at([rows_header(rows + count, stride)], 0)
        return array

    def remove_obsolete(self) -> None:
        """Remove files that a clean table does not need; errors are harmless and ignored."""
        seal = () if self.manifest.seal else (checksums.FILE,)
        for name in (*journal.FILES, *seal):
            with contextlib.suppress(OSError):
                self.folder.unlink(name)

    def close(self) -> None:
        """Close all files, and free the lock."""
        _free_lock(self._lock)
        self._opened.close()


def _take_lock(file: File, exclusive: bool, path: Path) -> None:
    try:
        file.system.lock(file.fd, exclusive)
    except BlockingIOError:
        if exclusive:
            what = "another process or handle has it open; close it first"
        else:
            what = "a writer has it open; close it first, or read it with live=True"
        raise LockedError(errno.EWOULDBLOCK, what, str(path)) from None
    _locked.add(file)


def _free_lock(file: File) -> None:
    if file in _locked and file.fd >= 0:
        file.system.unlock(file.fd)
    _locked.discard(file)


def _forget_locks() -> None:
    """Close the locks that a forked child inherited: they must not outlive the parent's table."""
    for file in list(_locked):
        file.close()
    _locked.clear()


_locked = weakref.WeakSet[File]()  # the files whose lock this process took
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _read_header(file: File) -> tuple[int, int, int]:
    return read_rows(file.read_at(HEAD_BYTES, 0), file.size, file.path)
