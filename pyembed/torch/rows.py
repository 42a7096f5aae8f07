"""Where the rows of a layer live: one class for each of the three places.

- `ParameterRows`: in a Parameter, as in torch.nn. An optimizer of torch updates them.
- `TableRows`: in a table, in memory or on disk. Torch receives copies of rows; a pyembed optimizer
  updates the table, unless the layer is frozen.
- `DeviceRows`: in a Parameter that is a copy of a table. `commit` copies changed rows back.

A layer, its ops and its optimizer ask this object and never test for the place themselves. The
object has no reference to the layer; the Parameter is always an argument, because torch may replace
it. Ops refer to the object by a number, because a compiled graph holds tensors and numbers only.
"""

from __future__ import annotations

import copy
import itertools
import secrets
import weakref
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyembed._checks import F32
from pyembed.errors import ArgumentError
from pyembed.layers.embedding import settings_of
from pyembed.layers.embedding_bag import EmbeddingBag
from pyembed.optim.optimizer import Optimizer
from pyembed.storage import page_cache
from pyembed.table import Table
from pyembed.torch import device_copy, distributed

# These belong to one layer in one process.
NOT_COPIED = {"number", "view", "group", "accumulates", "seen"}
STATE_SHARE = 0.5  # share of memory: a state_dict has no copy of a larger weight in a file

# Numbers start at random, so that a graph saved by another process refers to no layer of this one.
_numbers = itertools.count(secrets.randbits(60))
_numbered: weakref.WeakValueDictionary[int, Rows] = weakref.WeakValueDictionary()


def numbered(number: int) -> Rows:
    """Return the `Rows` with this number.

    Raises
    ------
    ArgumentError
        If its layer no longer exists.
    """
    found = _numbered.get(number)
    if found is None:
        raise ArgumentError(
            "the layer of this graph is gone, and a graph has no rows; keep the layer alive while "
            "you use the graph, and in another process compile or export it again"
        )
    return found


def array_of(tensor: Tensor) -> F32:
    """Return a tensor as an array: its own memory if it is on the CPU, else a copy."""
    plain = tensor.is_cpu and not tensor.requires_grad
    return (tensor if plain else tensor.detach().cpu()).numpy()


