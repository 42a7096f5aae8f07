"""Record the calls of a run, and build every state that a power cut may leave on a disk.

The model of a file: everything that a sync covered is there; any part of the later writes may be
there, in sectors of 512 bytes. The model of a folder: its names at the last sync, and any first
part of the later changes. Stores to mapped rows are found by a comparison of the file with its
earlier content, at every call; they count as writes. A sync that failed loses its data.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.crash.calls import CHANGE, Calls

SECTOR = 512
MODES = ("none", "all", "half", "torn")
Event = tuple[Any, ...]


class Node:
    """A file or a folder: its safe content, and the changes since."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.data = b""
        self.names: dict[str, Node] = {}
        self.pending: list[Event] = []

    def safe(self) -> None:
        """Make all changes durable."""
        for event in self.pending:
            self.change(event)
        self.pending = []

    def change(self, event: Event) -> None:
        self.data, self.names = changed(self.data, self.names, event)


def changed(data: bytes, names: dict[str, Node], event: Event) -> tuple[bytes, dict[str, Node]]:
    """Return the bytes of a file, or the names of a folder, after one change."""
    kind = event[0]
    if kind == "write":
        _, at, new = event
        data = data.ljust(at, b"\0")
        return data[:at] + new + data[at + len(new) :], names
    if kind == "size":
        return data[: event[1]].ljust(event[1], b"\0"), names
    if kind == "allocate":
        return data.ljust(event[1], b"\0"), names
    names = dict(names)
    if kind == "name":
        names[event[1]] = event[2]
    elif kind == "move":
        names[event[2]] = names.pop(event[1])
    else:
        names.pop(event[1], None)
    return data, names


def load(path: Path) -> Node:
    """Return a file or a folder as it is; all of it is safe."""
    node = Node(path.is_dir())
    if node.folder:
        node.names = {child.name: load(child) for child in path.iterdir()}
    else:
        node.data = path.read_bytes()
    return node


