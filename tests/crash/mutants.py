"""Ways to break the protocol. A suite that does not notice them proves nothing.

Most mutants are layers over the file system. `installed` puts them above the layer that numbers or
records the calls, so a sync that a mutant leaves out is no call of the run. The others replace a
part of a writer, through the attributes that `JournaledTransaction` has for that.
"""

from __future__ import annotations

import contextlib
import mmap
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pyembed import _core
from pyembed.storage import fs, journal, manifest
from pyembed.storage.change_log import ChangedRows, ChangeLog
from pyembed.storage.dirty_rows import I64, DirtyRows
from pyembed.storage.journal import FIELDS, MAGIC, UNIT
from pyembed.storage.transaction import JournaledTransaction
from tests.crash.calls import Layer

TEMPORARY = "manifest.json.new"
CREATING = ".creating-"  # in the name of a table that is not complete yet
FRAME_BYTES = 600  # short, so that a transaction has many frames


def is_manifest(path: Path) -> bool:
    """Whether this is the new manifest of a table that is complete, before it has its name."""
    return path.name == TEMPORARY and CREATING not in path.parent.name


class Mutant(Layer):
    """A layer that knows the files of a table apart."""

    def is_rows(self, fd: int) -> bool:
        """Whether these are the rows of a table that is complete."""
        path = self.path_of(fd)
        return path.name == "rows.npy" and CREATING not in path.parent.name

    def is_journal(self, fd: int) -> bool:
        return self.path_of(fd).name.startswith("undo")

    def is_folder(self, fd: int) -> bool:
        return stat.S_ISDIR(self.below.stat(fd).st_mode)


