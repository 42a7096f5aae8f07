"""Write a new file past the page cache, while the next bytes are made.

Through the page cache a new table would be copied once more, would evict the pages of other
programs, and would stall at the system's limit of dirty pages. Where the file system has no
O_DIRECT, the same pieces are written through the page cache.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from typing import Any

from pyembed._threads import startable
from pyembed.storage.checksums import block_sums
from pyembed.storage.fs import File, Folder

PIECE_BYTES = 8 << 20  # per write
WRITERS = 2  # threads: 1 leaves the disk waiting, 4 gain nothing


class DirectWriter:
    """Writes a file from its start; a context manager that ends with the last byte written.

    Parameters
    ----------
    folder : Folder
    file : File
        A file of the folder that is open for writing, and empty.

    Attributes
    ----------
    sums : list of int
        The `block_sums` of the whole file, once the block has ended.
    """

    def __init__(self, folder: Folder, file: File) -> None:
        self._file, self._direct = file, _open_direct(folder, file)
        writers = startable(WRITERS + 1) - 1
        self._helper = file.system.helper("pyembed-write", writers) if writers else None
        self._piece = mmap.mmap(-1, PIECE_BYTES)  # being filled; page-aligned, as O_DIRECT wants
        self._free = [mmap.mmap(-1, PIECE_BYTES) for _ in range(WRITERS)]
        self._writing: deque[tuple[Any, mmap.mmap]] = deque()  # futures and their pieces
        self.sums: list[int] = []
        self._at = self._filled = 0  # where the piece begins in the file, and how full it is

    def write(self, data: Any) -> None:
        """Append bytes; the buffer may be reused at once."""
        view = memoryview(data).cast("B")
        while view:
            take = min(len(view), PIECE_BYTES - self._filled)
            self._piece[self._filled : self._filled + take] = view[:take]
            self._filled += take
            view = view[take:]
            if self._filled == PIECE_BYTES:
                self._send()

    def _send(self) -> None:
        if self._helper is None:  # the system allows no more threads
            self.sums += _put(self._direct, memoryview(self._piece), self._at)
            self._at, self._filled = self._at + PIECE_BYTES, 0
            return
        task = self._helper.submit(_put, self._direct, memoryview(self._piece), self._at)
        self._writing.append((task, self._piece))
        self._at, self._filled = self._at + PIECE_BYTES, 0
        if not self._free:
            task, piece = self._writing.popleft()
            self.sums += task.result()
            self._free.append(piece)
        self._piece = self._free.pop()

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._helper is not None:
            self._helper.shutdown()  # waits
        try:
            if kind is None:
                for task, _ in self._writing:
                    self.sums += task.result()
                # The last piece is not a multiple of a block, so it goes through the page cache.
                self.sums += _put(self._file, memoryview(self._piece)[: self._filled], self._at)
        finally:
            self._direct.close()


def _open_direct(folder: Folder, file: File) -> File:
    try:
        return folder.open(file.path.name, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return File(file.system, file.system.duplicate(file.fd), file.path)


def _put(file: File, view: memoryview, at: int) -> list[int]:
    file.write_at([view], at)
    return block_sums(view, at)
