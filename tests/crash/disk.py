"""What a disk may hold after a power cut: a run's calls written down, and any cut of them built.

The model. Of a file: what a sync that returned had seen is there; of everything since, any part
may be there, in sectors of 512 bytes. Of a folder: its names as of its last sync, and any first
part of the changes since. Stores to mapped rows are found by comparing the file with what was last
seen, at every call; they count as writes. A sync that failed loses what it should have saved.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.crash.calls import Calls

SECTOR = 512
MODES = ("none", "all", "half", "torn")
Event = tuple[Any, ...]


class Node:
    """A file or a folder: what is safe, and what was done since."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder
        self.data = b""
        self.names: dict[str, Node] = {}
        self.pending: list[Event] = []

    def safe(self) -> None:
        for event in self.pending:
            self.change(event)
        self.pending = []

    def change(self, event: Event) -> None:
        self.data, self.names = changed(self.data, self.names, event)


def changed(data: bytes, names: dict[str, Node], event: Event) -> tuple[bytes, dict[str, Node]]:
    """A file's bytes, or a folder's names, after one change."""
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
    """What lies there, as safe."""
    node = Node(path.is_dir())
    if node.folder:
        node.names = {child.name: load(child) for child in path.iterdir()}
    else:
        node.data = path.read_bytes()
    return node


class Recorder(Calls):
    """Writes down a run under one folder as a list of events; `Disk` replays them.

    An event is (kind, number of the node, …); numbers are given in the order of appearance, so that
    the list can be replayed onto any copy of what was there first.
    """

    def __init__(self, root: Path, fail_at: int = -1) -> None:
        super().__init__()
        self.root, self.fail_at = root, fail_at
        self.events: list[Event] = []
        self._fds: dict[int, Path] = {}
        self._seen: dict[Path, bytes] = {}
        if (root / "t.pyembed").exists():
            rows = root / "t.pyembed" / "rows.npy"
            self._seen[rows] = rows.read_bytes()

    def say(self, word: str, number: int) -> None:
        self.events.append(("say", word, number))

    def act(self, number: int, name: str, make: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        self._look()
        if number == self.fail_at and name == "fsync":
            self.events.append(("lose", self._fds[args[0]]))
            raise OSError(5, "injected")
        before = os.path.lexists(args[0]) if name == "open" else False
        at = os.lseek(args[0], 0, os.SEEK_CUR) if name == "write" else 0
        result = make()
        note = getattr(self, "_" + name, None)
        if note is not None:
            note(result, args, at, before)
        self._look()
        return result

    def _look(self) -> None:
        """Find what the kernels stored into the mapped rows."""
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

    def _open(self, fd: int, args: tuple[Any, ...], at: int, before: bool) -> None:
        path = Path(args[0])
        self._fds[fd] = path
        if not before and stat.S_ISREG(os.fstat(fd).st_mode):
            self.events.append(("name", path))
        if path.name == "rows.npy":
            self._seen.setdefault(path, path.read_bytes())
        if args[1] & os.O_TRUNC:
            self.events.append(("size", path, 0))

    def _wrote(self, fd: int, at: int, data: bytes, count: int) -> None:
        path = self._fds[fd]
        self.events.append(("write", path, at, data[:count]))
        self._refresh(path)

    def _write(self, count: int, args: tuple[Any, ...], at: int, before: bool) -> None:
        self._wrote(args[0], at, bytes(args[1]), count)

    def _pwrite(self, count: int, args: tuple[Any, ...], at: int, before: bool) -> None:
        self._wrote(args[0], args[2], bytes(args[1]), count)

    def _pwritev(self, count: int, args: tuple[Any, ...], at: int, before: bool) -> None:
        self._wrote(args[0], args[2], b"".join(bytes(part) for part in args[1]), count)

    def _ftruncate(self, _: Any, args: tuple[Any, ...], at: int, before: bool) -> None:
        self.events.append(("size", self._fds[args[0]], args[1]))
        self._refresh(self._fds[args[0]])

    def _posix_fallocate(self, _: Any, args: tuple[Any, ...], at: int, before: bool) -> None:
        self.events.append(("allocate", self._fds[args[0]], args[1] + args[2]))
        self._refresh(self._fds[args[0]])

    def _fsync(self, _: Any, args: tuple[Any, ...], at: int, before: bool) -> None:
        self.events.append(("sync", self._fds[args[0]]))

    def _mkdir(self, _: Any, args: tuple[Any, ...], at: int, before: bool) -> None:
        self.events.append(("folder", Path(args[0])))

    def _replace(self, _: Any, args: tuple[Any, ...], at: int, before: bool) -> None:
        old, new = Path(args[0]), Path(args[1])
        self.events.append(("move", old, new))
        moved = [path for path in self._seen if path.is_relative_to(old)]
        for path in moved:
            self._seen[new / path.relative_to(old)] = self._seen.pop(path)

    _rename = _replace

    def _unlink(self, _: Any, args: tuple[Any, ...], at: int, before: bool) -> None:
        if Path(args[0]).is_absolute():  # not of a folder that is thrown away whole
            self.events.append(("drop", Path(args[0])))


class Disk:
    """The events, one after the other, and what may be there if the power goes now."""

    def __init__(self, root: Path, start: Node) -> None:
        self.root, self.top = root, start
        self.said: list[tuple[str, int]] = []
        self._now: dict[Path, Node] = {}
        self._index(root, start)

    def _index(self, path: Path, node: Node) -> None:
        self._now[path] = node
        for name, child in node.names.items():
            self._index(path / name, child)

    def apply(self, event: Event) -> None:
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
        """Make what may be there."""
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
    """What of one change is there: each sector of a write or not, or torn at some byte."""
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
