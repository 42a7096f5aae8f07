"""Several processes: inside DistributedDataParallel the table of every rank takes the same step.

DDP averages the gradients of parameters. A table has none, so the ranks exchange their batches, ids
and gradients in each backward, and each rank steps on all of them: the step that one process would
take with the whole batch, in the order of the ranks. The tables are copies of each other, and stay
so:

1. They begin as rank 0's, as parameters do in DDP (`join`).
2. A layer that joined steps with all ranks from then on, under ``no_sync()`` too (`whole_batch`).

It refuses what would make them differ: a rank that cannot write, steps that were not taken by all,
and max_norm, by which a lookup of one rank changes rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.parallel import DistributedDataParallel

from pyembed._checks import F32
from pyembed.errors import ArgumentError
from pyembed.layers.bags import Bags

CHUNK_BYTES = 1 << 26  # of rows that rank 0 sends at once


class Ranks(NamedTuple):
    """Who steps together: DDP's group, and one of our own over the same ranks."""

    of_ddp: Any
    group: Any
    world: int


@cache
def _own_group(of_ddp: Any) -> Any:
    # Our exchanges are on the CPU, whatever DDP's backend is, and never between two of DDP's.
    ranks = dist.get_process_group_ranks(of_ddp)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def join(layer: Any, ddp: DistributedDataParallel) -> None:
    """Called in each forward inside DDP: the first time, make sure that all tables are the same.

    Raises
    ------
    ArgumentError
        On every rank, if the tables of one cannot be.
    """
    of_ddp: Any = ddp.process_group
    if layer.optimizer is None or (layer._ranks and layer._ranks.of_ddp is of_ddp):
        return
    ranks = Ranks(of_ddp, _own_group(of_ddp), dist.get_world_size(of_ddp))
    table, optimizer = layer.table, layer.optimizer
    if layer.max_norm is not None:
        raise ArgumentError(
            "max_norm scales rows in a lookup, and each rank looks others up; allowed in DDP: "
            "max_norm of the optimizer, which scales them in the step"
        )
    settings = repr(optimizer), layer._accumulates
    mine = (table.rows, table.dim, *settings, optimizer.steps, table.writable)
    all_of_them: list[Any] = [None] * ranks.world
    dist.all_gather_object(all_of_them, mine, group=ranks.group)
    for rank, theirs in enumerate(all_of_them):
        if theirs != (*all_of_them[0][:-1], True):
            raise ArgumentError(
                f"rank {rank} has (rows, dim, optimizer, pyembed.torch.Optimizer or not, steps, "
                f"writable) = {theirs}, rank 0 {all_of_them[0]}; allowed: the same on all ranks, "
                "and writable: in DDP each rank has a table of its own, in memory or in a folder"
            )
    _begin_as_rank_0(table, ranks)
    layer._ranks = ranks


def _begin_as_rank_0(table: Any, ranks: Ranks) -> None:
    first = dist.get_global_rank(ranks.group, 0)
    rows = max(1, CHUNK_BYTES // (4 * table.dim))
    for low in range(0, table.rows, rows):
        mine = table.weight[low : low + rows]
        sent = torch.from_numpy(mine.copy())
        dist.broadcast(sent, first, group=ranks.group)
        if not np.array_equal(sent.numpy(), mine, equal_nan=True):
            with table.writing(np.arange(low, low + len(mine))) as weight:
                weight[low : low + rows] = sent.numpy()


def whole_batch(ranks: Ranks, batch: NDArray[Any] | Bags, grad: F32) -> tuple[Any, F32]:
    """The batch of all ranks, and its gradient: that of the mean over ranks, as in DDP."""
    dim = grad.shape[-1]
    values = _joined(grad.reshape(-1, dim), ranks)
    values /= ranks.world
    if not isinstance(batch, Bags):
        return _joined(batch.reshape(-1).astype(np.int64, copy=False), ranks), values
    ids = _joined(batch.ids.astype(np.int64, copy=False), ranks)
    sizes = _joined(np.diff(batch.starts), ranks)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    weights = None if batch.weights is None else _joined(batch.weights, ranks)
    return Bags(ids, starts, weights), values


def _joined(array: NDArray[Any], ranks: Ranks) -> NDArray[Any]:
    """The arrays of all ranks, one after another; their lengths may differ."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world)]
    dist.all_gather(lengths, torch.tensor([len(array)]), group=ranks.group)
    longest = max(int(length) for length in lengths)
    padded = np.zeros((longest, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    parts = [torch.empty(padded.shape, dtype=torch.from_numpy(padded).dtype) for _ in lengths]
    if padded.size:
        dist.all_gather(parts, torch.from_numpy(padded), group=ranks.group)
    pairs = zip(parts, lengths, strict=True)
    return np.concatenate([part.numpy()[: int(length)] for part, length in pairs])
