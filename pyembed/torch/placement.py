"""Where the rows of a table are while torch uses them: in the table, or copied onto a device.

On the device they are an ordinary Parameter: torch's kernels look it up, torch's optimizers train
it, and `write_back` brings the rows that differ back into the table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyembed.errors import ArgumentError, DTypeError, ReadOnlyError
from pyembed.storage import page_cache
from pyembed.table import Table

PLACEMENTS = ("table", "device", "auto")
FREE_SHARE = 0.5  # that "auto" gives to the rows; the rest is for what the model computes
CHUNK_BYTES = 32 << 20  # on their way to the device and back


def require(
    placement: str, has_table: bool, has_optimizer: bool, frozen: bool, device: torch.device
) -> None:
    """Refuse what cannot be, before anything is opened."""
    if placement not in PLACEMENTS:
        raise ArgumentError(f"placement = {placement!r}; allowed: {', '.join(PLACEMENTS)}")
    if placement == "table":
        return
    what = f"placement = {placement!r}"
    if not has_table:
        raise ArgumentError(f"{what} copies rows that exist; give path= or table=")
    if has_optimizer:
        raise ArgumentError(
            f"{what} with optimizer=: rows on a device are a Parameter; leave optimizer= out and "
            "give layer.parameters() to an optimizer of torch, or take placement='table'"
        )
    if device.type == "meta":
        raise ArgumentError(f"{what}, device = meta holds no rows; allowed: cpu, cuda, …")
    if placement == "auto" and not frozen:
        raise ArgumentError(
            f"{what} of a layer that learns: free memory would choose which optimizer trains it; "
            "freeze the layer, or take 'device' with an optimizer of torch, or 'table' with "
            "optimizer="
        )


def decide(placement: str, table: Table, device: torch.device) -> str:
    """ "table" or "device": with "auto", whether the rows take at most half of what is free."""
    if placement != "auto":
        return placement
    fits = 4 * table.rows * table.dim <= FREE_SHARE * free_bytes(device)
    return "device" if fits else "table"


def free_bytes(device: torch.device) -> int:
    """What is free on the device; for the CPU, all that this process may use."""
    if device.type == "cpu":
        return page_cache.memory_bytes()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None or not hasattr(accelerator, "get_memory_info"):
        raise ArgumentError(
            f"placement = 'auto': this torch does not say what is free on {device}; "
            "allowed: 'table', 'device'"
        )
    return int(accelerator.get_memory_info(device)[0])


def copied(table: Table, device: torch.device, learns: bool) -> Tensor:
    """The rows as a tensor on the device, copied in chunks.

    Raises
    ------
    ReadOnlyError
        If the rows learn, and could not be written back.
    """
    if learns and not table.writable:
        raise ReadOnlyError(
            "the table was opened for reading, so rows that learn could not be committed; open it "
            "with mode 'r+', or freeze the layer"
        )
    weight = torch.empty(table.rows, table.dim, device=device)
    for part in _chunks(table):
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
    with table.still():
        for part in _chunks(table):
            new, old = weight.detach()[part].cpu().numpy(), table.weight[part]
            differ = np.flatnonzero((new.view(np.int32) != old.view(np.int32)).any(axis=1))
            if differ.size:
                rows = differ + part.start
                with table.writing(rows) as into:
                    into[rows] = new[differ]


def _chunks(table: Table) -> list[slice]:
    step = max(1, CHUNK_BYTES // (4 * table.dim))
    return [slice(first, first + step) for first in range(0, table.rows, step)]
