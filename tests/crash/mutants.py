"""Ways to break the protocol. A suite that does not notice them proves nothing.

Each is applied to a process that is thrown away, by name.
"""

from __future__ import annotations

import contextlib
import os
import stat
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pyembed.storage import change_log, create, fs, journal, recovery, store
from pyembed.storage.change_log import Changes
from pyembed.storage.dirty_rows import Touched
from pyembed.storage.journal import Journal, Replay
from pyembed.storage.store import CLEAN, Store


def rows_change_before_they_are_recorded() -> None:
    """What is recorded is right, but late: at the next change, or the commit."""
    waiting: list[Any] = []
    real_protect, real_record, real_commit = Store.protect, Journal.record, Store.commit

    def late(self: Journal, rows: np.ndarray, old: Any, threads: int = 1) -> None:
        waiting.append((self, rows, old[slice(0, rows.size)].copy()))

    def protect(self: Store, rows: np.ndarray) -> None:
        flush()
        real_protect(self, rows)

    def commit(self: Store, meta: Any) -> None:
        flush()
        real_commit(self, meta)

    def flush() -> None:
        while waiting:
            real_record(*waiting.pop(0))

    Journal.record, Store.protect, Store.commit = late, protect, commit  # type: ignore


def marked_before_recorded() -> None:
    real = Touched.new

    def new(self: Touched, rows: np.ndarray) -> np.ndarray:
        found = real(self, rows)
        self.mark(found)
        return found

    Touched.new = new  # type: ignore[method-assign]


def journal_not_synced() -> None:
    Journal.sync = lambda self: None  # type: ignore[method-assign]


def marked_ahead_before_synced() -> None:
    real = Store._record_asked

    def record(self: Store, interval: Any) -> None:
        sync, Journal.sync = Journal.sync, lambda self: None  # type: ignore
        try:
            real(self, interval)
        finally:
            Journal.sync = sync  # type: ignore[method-assign]

    Store._record_asked = record  # type: ignore[method-assign]


def marked_ahead_over_a_commit() -> None:
    """The helper marks late what it has recorded, be it in another interval."""
    real, late = Store._record_asked, list[np.ndarray]()

    def record(self: Store, interval: Any) -> None:
        mark, Touched.mark = Touched.mark, lambda self, rows: late.append(rows)  # type: ignore
        try:
            while late:
                mark(interval.touched, late.pop())
            real(self, interval)
        finally:
            Touched.mark = mark  # type: ignore[method-assign]

    Store._record_asked = record  # type: ignore[method-assign]


def manifest_before_the_rows() -> None:
    def finish(self: Store, state: Any) -> None:
        self._set(state)
        fs.sync(self._fd)
        self._salt = store.secrets.token_hex(8)

    Store._finish_interval = finish  # type: ignore[method-assign]


def rows_not_synced() -> None:
    def finish(self: Store, state: Any) -> None:
        self._set(state)
        self._salt = store.secrets.token_hex(8)

    Store._finish_interval = finish  # type: ignore[method-assign]


def salt_kept() -> None:
    store.secrets = types.SimpleNamespace(token_hex=lambda n: "00" * (n - 1) + "07")  # type: ignore


def marks_kept_over_a_commit() -> None:
    real, clear = Touched.commit, Touched.clear

    def commit(self: Touched, rows: int) -> None:
        Touched.clear = lambda self: None  # type: ignore[method-assign]
        real(self, rows)
        Touched.clear = clear  # type: ignore[method-assign]

    Touched.commit = commit  # type: ignore[method-assign]


def touched_hears_of_no_commit() -> None:
    Touched.commit = lambda self, rows: None  # type: ignore[method-assign]


def dirty_after_the_first_change() -> None:
    """The manifest says so at the second change of an interval."""
    real_set, real_protect = Store._set, Store.protect
    waiting: list[Any] = []

    def set_later(self: Store, state: Any) -> None:
        if state.state == "dirty":
            waiting.append(state)
            self.manifest = state
        else:
            waiting.clear()
            real_set(self, state)

    def protect(self: Store, rows: np.ndarray) -> None:
        if waiting:
            real_set(self, waiting.pop())
        real_protect(self, rows)

    Store._set, Store.protect = set_later, protect  # type: ignore[method-assign]