class Recorder(Calls):
    """Record what a run does to the files of one folder as a list of events; `Disk` replays them.

    An event is (kind, path, …), or ("say", word, number) for what the program announced.

    Parameters
    ----------
    root : Path
        The folder.
    fail_at : int
        The number of the sync that fails and loses its data.

    Attributes
    ----------
    events : list
    start : Node
        The folder before the first event.
    """

    def __init__(self, root: Path, fail_at: int = -1) -> None:
        super().__init__()
        self.root, self.fail_at, self.start = root, fail_at, load(root)
        self.events: list[Event] = []
        self._seen: dict[Path, bytes] = {}  # the content of each file of rows
        rows = root / "t.pyembed" / "rows.npy"
        if rows.exists():
            self._seen[rows] = rows.read_bytes()

    def say(self, word: str, number: int) -> None:
        if word != CHANGE:
            self.events.append(("say", word, number))
        super().say(word, number)

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        self._look()
        if number == self.fail_at and name == "sync":
            self.events.append(("lose", self.path_of(args[0])))
            raise OSError(5, "injected")
        is_new = name == "open" and not os.path.lexists(args[0])
        result = make()
        if name == "open":
            self._opened(result, args[1], is_new)
        elif name == "pwrite":
            self._wrote(self.path_of(args[0]), args[2], b"".join(args[1])[:result])
        elif name in ("truncate", "allocate"):
            kind = {"truncate": "size", "allocate": "allocate"}[name]
            self.events.append((kind, self.path_of(args[0]), sum(args[1:])))
            self._refresh(self.path_of(args[0]))
        elif name == "sync":
            self.events.append(("sync", self.path_of(args[0])))
        elif name == "rename":
            self._renamed(args[0], args[1])
        elif name in ("mkdir", "unlink", "rmdir"):
            self.events.append(("folder" if name == "mkdir" else "drop", args[0]))
        self._look()
        return result

    def _look(self) -> None:
        """Record the stores to mapped rows since the last call."""
        for path, seen in self._seen.items():
            if not path.exists():
                continue
            now = path.read_bytes()
            if now == seen:
                continue
            size = min(len(now), len(seen))
            old = np.frombuffer(seen[:size], np.uint8)
            new = np.frombuffer(now[:size], np.uint8)
            for sector in np.unique(np.flatnonzero(old != new) // SECTOR):
                at = int(sector) * SECTOR
                self.events.append(("write", path, at, now[at : at + SECTOR]))
            self._seen[path] = now

    def _refresh(self, path: Path) -> None:
        if path in self._seen:
            self._seen[path] = path.read_bytes()

    def _opened(self, fd: int, flags: int, is_new: bool) -> None:
        path = self.path_of(fd)
        if is_new and stat.S_ISREG(os.fstat(fd).st_mode):
            self.events.append(("name", path))
        if path.name == "rows.npy":
            self._seen.setdefault(path, path.read_bytes())
        if flags & os.O_TRUNC:
            self.events.append(("size", path, 0))

    def _wrote(self, path: Path, at: int, data: bytes) -> None:
        self.events.append(("write", path, at, data))
        self._refresh(path)

    def _renamed(self, old: Path, new: Path) -> None:
        self.events.append(("move", old, new))
        for path in [path for path in self._seen if path.is_relative_to(old)]:
            self._seen[new / path.relative_to(old)] = self._seen.pop(path)


class Disk:
    """Replay the events of a recorder, and build the states that a power cut may leave."""

    def __init__(self, recorder: Recorder) -> None:
        self.top = recorder.start
        self.said: list[tuple[str, int]] = []
        self._now: dict[Path, Node] = {}
        self._index(recorder.root, recorder.start)

    def _index(self, path: Path, node: Node) -> None:
        self._now[path] = node
        for name, child in node.names.items():
            self._index(path / name, child)

    def apply(self, event: Event) -> None:
        """Take the next event."""
        kind, path = event[0], event[1]
        if kind == "say":
            self.said.append((event[1], event[2]))
        elif kind == "sync":
            self._now[path].safe()
        elif kind == "lose":
            self._now[path].pending = [e for e in self._now[path].pending if self._now[path].folder]
        elif kind in ("name", "folder"):
            self._now[path] = Node(kind == "folder")
            self._parent(path).append(("name", path.name, self._now[path]))
        elif kind == "move":
            new = event[2]
            self._parent(path).append(("move", path.name, new.name))
            for old in [old for old in self._now if old.is_relative_to(path)]:
                self._now[new / old.relative_to(path)] = self._now.pop(old)
        elif kind == "drop":
            self._parent(path).append(("drop", path.name))
            del self._now[path]
        else:
            self._now[path].pending.append((kind, *event[2:]))

    def _parent(self, path: Path) -> list[Event]:
        return self._now[path.parent].pending

    def build(self, target: Path, mode: str, rng: np.random.Generator) -> None:
        """Write one possible state to a folder that does not exist."""
        self._build(self.top, target, mode, rng)

    def _build(self, node: Node, target: Path, mode: str, rng: np.random.Generator) -> None:
        data, names = node.data, node.names
        if node.folder:
            kept = {"none": 0, "all": len(node.pending)}.get(mode)
            if kept is None:
                kept = int(rng.integers(len(node.pending) + 1))
            for event in node.pending[:kept]:
                data, names = changed(data, names, event)
            target.mkdir()
            for name, child in names.items():
                self._build(child, target / name, mode, rng)
            return
        if mode != "none":
            for event in node.pending:
                for part in [event] if mode == "all" else parts(event, data, mode, rng):
                    data, _ = changed(data, names, part)
        with target.open("wb") as file:
            file.write(data)


def parts(event: Event, data: bytes, mode: str, rng: np.random.Generator) -> list[Event]:
    """Draw the parts of a change that are there: sectors of a write, perhaps torn at a byte."""
    if event[0] != "write":
        return [event] if rng.integers(2) else []
    _, at, new = event
    found = []
    start = at
    while start < at + len(new):
        end = min((start // SECTOR + 1) * SECTOR, at + len(new))
        if rng.integers(2):
            first, last = start, end
            if mode == "torn" and rng.integers(2):
                cut = int(rng.integers(start, end + 1))
                first, last = (start, cut) if rng.integers(2) else (cut, end)
            if last > first:
                found.append(("write", first, new[first - at : last - at]))
        start = end
    return found