class Rows:
    """Base of the three places.

    Attributes
    ----------
    core : pyembed.Embedding or pyembed.EmbeddingBag
        The settings of the layer, and its table if there is one.
    optimizer : pyembed optimizer or None
    parameter : str
        Name of the Parameter that the layer registers for these rows.
    devices : tuple of str
        Types of device on which a lookup accepts tensors.
    in_table : bool
        Backward passes the gradient to `optimizer` instead of returning it.
    is_bag, rereads : bool
        The layer reduces bags; its backward reads rows again.
    renorms, sparse : bool
        A lookup scales rows of the Parameter (max_norm); the Parameter gets a sparse gradient.
    version : int
        Number of changes to a table, for a backward that reads rows again.
    number : int
        Number by which ops refer to this object.
    """

    placement, parameter = "table", "weight"
    devices: tuple[str, ...] = ("cpu",)
    in_table = False
    number: int

    def __new__(cls, *_: Any) -> Rows:
        # Not in __init__, so that a copy has a number of its own.
        rows = super().__new__(cls)
        rows.number = next(_numbers)
        _numbered[rows.number] = rows
        return rows

    def __init__(self, core: Any, optimizer: Optimizer | None = None) -> None:
        self.core, self.optimizer, self.version = core, optimizer, 0
        self.is_bag = isinstance(core, EmbeddingBag)
        self.rereads = self.is_bag and core.mode == "max"
        self.renorms = core.max_norm is not None and not self.in_table
        self.sparse = core.sparse and not self.in_table

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, seen=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        table = self.core.table
        if table.path is not None and table.writable:
            raise ArgumentError(
                f"this layer writes {table.path}, and a table has one writer; share the layer, or "
                "call table.close(), copy the folder, and open the copy with path="
            )
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def attributes(self, weight: Tensor | None, device: torch.device) -> dict[str, Any]:
        """Make the Parameter of the layer, under its name."""
        raise NotImplementedError

    def layer_over(self, weight: Tensor) -> Any:
        """Return the numpy layer whose table holds the rows of this Parameter."""
        return self.core

    def shared(self) -> Tensor:
        """Return the rows of the table as a tensor without a copy; refuse a read-only table."""
        with self.core.table.writing() as weight:
            return torch.from_numpy(weight)

    def write_back(self, weight: Any) -> None:
        """Copy rows that changed outside of the table into it."""

    def description(self, weight: Any) -> list[str]:
        """List the parts of the layer's repr."""
        return [f"{weight.shape[0]}, {weight.shape[1]}", *settings_of(self.core)]

    def batch(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Any:
        """Return the batch as the numpy layer takes it: ids, or `Bags`."""
        if not self.is_bag:
            return array_of(ids)
        arrays = [None if given is None else array_of(given) for given in (offsets, weights)]
        return self.core.bags(array_of(ids), *arrays)

    def gradient(self, core: Any, batch: Any, grad: F32) -> Tensor | None:
        """Return the gradient of the Parameter, or None if a table consumed it."""
        raise NotImplementedError

    def join(self, ddp: DistributedDataParallel) -> None:
        """Make the table of every rank take the same steps; a Parameter needs nothing."""

    def refuse_sharing(self, parameter: Any) -> None:
        """Refuse `share_memory()` where another process would not see the steps."""

    def save(self, state: dict[str, Any], prefix: str, included: bool) -> None:
        """Complete a state_dict in which torch has stored the parameters."""

    def load(self, state: Any, prefix: str, included: bool, strict: bool, *lists: Any) -> None:
        """Load rows that are not in a Parameter, and note mismatches in the lists of torch."""


class ParameterRows(Rows):
    """Rows in a Parameter in memory, which an optimizer of torch updates."""

    view: tuple[Any, Any] = None, None  # the memory of a Parameter, and the layer over it

    def attributes(self, weight: Tensor | None, device: torch.device) -> dict[str, Any]:
        core = self.core
        rows = self.shared() if weight is None else weight
        core.table = Table.memory(0, core.table.dim)  # from here on the Parameter has the rows
        return {"weight": nn.Parameter(rows, not core.frozen)}

    def layer_over(self, weight: Tensor) -> Any:
        memory = weight.data_ptr(), weight.shape, weight.stride()
        if self.view[0] != memory:
            core = copy.copy(self.core)
            core.max_norm = None  # the op `renorm` scales the rows
            core.table = Table.from_array(array_of(weight))
            self.view = memory, core  # keeps the memory, so that its address is not used again
        return self.view[1]

    def gradient(self, core: Any, batch: Any, grad: F32) -> Tensor | None:
        found = core.backward(batch, grad)
        if not self.sparse:
            return torch.from_numpy(found)
        parts = torch.from_numpy(found.ids)[None], torch.from_numpy(found.values)
        trusted: Any = {"is_coalesced": True, "check_invariants": False}
        return torch.sparse_coo_tensor(*parts, (core.table.rows, core.table.dim), **trusted)


class TableRows(Rows):
    """Rows in a table, which a pyembed optimizer updates in backward, or in a later step.

    Attributes
    ----------
    accumulates : bool
        Backward keeps the gradient for the step of a `pyembed.torch.Optimizer`.
    group : process group or None
        Ranks that step together.
    """

    parameter, devices = "_anchor", ("cpu", "cuda")
    in_table, accumulates = True, False
    seen: int | None = 0  # version of the anchor; None after pickle, which makes an anchor in steps
    group: Any = None

    def attributes(self, weight: Tensor | None, device: torch.device) -> dict[str, Any]:
        # Autograd calls backward only if an input requires grad, and a table is not an input. The
        # anchor is an input without elements: requires_grad_(False) freezes the layer, .to(device)
        # moves its output, and torch's optimizers find nothing to update.
        with torch.inference_mode(False):
            anchor = nn.Parameter(torch.empty(0, device=device), not self.core.frozen)
        return {"_anchor": anchor}

    def description(self, weight: Any) -> list[str]:
        last = [] if self.optimizer is None else [f"optimizer={self.optimizer}"]
        return [repr(self.core.table), *settings_of(self.core), *last]

    def require_unchanged(self, anchor: Tensor) -> None:
        """Refuse a lookup after a change of the anchor, which cannot reach the table."""
        if self.seen is not None and not dist.is_initialized():  # DDP writes to all parameters
            raise ArgumentError(
                "the parameters of this model were changed in place, as an average of weights "
                "does, and the rows of its table were not: average a dense module, and rows with "
                "layer.weight.lerp_"
            )
        self.seen = anchor._version

    def gradient(self, core: Any, batch: Any, grad: F32) -> Tensor | None:
        if self.optimizer is None:
            raise ArgumentError("the layer has no optimizer; give optimizer=, or freeze the layer")
        if self.group is not None:
            batch, grad = distributed.whole_batch(batch, grad, self.group)
        if self.accumulates:
            self.optimizer.accumulate(batch, grad)
        else:
            self.optimizer.step(batch, grad)
            self.version += 1
        return None

    def join(self, ddp: DistributedDataParallel) -> None:
        if self.optimizer is not None:
            if ddp._join_config.enable:
                raise ArgumentError(
                    "join() of DistributedDataParallel: a rank without batches would not take the "
                    "steps of the others; give each rank as many batches, some of them empty"
                )
            group = distributed.own_group(ddp.process_group)
            if self.group is not group:
                distributed.join(self.core, self.optimizer, self.accumulates, group)
                self.group = group

    def refuse_sharing(self, parameter: Any) -> None:
        if self.optimizer is not None and parameter.is_cpu and parameter.is_shared():
            parameter.data = parameter.data.clone()
            raise ArgumentError(
                "share_memory() of a layer with optimizer=: another process would not see its "
                "steps; use DistributedDataParallel, or share a layer without optimizer="
            )

    def save(self, state: dict[str, Any], prefix: str, included: bool) -> None:
        del state[prefix + "_anchor"]  # nn.Embedding has no such key
        if not included:
            return
        weight, path = self.core.table.weight, self.core.table.path
        stepped = self.optimizer is not None and self.optimizer.state and self.optimizer.steps
        if path is None and stepped and not self.accumulates:
            raise ArgumentError(
                f"{prefix}weight is saved without the state of {self.optimizer}, so training would "
                "not resume from it: make a pyembed.torch.Optimizer, whose state_dict has it, use "
                "path=, whose file has it, or save the rows alone: layer.weight.detach().clone()"
            )
        if path is not None and weight.size * 4 > STATE_SHARE * page_cache.memory_bytes():
            raise ArgumentError(
                f"{prefix}weight takes {weight.size * 4} bytes in {path}, too many for a copy; the "
                "table is its own checkpoint: set layer.in_state_dict = False, and commit the table"
            )
        state[prefix + "weight"] = torch.from_numpy(np.array(weight))

    def load(self, state: Any, prefix: str, included: bool, strict: bool, *lists: Any) -> None:
        missing, unexpected, errors = lists
        missing[:] = [name for name in missing if name != prefix + "_anchor"]
        if not included:
            return
        key, shape = prefix + "weight", (self.core.table.rows, self.core.table.dim)
        unexpected[:] = [name for name in unexpected if name != key]
        weight = state.get(key)
        if key not in state:
            missing += [key] if strict else []
        elif not isinstance(weight, Tensor) or weight.shape != shape:
            found = tuple(getattr(weight, "shape", ()))
            errors.append(f"size mismatch for {key}: {found}; expected {shape}")
        else:
            values = weight.detach().to("cpu", torch.float32)
            self.core.load_state_dict({"weight": values.numpy()})
            self.version += 1


class DeviceRows(Rows):
    """Rows in a Parameter that is a copy of a table, for torch's kernels and optimizers."""

    placement = "device"

    def attributes(self, weight: Tensor | None, device: torch.device) -> dict[str, Any]:
        learns = not self.core.frozen
        return {"weight": nn.Parameter(device_copy.copied(self.core.table, device, learns), learns)}

    def write_back(self, weight: Any) -> None:
        device_copy.write_back(weight, self.core.table)

    def description(self, weight: Any) -> list[str]:
        return [*super().description(weight), "placement='device'"]