def undo_not_synced() -> None:
    real = Store._put_back

    def put_back(self: Store, replay: Replay) -> None:
        sync, store.sync = store.sync, lambda fd: None
        real(self, replay)
        store.sync = sync

    Store._put_back = put_back  # type: ignore[method-assign]


def undo_of_the_first_frame_only() -> None:
    real = Replay.__iter__

    def first(self: Replay) -> Iterator[Any]:
        found = list(real(self))
        yield from found[:1]

    Replay.__iter__ = first  # type: ignore[method-assign]


def clean_before_the_rows_are_back() -> None:
    real = Store._put_back

    def put_back(self: Store, replay: Replay) -> None:
        if self.mode == "r+":
            self._set(self.manifest.with_changes(**CLEAN))
        real(self, replay)

    Store._put_back = put_back  # type: ignore[method-assign]


def sums_not_compared() -> None:
    """A frame is taken for whole if its header is."""
    real = journal._crc

    def crc(data: Any) -> int:
        return real(data) if isinstance(data, bytes) else 0

    journal._crc = crc
    journal._crc_of_each = lambda data, size, threads: [0] * -(-len(data) // size)


def boot_not_compared() -> None:
    recovery.boot_id = lambda: "the same"


def manifest_written_in_place() -> None:
    def write(path: Any, parts: Any) -> None:
        fd = fs.os.open(path, fs.os.O_WRONLY | fs.os.O_CREAT | fs.os.O_TRUNC, 0o666)
        fs.write_all(fd, b"".join(parts))
        fs.sync(fd)
        fs.os.close(fd)

    store.replace_file = write


def manifest_not_synced() -> None:
    """Its folder is, so that the name is safe."""
    real = store.replace_file

    def write(path: Any, data: bytes) -> None:
        sync, fs.sync = fs.sync, lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode) and sync(fd)
        try:
            real(path, data)
        finally:
            fs.sync = sync

    store.replace_file = write


def folder_not_synced() -> None:
    fs.sync_folder = lambda path: None


def failed_sync_forgotten() -> None:
    Store._failed_sync = property(lambda self: False, lambda self, value: None)  # type: ignore
    Journal.failed_sync = property(lambda self: False, lambda self, value: None)  # type: ignore


def log_of_the_interval_before() -> None:
    real, last = Changes.append, list[Any]()

    def append(self: Changes, before: Any, after: Any, parts: Any) -> None:
        last.append(list(parts))
        real(self, before, after, last[-2] if len(last) > 1 else [])

    Changes.append = append  # type: ignore[method-assign]


def gap_in_the_log_ignored() -> None:
    change_log._chain = lambda records, last: list(records)


def copy_appears_in_parts() -> None:
    @contextlib.contextmanager
    def appearing(path: Any) -> Iterator[Any]:
        path.mkdir()
        yield path

    create.appearing = appearing


MUTANTS: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        rows_change_before_they_are_recorded,
        marked_before_recorded,
        journal_not_synced,
        marked_ahead_before_synced,
        marked_ahead_over_a_commit,
        manifest_before_the_rows,
        rows_not_synced,
        salt_kept,
        marks_kept_over_a_commit,
        touched_hears_of_no_commit,
        dirty_after_the_first_change,
        undo_not_synced,
        undo_of_the_first_frame_only,
        clean_before_the_rows_are_back,
        sums_not_compared,
        boot_not_compared,
        manifest_written_in_place,
        manifest_not_synced,
        folder_not_synced,
        failed_sync_forgotten,
        log_of_the_interval_before,
        gap_in_the_log_ignored,
        copy_appears_in_parts,
    )
}


def apply(name: str) -> None:
    """Break this process; "" breaks nothing. Frames are short, so that an interval has many."""
    journal.FRAME_BYTES = 600
    if name:
        MUTANTS[name]()
