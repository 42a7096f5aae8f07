# The names and types of the extension, which stubtest checks; _core.pyx documents them.
from mmap import mmap
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

RULES: Final[dict[str, tuple[str, dict[str, str]]]]
STREAM_FLOATS: Final[int]
BAG_MODES: Final[dict[str, int]]

_F32 = NDArray[np.float32]
_I64 = NDArray[np.int64]
_Ids = NDArray[np.int64] | NDArray[np.int32]
_Bytes = bytes | bytearray | memoryview | mmap | NDArray[Any]

@final
class Pages:
    cold: Final[bool]
    batches: Final[int]
    rows: Final[int]
    requested: Final[int]
    sampled: Final[int]
    found: Final[int]

@final
class Column:
    array: Final[_F32]
    writable: Final[bool]
    rows: Final[int]
    dim: Final[int]
    pages: Final[Pages | None]
    def __init__(self, array: _F32, pages: Pages | None = None) -> None: ...

@final
class Batch:
    ids: Final[_Ids]
    grad: Final[_F32]
    bag_of: Final[_I64 | None]
    coefficients: Final[_F32 | None]
    num_rows: Final[int]
    dim: Final[int]
    skip_row: Final[int]
    scale_by_count: Final[bool]
    unique: Final[bool]
    checked: Final[bool]
    grouped: Final[bool]
    unique_rows: Final[_I64]
    starts: Final[_I64]
    order: Final[_I64]
    def __init__(
        self,
        ids: _Ids,
        grad: _F32 | None,
        num_rows: int,
        dim: int,
        skip_row: int = -1,
        scale_by_count: bool = False,
        bag_of: _I64 | None = None,
        coefficients: _F32 | None = None,
        unique: bool = False,
    ) -> None: ...

@final
class Rule:
    name: Final[str]
    skip_nonfinite: Final[bool]
    refuse_nonfinite: Final[bool]
    largest: Final[float]
    lazy: Final[bool]
    frequency_power: Final[float]
    clip_value: Final[float]
    l2: Final[float]
    max_norm: Final[float]
    norm_type: Final[float]
    hyper: Final[dict[str, float]]
    step: int
    keep: float
    missed_momentum: float
    missed_lr: float
    clip_scale: float
    skipped: int
    def __init__(
        self,
        name: str,
        *,
        skip_nonfinite: bool = False,
        refuse_nonfinite: bool = False,
        lazy: bool = False,
        frequency_power: float = 0.0,
        clip_value: float = ...,
        l2: float = 0.0,
        max_norm: float = ...,
        norm_type: float = 2.0,
    ) -> None: ...
    def set_hyper(
        self,
        lr: float,
        *,
        eps: float = 0.0,
        momentum: float = 0.0,
        one_minus_b1: float = 0.0,
        one_minus_b2: float = 0.0,
        correction: float = 0.0,
        decay: float = 0.0,
        beta: float = 0.0,
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None: ...

@final
class Step:
    def __init__(
        self,
        rule: Rule,
        batch: Batch,
        columns: tuple[Column, ...],
        counts: dict[str, dict[str, int]] | None = None,
        pending: list[Batch] | None = None,
    ) -> None: ...

def use_simd(level: str) -> str: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def openmp() -> str: ...
def pause_threads() -> None: ...
def crc32c(data: _Bytes, fast: bool = True) -> int: ...
def crc32c_pieces(data: _Bytes, size: int, threads: int) -> list[int]: ...
def unmarked_rows(bits: NDArray[np.uint8], rows: _I64) -> _I64: ...
def mark_rows(bits: NDArray[np.uint8], rows: _I64) -> None: ...
def readahead(column: Column, ids: _Ids) -> bool: ...
def map_pages(column: Column, ids: _Ids, to_write: bool) -> None: ...
def cached_pages(fd: int) -> tuple[int, int] | None: ...
def start_write_back(fd: int, offset: int, size: int) -> bool: ...
def page_out(rows: _F32) -> bool: ...
def overlaps(columns: tuple[Column, ...], values: _F32) -> bool: ...
def check_ids(ids: _Ids, rows: int, threads: int) -> None: ...
def gather(column: Column, ids: _Ids, out: _F32 | None, threads: int) -> _F32: ...
def check(batch: Batch, threads: int) -> None: ...
def read_batch(
    ids: object, grad: object, num_rows: int, dim: int, skip_row: int, scale_by_count: bool
) -> Batch | None: ...
def group(batches: list[Batch], threads: int) -> None: ...
def scatter_add(column: Column, batch: Batch, alpha: float, threads: int) -> None: ...
def first_refused(steps: list[Step], threads: int) -> int: ...
def all_finite(values: _F32, threads: int) -> bool: ...
def fill(
    column: Column, kind: str, seed: int, first_row: int, a: float, b: float, threads: int
) -> None: ...
def sum_groups(batch: Batch, threads: int) -> _F32: ...
def add_groups(column: Column, batch: Batch, alpha: float, threads: int) -> None: ...
def global_norm(batch: Batch, skip_nonfinite: bool, threads: int) -> float: ...
def renorm(
    column: Column, batch: Batch, max_norm: float, p: float, threads: int
) -> tuple[int, int]: ...
def update(steps: list[Step], threads: int) -> None: ...
def catch_up(step: Step, threads: int) -> None: ...
def reduce_bags(
    column: Column,
    ids: _Ids,
    starts: _I64,
    weights: _F32 | None,
    mode: str,
    skip_row: int,
    out: _F32,
    which: _I64 | None,
    threads: int,
) -> None: ...
def bag_dots(
    column: Column, ids: _I64, bag_of: _I64, grad: _F32, skip_row: int, out: _F32, threads: int
) -> None: ...
def sum_elements(starts: _I64, positions: _I64, grad: _F32, out: _F32, threads: int) -> None: ...
