# What the extension offers; kept true by stubtest. See _core.pyx for the meaning.
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

RULES: Final[dict[str, tuple[int, tuple[str, ...]]]]
STREAM_FLOATS: Final[int]
BAG_MODES: Final[dict[str, int]]

_F32 = NDArray[np.float32]
_I64 = NDArray[np.int64]
_Ids = NDArray[np.int64] | NDArray[np.int32]
_Hyper = tuple[float, float, float, float]

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
    def __init__(self, array: _F32) -> None: ...

def use_simd(level: str) -> str: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def openmp() -> str: ...
def pause_threads() -> None: ...
def crc32c(data: Any) -> int: ...
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
    hyper: _Hyper,
    skip_row: int,
    scale_by_count: bool,
    threads: int,
    bag_of: _I64 | None = None,
    coef: _F32 | None = None,
) -> None: ...
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
