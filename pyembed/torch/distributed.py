"""Several processes: inside DistributedDataParallel the table of every rank takes the same steps.

DDP averages the gradients of parameters. A table is not a parameter, so the ranks exchange their
ids and gradients in each backward, and each rank steps on all of them: the step that one process
would take with the whole batch, in the order of the ranks. The tables start as copies of rank 0's,
as parameters do in DDP (`join`). From then on the layer steps with all ranks, under ``no_sync()``
too (`whole_batch`), so the tables stay equal.

Refused is everything that would make them differ: a rank that cannot write, steps that only some
ranks have taken, and max_norm, with which a lookup changes rows on one rank only.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pyembed._checks import F32
from pyembed.errors import ArgumentError
from pyembed.layers.bags import Bags
from pyembed.optim.optimizer import Optimizer
from pyembed.torch import device_copy


@cache
def own_group(of_ddp: Any) -> Any:
    """Make a process group of the same ranks as that of DDP, once.

    Exchanges run on the CPU, whatever backend DDP has, and never interleave with those of DDP.
    """
    ranks = dist.get_process_group_ranks(of_ddp)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def join(core: Any, optimizer: Optimizer, accumulates: bool, group: Any) -> None:
    """Give the table of a layer the rows of rank 0, before its first lookup inside DDP.

    Raises
    ------
    ArgumentError
        On every rank, if the table of one of them cannot take the same steps.
    """
    table = core.table
    if core.max_norm is not None:
        raise ArgumentError(
            "max_norm scales rows in a lookup, and each rank looks up other rows; allowed in DDP: "
            "max_norm of the optimizer, which scales rows in the step"
        )
    mine = (table.rows, table.dim, repr(optimizer), accumulates, optimizer.steps, table.writable)
    given = _gathered(mine, group)
    for rank, theirs in enumerate(given):
        if theirs != (*given[0][:-1], True):
            raise ArgumentError(
                f"rank {rank} has (rows, dim, optimizer, pyembed.torch.Optimizer or not, steps, "
                f"writable) = {theirs}, rank 0 has {given[0]}; allowed: the same on all ranks, and "
                "writable; give each rank a table of its own"
            )
    first = dist.get_global_rank(group, 0)
    for part in device_copy.chunks(table):
        rows = table.weight[part]
        sent = torch.from_numpy(rows.copy())
        dist.broadcast(sent, first, group=group)
        if not np.array_equal(sent.numpy(), rows, equal_nan=True):
            with table.writing(np.arange(part.start, part.start + len(rows))) as weight:
                weight[part] = sent.numpy()


def whole_batch(batch: NDArray[Any] | Bags, grad: F32, group: Any) -> tuple[Any, F32]:
    """Join the batches of all ranks.

    Returns
    -------
    ids or Bags
    float32 array of shape (ids or bags of all ranks, dim)
        Gradient of the mean over ranks, as in DDP.
    """
    ids, bags = (batch.ids, batch) if isinstance(batch, Bags) else (batch, None)
    numbers = ids.reshape(-1).astype(np.int64, copy=False)
    mine: list[NDArray[Any]] = [numbers, grad.reshape(-1, grad.shape[-1])]
    if bags is not None:
        mine.append(np.diff(bags.starts))
        mine += [] if bags.weights is None else [bags.weights]
    ids, values, *rest = _joined(mine, group)
    values /= dist.get_world_size(group)
    if not rest:
        return ids, values
    weights = rest[1] if len(rest) == 2 else None
    return Bags(ids, np.append(0, np.cumsum(rest[0])), weights), values


def _joined(mine: list[NDArray[Any]], group: Any) -> list[NDArray[Any]]:
    """Join the arrays of all ranks, one after the other; their lengths may differ.

    All arrays of a rank travel as the bytes of one tensor: pickled, a large batch takes longer.
    """
    world = dist.get_world_size(group)
    counts = [torch.empty(len(mine), dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(array) for array in mine]), group=group)
    row_bytes = [array.itemsize * math.prod(array.shape[1:]) for array in mine]
    sizes = [int(count @ torch.tensor(row_bytes)) for count in counts]
    sent = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    packed = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in mine]
    np.concatenate(packed, out=sent.numpy()[: sum(part.size for part in packed)])
    received = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(received, sent, group=group)
    parts: list[list[NDArray[Any]]] = [[] for _ in mine]
    for count, data in zip(counts, received, strict=True):
        at = 0
        for array, part, n, size in zip(mine, parts, count.tolist(), row_bytes, strict=True):
            part.append(data.numpy()[at : at + n * size].view(array.dtype))
            at += n * size
    return [
        np.concatenate(part).reshape(-1, *array.shape[1:])
        for part, array in zip(parts, mine, strict=True)
    ]


def _gathered(mine: Any, group: Any) -> list[Any]:
    given: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(given, mine, group=group)
    return given
