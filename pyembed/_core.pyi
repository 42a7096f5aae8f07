# What the extension offers; kept true by stubtest. See _core.pyx for the meaning.
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

RULES: Final[dict[str, tuple[int, dict[str, str]]]]
HYPER: Final[dict[str, float]]
EXTRAS: Final[dict[str, float]]
STREAM_FLOATS: Final[int]
BAG_MODES: Final[dict[str, int]]

_F32 = NDArray[np.float32]
_I64 = NDArray[np.int64]
_Ids = NDArray[np.int64] | NDArray[np.int32]

@final
class Pages:
    @property
    def cold(self) -> bool: ...
    @property
    def batches(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def asked(self) -> int: ...
    @property
    def sampled(self) -> int: ...
    @property
    def found(self) -> int: ...
    def __init__(self) -> None: ...

@final
class Column:
    @property
    def array(self) -> _F32: ...
    @property
    def writable(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def pages(self) -> Pages | None: ...
    def __init__(self, array: _F32, pages: Pages | None = None) -> None: ...

def use_simd(level: str) -> str: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def openmp() -> str: ...
def pause_threads() -> None: ...
def crc32c(data: Any, fast: bool = True) -> int: ...
def ask_pages(column: Column, ids: _Ids) -> None: ...
def cached_pages(fd: int) -> tuple[int, int] | None: ...
def start_write_back(fd: int, offset: int, size: int) -> bool: ...
def page_out(rows: _F32) -> bool: ...
def overlaps(column: Column, values: _F32) -> bool: ...
def check_ids(ids: _Ids, rows: int, threads: int) -> None: ...
def gather(column: Column, ids: _Ids, out: _F32 | None, threads: int) -> _F32: ...
def scatter_add(column: Column, ids: _Ids, values: _F32, alpha: float, threads: int) -> None: ...
def all_finite(values: _F32, threads: int) -> bool: ...
def fill(
    column: Column, kind: str, seed: int, first_row: int, a: float, b: float, threads: int
) -> None: ...
def group(ids: _Ids, rows: int, threads: int) -> tuple[_I64, _I64, _I64]: ...
def sum_groups(
    rows: _Ids,
    starts: _I64 | None,
    order: _I64 | None,
    grad: _F32,
    out: _F32,
    scale_by_count: bool,
    threads: int,
    bag_of: _I64 | None = None,
    coef: _F32 | None = None,
) -> None: ...
def add_groups(
    column: Column,
    rows: _Ids,
    starts: _I64 | None,
    order: _I64 | None,
    grad: _F32,
    alpha: float,
    skip_row: int,
    scale_by_count: bool,
    threads: int,
    bag_of: _I64 | None = None,
    coef: _F32 | None = None,
) -> None: ...
def update(
    columns: tuple[Column, ...],
    rows: _Ids,
    starts: _I64 | None,
    order: _I64 | None,
    grad: _F32,
    name: str,
    hyper: dict[str, float],
    skip_row: int,
    scale_by_count: bool,
    threads: int,
    bag_of: _I64 | None = None,
    coef: _F32 | None = None,
    extras: dict[str, float] | None = None,
) -> int: ...
def catch_up(
    columns: tuple[Column, ...],
    rows: _I64 | None,
    name: str,
    hyper: dict[str, float],
    extras: dict[str, float],
    threads: int,
) -> None: ...
def global_norm(
    rows: _I64, grad: _F32, skip_row: int, skip_nonfinite: bool, threads: int
) -> float: ...
def renorm(
    column: Column, ids: _Ids, max_norm: float, p: float, threads: int
) -> tuple[int, int]: ...
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
