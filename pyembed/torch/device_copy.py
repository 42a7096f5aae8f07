"""The copy of a table on a device, as an ordinary Parameter of torch.

Torch's kernels look it up and torch's optimizers train it; `write_back` copies the rows that differ
back into the table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyembed.errors import ArgumentError, DTypeError, ReadOnlyError
from pyembed.storage import page_cache
from pyembed.table import Table

PLACEMENTS = ("table", "device", "auto")
FREE_SHARE = 0.5  # share of free memory for the rows with "auto"; the rest is for the computation
CHUNK_BYTES = 32 << 20  # bytes of rows copied at once


def require(
    placement: str, has_table: bool, has_optimizer: bool, frozen: bool, device: torch.device
) -> None:
    """Refuse combinations of arguments that cannot work, before a table is opened.

    Raises
    ------
    ArgumentError
    """
    if placement not in PLACEMENTS:
        raise ArgumentError(f"placement = {placement!r}; allowed: {', '.join(PLACEMENTS)}")
    if placement == "table":
        return
    reason = ""
    if not has_table:
        reason = "copies existing rows; give path= or table="
    elif has_optimizer:
        reason = "uses an optimizer of torch; omit optimizer=, or use placement='table'"
    elif placement == "auto" and not frozen:
        reason = "is for frozen layers: free memory would decide how others are trained; freeze it"
    if reason:
        raise ArgumentError(f"placement = {placement!r} {reason}")


def decide(placement: str, table: Table, device: torch.device) -> str:
    """Resolve "auto" to "device" if the rows take at most half of the free memory, else "table"."""
    if placement != "auto":
        return placement
    return "device" if 4 * table.rows * table.dim <= FREE_SHARE * free_bytes(device) else "table"


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; for the CPU, all that this process may use.

    Raises
    ------
    ArgumentError
        If torch does not report it.
    """
    if device.type == "cpu":
        return page_cache.memory_bytes()
    report = getattr(torch.get_device_module(device), "mem_get_info", None)
    if report is None:
        raise ArgumentError(
            f"placement = 'auto': free memory of {device} is unknown; use 'table' or 'device'"
        )
    return int(report(device)[0])


def copied(table: Table, device: torch.device, learns: bool) -> Tensor:
    """Copy the rows of a table to a device, in chunks.

    Returns
    -------
    float32 Tensor of shape (table.rows, table.dim)

    Raises
    ------
    ReadOnlyError
        If the rows learn, and the table could not take them back.
    """
    if learns and not table.writable:
        raise ReadOnlyError(
            "the table was opened for reading, so rows that learn could not be committed; open it "
            "with mode 'r+', or freeze the layer"
        )
    weight = torch.empty(table.rows, table.dim, device=device)
    for part in chunks(table):
        weight[part] = torch.from_numpy(np.array(table.weight[part])).to(device)
    return weight


def write_back(weight: Tensor, table: Table) -> None:
    """Copy the rows whose bits differ into the table; its other columns stay as they are.

    Raises
    ------
    ArgumentError, DTypeError, ClosedError, ReadOnlyError
    """
    shape = table.rows, table.dim
    if weight.dtype != torch.float32:
        raise DTypeError(f"the weight is {weight.dtype}; allowed: float32; use layer.float()")
    if weight.shape != shape:
        raise ArgumentError(f"the weight has shape {tuple(weight.shape)}; the table has {shape}")
    with table.store.still():
        for part in chunks(table):
            new, old = weight.detach()[part].cpu().numpy(), table.weight[part]
            differ = np.flatnonzero((new.view(np.int32) != old.view(np.int32)).any(axis=1))
            if differ.size:
                row_ids = differ + part.start
                with table.writing(row_ids) as into:
                    into[row_ids] = new[differ]


def chunks(table: Table) -> list[slice]:
    """Cut the rows of a table into slices of at most CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (4 * table.dim))
    return [slice(first, first + step) for first in range(0, table.rows, step)]
