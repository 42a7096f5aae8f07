"""The committed state of a table as text: manifest.json, and delta.json of an export.

This module knows the bytes and does no I/O; `table_files` reads and atomically replaces them.
A manifest is JSON that a person can read. The last entry is the CRC-32C of the others in
canonical form. Anything unexpected (another version, an unknown key, a wrong type, a product that
overflows) is refused with a FormatError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyembed import _core
from pyembed.errors import ArgumentError, FormatError

FORMAT = "pyembed-table"
DELTA_FORMAT = "pyembed-delta"
VERSION = 1
MAX_ROWS = 2**40
MAX_DIM = 65536
MAX_BYTES = 1 << 20  # bytes of the text, which is written at every commit
DURABILITIES = ("process", "power", "none")
SALT = re.compile(r"([0-9a-f]{16})?")
SUM = re.compile(r"([0-9a-f]{8})?")
COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """One committed state.

    Attributes
    ----------
    rows : int
    columns : dict of str to int
        Consecutive groups of float32 within a row, and their widths. The first is ``weight``.
    generation : int
        Number of commits.
    state : {"clean", "dirty"}
        Dirty: a writer has changed rows since this generation.
    durability : {"process", "power", "none"}
        What the last commit survives: see `transaction`.
    salt : str
        16 hex digits, drawn anew for each transaction, that mark the frames of its journal. Empty
        if the table is clean.
    boot : str
        The start of the machine in which a dirty table was changed; empty if it is clean.
    commit : str
        16 hex digits, drawn anew for every commit: two tables with the same one are copies of each
        other. A copy that was brought forward by an export has that of its source.
    seal : str
        8 hex digits, the CRC-32C of the checksums of the committed rows, see `checksums`; empty if
        there are none, because rows changed since the table was written.
    meta : dict
        The state of the user, from `Table.commit`.
    optimizer : dict of str to dict
        The steps that each optimizer has taken, by its rule: ``{"adam": {"steps": 9}}``.
    """

    rows: int
    columns: dict[str, int]
    generation: int = 0
    state: str = "clean"
    durability: str = "none"
    salt: str = ""
    boot: str = ""
    commit: str = ""
    seal: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def stride(self) -> int:
        """Floats of a row, over all columns."""
        return sum(self.columns.values())

    def with_changes(self, **changes: Any) -> Manifest:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Delta:
    """The description of a delta: an export of the rows that changed between two commits.

    Attributes
    ----------
    since : int
        The generation that it starts from.
    count : int
        Number of rows that may differ.
    seal : str
        The CRC-32C of the checksums of these rows, see `Manifest`.
    table : Manifest
        The commit that it leads to.
    """

    since: int
    count: int
    seal: str
    table: Manifest


def check_columns(columns: Mapping[str, int]) -> dict[str, int]:
    """Check names and widths of columns, ``weight`` first.

    Raises
    ------
    ArgumentError
        Naming the column that is not allowed.
    """
    for name, width in columns.items():
        if not isinstance(name, str) or not COLUMN_NAME.fullmatch(name):
            allowed = "letters, digits and _, at most 64, no digit first"
            raise ArgumentError(f"column name {name!r}; allowed: {allowed}")
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= MAX_DIM:
            raise ArgumentError(f"column {name!r} has width {width!r}; allowed: 1..{MAX_DIM}")
    if next(iter(columns), None) != "weight":
        raise ArgumentError(f"columns {list(columns)}; the first must be 'weight'")
    return dict(columns)


def check_durability(value: object) -> str:
    """Check a durability, and return it.

    Raises
    ------
    ArgumentError
    """
    if value not in DURABILITIES:
        raise ArgumentError(f"durability = {value!r}; allowed: {', '.join(DURABILITIES)}")
    return str(value)


def encode(manifest: Manifest) -> bytes:
    """Return the text of a manifest.

    Raises
    ------
    ArgumentError
        If the meta of the user is not JSON, or too large.
    """
    try:
        if type(manifest.meta) is not dict:
            raise ValueError(f"it is a {type(manifest.meta).__name__}")
        text = _text({"format": FORMAT, "version": VERSION, **vars(manifest)})
        if json.loads(text)["meta"] != manifest.meta:
            raise ValueError("keys must be strings, and tuples would come back as lists")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"meta cannot be stored: {error}; allowed: a dict of plain JSON"
        ) from None
    if len(text) > MAX_BYTES:
        raise ArgumentError(
            f"meta makes a manifest of {len(text)} bytes; allowed: {MAX_BYTES}; "
            "store large state in a file and its name in meta"
        )
    return text


def decode(text: bytes, source: str) -> Manifest:
    """Read and validate a manifest.

    Raises
    ------
    FormatError
        Naming `source` and what is wrong.
    """
    body = _body(text, source, FORMAT)
    try:
        manifest = Manifest(**body)
        _validate(manifest)
    except (TypeError, ArgumentError) as error:
        raise FormatError(f"{source}: {error}") from None
    return manifest


def encode_delta(delta: Delta) -> bytes:
    """Return the text of ``delta.json``."""
    body = {**vars(delta), "table": vars(delta.table)}
    return _text({"format": DELTA_FORMAT, "version": VERSION, **body})


def decode_delta(text: bytes, source: str) -> Delta:
    """Read and validate a ``delta.json``.

    Raises
    ------
    FormatError
        Naming `source` and what is wrong.
    """
    body = _body(text, source, DELTA_FORMAT)
    try:
        delta = Delta(**{**body, "table": Manifest(**body["table"])})
        _validate(delta.table)
        if type(delta.count) is not int or not 0 <= delta.count <= delta.table.rows:
            raise ArgumentError(f"count {delta.count!r} is not a number of its table's rows")
        if type(delta.since) is not int or not 0 <= delta.since <= delta.table.generation:
            raise ArgumentError(f"since {delta.since!r} is no generation of its table")
    except (TypeError, KeyError, ArgumentError) as error:
        raise FormatError(f"{source}: {error}") from None
    return delta


def _text(body: dict[str, Any]) -> bytes:
    body = {**body, "crc32c": _checksum(body)}
    return json.dumps(body, indent=2, allow_nan=False).encode() + b"\n"


def _body(text: bytes, source: str, kind: str) -> dict[str, Any]:
    try:
        body = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not JSON ({error}); restore it from a copy") from None
    if not isinstance(body, dict) or body.get("format") != kind:
        raise FormatError(f"{source}: not a {kind.replace('-', ' ')}")
    if body.get("version") != VERSION:
        raise FormatError(
            f"{source}: version {body.get('version')!r}; this pyembed reads version {VERSION}"
        )
    found = body.pop("crc32c", None)
    if found != _checksum(body):
        raise FormatError(f"{source}: the checksum does not match; restore it from a copy")
    del body["format"], body["version"]
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _validate(m: Manifest) -> None:
    """Check that fields make sense; the checksum has proved that they are as written."""
    kinds = {"rows": int, "generation": int, "columns": dict, "meta": dict, "optimizer": dict}
    for name, kind in kinds.items():
        if type(getattr(m, name)) is not kind:
            raise ArgumentError(f"{name} is not of type {kind.__name__}")
    if not 0 <= m.rows <= MAX_ROWS or m.generation < 0:
        raise ArgumentError(f"rows {m.rows} or generation {m.generation} out of range")
    if m.state not in ("clean", "dirty"):
        raise ArgumentError(f"state {m.state!r} is unknown")
    check_durability(m.durability)
    if type(m.salt) is not str or not SALT.fullmatch(m.salt) or type(m.boot) is not str:
        raise ArgumentError(f"salt {m.salt!r} or boot {m.boot!r} is not what it should be")
    for name, digits in {"commit": SALT, "seal": SUM}.items():
        value = getattr(m, name)
        if type(value) is not str or not digits.fullmatch(value):
            raise ArgumentError(f"{name} {value!r} is not what it should be")
    check_columns(m.columns)
    for rule, state in m.optimizer.items():
        steps = state.get("steps") if type(state) is dict else None
        if type(rule) is not str or type(steps) is not int or steps < 0 or len(state) != 1:
            raise ArgumentError(f"the state {state!r} of optimizer {rule!r} is unknown")


def _checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, separators=(",", ":"), allow_nan=False)
    return f"{_core.crc32c(canonical.encode()):08x}"
