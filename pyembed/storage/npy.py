"""The headers of .npy files: the one place that reads and writes them.

A header is read from the first `HEAD_BYTES` of a file. Nothing is unpickled, and no claim of a
header allocates memory.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from pyembed._checks import FLOAT32
from pyembed.errors import FormatError

# A table's header is padded so that rows start on a page, and a row whose size divides a page
# stays on one.
HEADER_BYTES = 4096
HEAD_BYTES = 16 << 10  # more than numpy accepts as a header
MAX_STRIDE = 1 << 24  # floats of a row: 256 columns of the largest width


class Header(NamedTuple):
    """The content of a header, and the offset of the data.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    fortran : bool
        Whether the array is in Fortran order.
    offset : int
        Bytes before the data.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int


def read(head: bytes, path: Path) -> Header:
    """Read the header of an .npy file.

    Parameters
    ----------
    head : bytes
        The first `HEAD_BYTES` of the file; all of it, if it is shorter.
    path : Path
        For messages.

    Raises
    ------
    FormatError
        If it is no .npy file.
    """
    file = io.BytesIO(head)
    try:
        version = npy.read_magic(file)
        v1, v2 = npy.read_array_header_1_0, npy.read_array_header_2_0
        shape, fortran, dtype = (v1 if version == (1, 0) else v2)(file)
    except Exception as error:  # numpy evaluates the header as Python: any exception is possible
        raise FormatError(f"{path}: not an .npy file ({error}); save it with np.save") from None
    return Header(shape, dtype, fortran, file.tell())


def require_whole(header: Header, size: int, path: Path) -> None:
    """Compare the size of a file with what its header asks for.

    Raises
    ------
    FormatError
        If the file is shorter.
    """
    needed = header.offset + header.dtype.itemsize * math.prod(header.shape)
    if size < needed:
        raise FormatError(f"{path}: {size} bytes; its header asks for {needed}: it was cut short")


def read_rows(head: bytes, size: int, path: Path) -> tuple[int, int, int]:
    """Read the header of a file of float32 rows.

    Parameters
    ----------
    head : bytes
        See `read`.
    size : int
        Bytes of the file.
    path : Path
        For messages.

    Returns
    -------
    tuple of int
        Rows, floats of a row, and the offset of the data in bytes.

    Raises
    ------
    FormatError
        If it is no 2-D C-order little-endian float32 array, or is shorter than it says.
    """
    header = read(head, path)
    shape, dtype = header.shape, header.dtype
    wrong_order = header.fortran and shape[0] > 1
    if dtype != FLOAT32 or dtype.byteorder == ">" or len(shape) != 2 or wrong_order:
        order = "Fortran" if header.fortran else "C"
        raise FormatError(
            f"{path}: {dtype} of shape {shape} in {order} order; allowed: 2-D float32 in C order; "
            "convert with np.save(path, np.ascontiguousarray(array, '<f4'))"
        )
    if shape[0] < 0 or not 1 <= shape[1] <= MAX_STRIDE or header.offset % 4:
        raise FormatError(
            f"{path}: shape {shape} at byte {header.offset}; allowed: rows of 1..{MAX_STRIDE} "
            "floats that begin at a multiple of 4 bytes"
        )
    require_whole(header, size, path)
    return shape[0], shape[1], header.offset


def read_integers(head: bytes, size: int, path: Path) -> Header:
    """Read the header of a file of integers of any shape; parameters as in `read_rows`.

    Raises
    ------
    FormatError
        If it holds something else, or is shorter than it says.
    """
    header = read(head, path)
    shape, dtype = header.shape, header.dtype
    if dtype.kind not in "iu" or min(shape, default=0) < 0:
        raise FormatError(f"{path}: {dtype} of shape {shape}; allowed: an array of integers")
    require_whole(header, size, path)
    return header


def rows_header(rows: int, stride: int) -> bytes:
    """Return the .npy v1.0 header of a table's rows, `HEADER_BYTES` long."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {stride}), }}"
    prefix = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.encode().ljust(HEADER_BYTES - 11) + b"\n"


def header_of(array: NDArray[Any]) -> bytes:
    """Return the .npy v1.0 header of a C-contiguous array, as np.save writes it."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
    return file.getvalue()