class RowsChangeBeforeTheyAreRecorded(Mutant):
    """The last frame that is recorded for a change reaches the file at the next change."""

    def __init__(self, below: fs.FileSystem) -> None:
        super().__init__(below)
        self._late: list[tuple[int, bytes, int]] = []

    def _write_late(self) -> None:
        while self._late:
            fd, data, at = self._late.pop()
            fs.File(self.below, fd, self.path_of(fd)).write_at([data], at)

    def pwrite(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        if not self.is_journal(fd):
            return self.below.pwrite(fd, parts, at)
        self._write_late()
        if at == 0:  # the first frame has no rows
            return self.below.pwrite(fd, parts, at)
        self._late.append((fd, b"".join(parts), at))
        return sum(map(len, parts))

    def open(self, path: Path, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        if path.name == TEMPORARY:  # a commit
            self._write_late()
        return super().open(path, flags, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        self._late = [late for late in self._late if late[0] != fd]
        super().close(fd)


class Unsynced(Mutant):
    """Leave out the syncs of some files."""

    def leaves_out(self, fd: int) -> bool:
        raise NotImplementedError

    def sync(self, fd: int) -> None:
        if not self.leaves_out(fd):
            self.below.sync(fd)


class JournalNotSynced(Unsynced):
    leaves_out = Mutant.is_journal


class RowsNotSynced(Unsynced):
    leaves_out = Mutant.is_rows


class FolderNotSynced(Unsynced):
    leaves_out = Mutant.is_folder


class ManifestNotSynced(Unsynced):
    """The folder of the manifest is synced, so its name is durable and its content is not."""

    def leaves_out(self, fd: int) -> bool:
        return is_manifest(self.path_of(fd))


class HelperKnown(Mutant):
    """A layer that knows when a task of the helper runs."""

    in_helper = False

    def helper(self, name: str, num_threads: int) -> fs.Helper:
        return Announcing(self.below.helper(name, num_threads), self)


class Announcing:
    """An executor that tells a layer when a task runs."""

    def __init__(self, executor: fs.Helper, layer: HelperKnown) -> None:
        self._executor, self._layer = executor, layer
        self.shutdown = executor.shutdown

    def submit(self, task: Callable[..., Any], /, *args: Any) -> Any:
        def run() -> Any:
            type(self._layer).in_helper = True
            try:
                return task(*args)
            finally:
                type(self._layer).in_helper = False

        return self._executor.submit(run)


class MarkedAheadBeforeSynced(HelperKnown, Unsynced):
    """The helper does not sync the frames that it writes ahead."""

    def leaves_out(self, fd: int) -> bool:
        return self.in_helper and self.is_journal(fd)


class MarkedAheadOverACommit(HelperKnown):
    """The helper marks the rows of a task at its next one, which may be of another transaction."""


class ManifestBeforeTheRows(Mutant):
    """Rows are synced after the manifest that commits them has its name."""

    def __init__(self, below: fs.FileSystem) -> None:
        super().__init__(below)
        self._owed: set[int] = set()

    def sync(self, fd: int) -> None:
        if self.is_rows(fd):
            self._owed.add(fd)
            return
        self.below.sync(fd)
        while self._owed and self.is_folder(fd):
            self.below.sync(self._owed.pop())

    def close(self, fd: int) -> None:
        self._owed.discard(fd)
        super().close(fd)


class SaltKept(Mutant):
    """Every transaction has the same salt."""

    def token(self) -> str:
        return "0000000000000007"


class DirtyAfterTheFirstChange(Mutant):
    """The manifest says "dirty" at the second change of a transaction."""

    def __init__(self, below: fs.FileSystem) -> None:
        super().__init__(below)
        self._held: Any = None  # the arguments of a rename, and the rows at that time

    def rename(self, source: Path, target: Path, *, dir_fd: int) -> None:
        if source.name == TEMPORARY and b'"dirty"' in source.read_bytes():
            rows = target.with_name("rows.npy")
            self._held = (source, target, dir_fd, rows, rows.read_bytes())
            return
        self._held = None
        super().rename(source, target, dir_fd=dir_fd)

    def pwrite(self, fd: int, parts: Sequence[memoryview], at: int) -> int:
        if self._held and self.is_journal(fd):
            source, target, folder, rows, before = self._held
            if rows.read_bytes() != before:
                self._held = None
                super().rename(source, target, dir_fd=folder)
                self.below.sync(folder)
        return self.below.pwrite(fd, parts, at)


class UndoNotSynced(Unsynced):
    """Rows that a recovery or a rollback put back are not synced; it cuts the file just before."""

    _undone = False

    def truncate(self, fd: int, size: int) -> None:
        self.below.truncate(fd, size)
        self._undone = self._undone or self.is_rows(fd)

    def leaves_out(self, fd: int) -> bool:
        leaves_out = self._undone and self.is_rows(fd)
        self._undone = self._undone and not leaves_out
        return leaves_out


class UndoOfTheFirstFrameOnly(Mutant):
    """A journal that is read ends behind the first frame that has rows."""

    def __init__(self, below: fs.FileSystem) -> None:
        super().__init__(below)
        self._starts: list[int] = []  # of frames, as far as they were read

    def pread(self, fd: int, buffer: memoryview, at: int) -> int:
        if self.is_journal(fd):
            if at == 0:
                self._starts = []
            if len(buffer) == UNIT:
                self._starts.append(at)
            if len(self._starts) > 2 and at >= self._starts[2]:
                return 0
        return self.below.pread(fd, buffer, at)


class CleanBeforeTheRowsAreBack(Mutant):
    """A recovery writes the clean manifest when it maps the rows."""

    def __init__(self, below: fs.FileSystem) -> None:
        super().__init__(below)
        self._mapped: set[int] = set()  # rows; a table that is open is mapped again as it grows

    def map(self, fd: int, size: int, access: int) -> mmap.mmap:
        if self.is_rows(fd) and access == mmap.ACCESS_WRITE and fd not in self._mapped:
            self._mapped.add(fd)
            path = self.path_of(fd).with_name("manifest.json")
            state = manifest.decode(path.read_bytes(), str(path))
            if state.state == "dirty":
                clean = state.with_changes(state="clean", salt="", boot="")
                with fs.Folder(path.parent, self) as folder:
                    folder.replace(path.name, [manifest.encode(clean)])
        return self.below.map(fd, size, access)

    def close(self, fd: int) -> None:
        self._mapped.discard(fd)
        super().close(fd)


class SumsNotCompared(Mutant):
    """The checksums of a frame that is read are right whatever its payload is."""

    def pread(self, fd: int, buffer: memoryview, at: int) -> int:
        count = self.below.pread(fd, buffer, at)
        if self.is_journal(fd) and count == len(buffer) == UNIT and buffer[:8] == MAGIC:
            body = bytes(buffer[: FIELDS.size])
            if _core.crc32c(body) == int.from_bytes(buffer[FIELDS.size :], "little"):
                buffer[:] = self._forged(fd, FIELDS.unpack(body), at)
        return count

    def _forged(self, fd: int, fields: tuple[Any, ...], at: int) -> bytes:
        *same, n, stride, _, _ = fields
        file, payload = fs.File(self.below, fd, self.path_of(fd)), at + UNIT
        rows = file.read_at(8 * n, payload)
        old = file.read_at(4 * n * stride, payload + 8 * n)
        body = FIELDS.pack(*same, n, stride, _core.crc32c(rows), _core.crc32c(old))
        return body + _core.crc32c(body).to_bytes(4, "little")


class BootNotCompared(Mutant):
    def boot_id(self) -> str:
        return "the same"


class ManifestWrittenInPlace(Mutant):
    def open(self, path: Path, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        if is_manifest(path):
            path = path.with_name("manifest.json")
        return super().open(path, flags, mode, dir_fd=dir_fd)

    def rename(self, source: Path, target: Path, *, dir_fd: int) -> None:
        if not is_manifest(source):
            super().rename(source, target, dir_fd=dir_fd)


class FailedSyncForgotten(Mutant):
    """A sync that failed is tried again, and succeeds, but the data is lost."""

    def sync(self, fd: int) -> None:
        try:
            self.below.sync(fd)
        except OSError:
            self.below.sync(fd)


class CopyAppearsInParts(Mutant):
    """A new table is written under its own name."""

    @staticmethod
    def _final(path: Path) -> Path:
        return Path(*(part.partition(CREATING)[0] for part in path.parts))

    def open(self, path: Path, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        return super().open(self._final(path), flags, mode, dir_fd=dir_fd)

    def mkdir(self, path: Path, *, dir_fd: int) -> None:
        self.below.mkdir(self._final(path), dir_fd=dir_fd)

    def rmdir(self, path: Path, *, dir_fd: int) -> None:
        self.below.rmdir(self._final(path), dir_fd=dir_fd)

    def rename(self, source: Path, target: Path, *, dir_fd: int) -> None:
        if self._final(source) != self._final(target):
            super().rename(self._final(source), self._final(target), dir_fd=dir_fd)


# --- parts of a writer ----------------------------------------------------------------------------


class MarkedBeforeRecorded(DirtyRows):
    def new(self, rows: I64) -> I64:
        found = super().new(rows)
        self.mark(found)
        return found


class LateMarks(DirtyRows):
    late: ClassVar[list[I64]] = []

    def mark(self, rows: I64) -> None:
        if MarkedAheadOverACommit.in_helper:
            self.late.append(rows)
        else:
            super().mark(rows)

    def new(self, rows: I64) -> I64:
        while MarkedAheadOverACommit.in_helper and self.late:
            super().mark(self.late.pop())
        return super().new(rows)


class MarksKeptOverACommit(DirtyRows):
    _in_commit = False

    def commit(self, rows: int) -> None:
        self._in_commit = True
        super().commit(rows)
        self._in_commit = False

    def clear(self) -> None:
        if not self._in_commit:
            super().clear()


class CommitNotHeard(DirtyRows):
    def commit(self, rows: int) -> None:
        pass


class LogOfTheTransactionBefore(ChangeLog):
    last: ClassVar[list[Any]] = []

    def append(self, before: Any, after: Any, parts: Any) -> None:
        self.last.append(list(parts))
        super().append(before, after, self.last[-2] if len(self.last) > 1 else [])


class GapInTheLogIgnored(ChangeLog):
    @staticmethod
    def chain(records: Any, last: Any) -> Any:
        return list(records)


class UnchainedRows(ChangedRows):
    chain = staticmethod(GapInTheLogIgnored.chain)


@dataclass(frozen=True)
class Broken:
    """The parts that a mutant replaces; those of the library by default."""

    layer: type[Layer] = Layer
    dirty_rows: type[DirtyRows] = DirtyRows
    change_log: type[ChangeLog] = ChangeLog
    changed_rows: type[ChangedRows] = ChangedRows


MUTANTS = {
    "": Broken(),
    "rows change before they are recorded": Broken(RowsChangeBeforeTheyAreRecorded),
    "marked before recorded": Broken(dirty_rows=MarkedBeforeRecorded),
    "journal not synced": Broken(JournalNotSynced),
    "marked ahead before synced": Broken(MarkedAheadBeforeSynced),
    "marked ahead over a commit": Broken(MarkedAheadOverACommit, LateMarks),
    "manifest before the rows": Broken(ManifestBeforeTheRows),
    "rows not synced": Broken(RowsNotSynced),
    "salt kept": Broken(SaltKept),
    "marks kept over a commit": Broken(dirty_rows=MarksKeptOverACommit),
    "dirty rows hear of no commit": Broken(dirty_rows=CommitNotHeard),
    "dirty after the first change": Broken(DirtyAfterTheFirstChange),
    "undo not synced": Broken(UndoNotSynced),
    "undo of the first frame only": Broken(UndoOfTheFirstFrameOnly),
    "clean before the rows are back": Broken(CleanBeforeTheRowsAreBack),
    "sums not compared": Broken(SumsNotCompared),
    "boot not compared": Broken(BootNotCompared),
    "manifest written in place": Broken(ManifestWrittenInPlace),
    "manifest not synced": Broken(ManifestNotSynced),
    "folder not synced": Broken(FolderNotSynced),
    "failed sync forgotten": Broken(FailedSyncForgotten),
    "log of the transaction before": Broken(change_log=LogOfTheTransactionBefore),
    "gap in the log ignored": Broken(change_log=GapInTheLogIgnored, changed_rows=UnchainedRows),
    "copy appears in parts": Broken(CopyAppearsInParts),
}


@contextlib.contextmanager
def installed(mutant: str, system: fs.FileSystem | None = None) -> Iterator[Broken]:
    """Run a block with a mutant, or with short frames alone if the name is empty.

    Parameters
    ----------
    mutant : str
    system : FileSystem, optional
        The file system below the mutant.
    """
    broken = MUTANTS[mutant]
    journal.FRAME_BYTES = FRAME_BYTES
    parts = {"dirty_rows_type": broken.dirty_rows, "change_log_type": broken.change_log}
    before = {name: getattr(JournaledTransaction, name) for name in parts}
    for name, part in parts.items():
        setattr(JournaledTransaction, name, part)
    try:
        with fs.using(broken.layer(system)):
            yield broken
    finally:
        for name, part in before.items():
            setattr(JournaledTransaction, name, part)
