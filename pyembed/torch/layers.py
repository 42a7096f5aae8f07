"""The layers as nn.Module: where the rows are, and torch's protocols.

A layer has its rows

- in a Parameter, as torch.nn has, and torch's own optimizers update it: in memory, no `optimizer=`;
- or in a table: with `optimizer=`, which backward calls, or frozen. Torch gets copies of rows,
  never the table: a read-only one cannot be written, and nothing of its size is made;
- or in a table and, with `placement="device"`, as a copy in a Parameter, until `commit`.

It refuses what cannot be: a Parameter in a file, a second writer of one.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyembed._checks import F32
from pyembed.errors import ArgumentError, DTypeError
from pyembed.layers import embedding, embedding_bag
from pyembed.optim.optimizer import Optimizer
from pyembed.storage import page_cache
from pyembed.table import Table
from pyembed.torch import ops
from pyembed.torch import placement as placing

if TYPE_CHECKING:
    from typing_extensions import Self

STATE_SHARE = 0.5  # of the memory: a copy of a file's weight that is larger is no part of a state
PLAIN = (Tensor, nn.Parameter)
Path = str | os.PathLike[str]
MakeOptimizer = Callable[[embedding.Layer], Optimizer]


class WeightInTable:
    """The `weight` of a layer whose rows are in a table: no tensor, so optimizers refuse it."""

    def _refuse(self, *_: object) -> NoReturn:
        raise ArgumentError(
            "the weight lies in a table, which updates itself or is frozen: it is no tensor. Read "
            "rows with layer(ids) or layer.table; torch's optimizers take the other parameters"
        )

    __iter__ = __len__ = __getitem__ = __array__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


def _setting(name: str) -> Any:
    return property(lambda self: getattr(self._core, name), doc=f"`{name}`, which cannot be set.")


class Layer(nn.Module):
    """What both layers share: where the rows are, and torch's protocols."""

    padding_idx, max_norm, norm_type = map(_setting, ("padding_idx", "max_norm", "norm_type"))
    scale_grad_by_freq, sparse = map(_setting, ("scale_grad_by_freq", "sparse"))
    _core_class: Any
    weight: Any

    def __init__(
        self,
        *args: Any,
        path: Path | None = None,
        optimizer: MakeOptimizer | None = None,
        placement: str = "table",
        **named: Any,
    ) -> None:
        super().__init__()
        settings = inspect.signature(self._core_class).bind(*args, **named).arguments
        weight, table = settings.pop("_weight", None), settings.pop("table", None)
        place = torch.device(settings.pop("device", None) or "cpu")
        if settings.keys() & {"seed", "num_threads"}:
            raise ArgumentError("seed, num_threads: use torch.manual_seed; give them to a Table")
        shape = settings["num_embeddings"], settings["embedding_dim"]
        mode = "r" if settings.get("_freeze", False) else "r+"
        if sum(given is not None for given in (weight, table, path)) > 1:
            raise ArgumentError("_weight, table and path name the same rows; give one")
        exists, frozen = table is not None or path is not None, mode == "r"
        placing.require(placement, exists, optimizer is not None, frozen, place)
        if weight is not None and getattr(weight, "type", str)() != "torch.FloatTensor":
            raise DTypeError(f"_weight is a {_kind(weight)}; allowed: a float32 Tensor on the CPU")
        fresh = weight is None and table is None and path is None
        if weight is not None:
            table = Table.from_array(ops.array_of(weight))
        elif table is None:
            table = Table.memory(*shape) if path is None else Table.open(path, mode)
        self.in_state_dict = True  # False: the table is its own checkpoint
        self._seen: tuple[Any, Any] | None = None  # the Parameter's memory, as a table
        self._ranks: Any = None  # who steps with this table, see `distributed`
        self._accumulates = False  # backward steps at once, unless there is an `Optimizer`
        self._changes = 0  # so that a backward which reads rows again knows that they are others
        try:
            self.placement = placing.decide(placement, table, place)
            self._core = self._core_class(**settings, table=table)
            self._is_max = getattr(self._core, "mode", None) == "max"
            self.optimizer = None if optimizer is None else self._made(optimizer)
            self._place_rows(table, weight, place)
        except BaseException:
            if path is not None:
                table.close()
            raise
        self._register()
        if fresh:
            self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor | F32 | Table | Path, freeze: bool = True, **options: Any
    ) -> Self:
        """A layer over rows that exist: a Tensor, a float32 array, a Table, or a table's path.

        `options` are those of the class, by name; without `freeze` a path needs `optimizer`.
        """
        if isinstance(embeddings, Tensor):
            if embeddings.dim() != 2:
                found = tuple(embeddings.shape)
                raise ArgumentError(f"embeddings have shape {found}; allowed: (rows, dim)")
            return cls(*embeddings.shape, _weight=embeddings, _freeze=freeze, **options)
        table = embedding.Layer._pretrained_table(embeddings, freeze, None)
        return cls(table.rows, table.dim, table=table, _freeze=freeze, **options)

    def _made(self, make: MakeOptimizer) -> Optimizer:
        kind = getattr(make, "func", make)  # of a functools.partial
        theirs = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        made = make(self._core) if callable(make) and not theirs else None
        if not isinstance(made, Optimizer):
            raise DTypeError(
                f"optimizer = {make!r}; allowed: a class of pyembed.optim, or "
                "functools.partial(pyembed.optim.Adagrad, lr=0.05); for one of torch.optim leave "
                "optimizer= out, and give it layer.parameters()"
            )
        return made

    def _place_rows(self, table: Table, weight: Tensor | None, place: torch.device) -> None:
        learns = not self._core.frozen
        if self.placement == "device":
            self._in_table = False
            self.weight = nn.Parameter(placing.copied(table, place, learns), learns)
            return
        if place.type not in ("cpu", "cuda"):
            raise ArgumentError(
                f"device = {place}; allowed: 'cpu', 'cuda'; any other with placement='device'"
            )
        plain = table.path is None and table.writable and place.type == "cpu"
        self._in_table = self.optimizer is not None or not plain
        if not self._in_table:
            self.weight = nn.Parameter(_shared(table) if weight is None else weight, learns)
            self._core.table = Table.memory(0, table.dim)  # the rows are the Parameter's from here
            return
        if self.optimizer is None and learns:
            raise ArgumentError(
                f"rows {table.path or 'in memory'}, device = {place}: without optimizer= the "
                "weight becomes a Parameter, from a writable table in memory, on the CPU; give "
                "optimizer=functools.partial(pyembed.optim.Adagrad, lr=0.05), or freeze the layer"
            )
        # Autograd calls backward only where an input requires grad, and the table is no input. So
        # there is one without elements: requires_grad_(False) freezes, .to(device) moves the
        # output, torch's optimizers find nothing to do. nn.Embedding has no such key in its
        # state_dict, so ours has none either.
        self._anchor = nn.Parameter(torch.empty(0, device=place), learns)
        self.weight = WeightInTable()

    def _register(self) -> None:
        self._number = ops.register(self)

    @property
    def table(self) -> Table:
        """Where the rows are, or with placement "device" come from and are committed to.

        Without `optimizer=`, a table over the Parameter's memory.
        """
        core = self._core if self.placement == "device" else self._over(self.weight)
        table: Table = core.table
        return table

    def commit(self, meta: dict[str, Any] | None = None) -> None:
        """Commit the table; with placement "device", after the rows that differ were copied back.

        State columns of the table stay as they are then: they are not the torch optimizer's.

        Raises
        ------
        ArgumentError, ClosedError, DTypeError, ReadOnlyError
        """
        if self.placement == "device":
            placing.write_back(self.weight, self.table)
        self.table.commit(meta)

    @property
    def num_embeddings(self) -> int:
        """How many rows there are."""
        return self._core.table.rows if self._in_table else int(self.weight.shape[0])

    @property
    def embedding_dim(self) -> int:
        """How many floats a row has."""
        return int(self._core.table.dim)

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1), by torch's generator, and set the padding row to zero."""
        with torch.no_grad():
            rows = _shared(self.table) if self._in_table else self.weight
            nn.init.normal_(rows)
            if self.padding_idx is not None:
                rows[self.padding_idx] = 0

    def extra_repr(self) -> str:
        """As torch has it; or the table."""
        shape = None if self._in_table else f"{self.num_embeddings}, {self.embedding_dim}"
        last = [] if self.optimizer is None else [f"optimizer={self.optimizer}"]
        last += ["placement='device'"] if self.placement == "device" else []
        return ", ".join([shape or repr(self.table), *self._core._settings(), *last])

    # --- lookups ------------------------------------------------------------------------------

    def _look_up(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        # Module.__getattr__ takes 0.4 µs; only a parametrised weight is not among the parameters.
        weight: Any = self._parameters.get("_anchor" if self._in_table else "weight")
        weight = self.weight if weight is None else weight
        for given in (weight, ids, offsets, weights):
            if given is not None and not (isinstance(given, Tensor) and given.is_cpu):
                self._refuse_place(given)
        if weight.dtype != torch.float32:
            raise DTypeError(f"the layer was cast to {weight.dtype}; allowed: float32; cast rows")
        if not self._in_table and self._core.max_norm is not None:
            with torch.no_grad():
                ops.renorm(weight, ids, self._number)
        # What only pretends to be a tensor, in a compiler or outside of one, needs an op.
        if torch.compiler.is_compiling() or not (type(ids) in PLAIN and type(weight) in PLAIN):
            rows: Tensor = ops.rows(weight, ids, offsets, weights, self._number)
        else:
            rows = ops.Lookup.apply(weight, ids, offsets, weights, self)  # type: ignore[no-untyped-call]
        return rows

    def _refuse_place(self, given: Any) -> None:
        if not isinstance(given, Tensor):
            raise DTypeError(f"the input is a {type(given).__name__}; allowed: Tensors")
        places = ("cpu", "cuda") if self._in_table else ("cpu",)
        if given.device.type not in places:
            raise ArgumentError(
                f"a tensor is on {given.device}; allowed: {', '.join(places)}; rows of a layer "
                "with optimizer= and device='cuda' stay in memory, and go to the GPU as copies"
            )

    def _over(self, weight: Tensor) -> Any:
        """pyembed's layer, over the table or this Parameter."""
        if self._in_table:
            return self._core
        where, seen = (weight.data_ptr(), weight.shape, weight.stride()), self._seen
        if seen is None or seen[0] != where:
            core = copy.copy(self._core)
            core.max_norm = None  # ops.renorm has seen to it
            core.table = Table.from_array(ops.array_of(weight))
            seen = self._seen = where, core  # with its memory, so that the address stays taken
        return seen[1]

    # --- torch's protocols --------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        anchor: Any = self._parameters.get("_anchor")
        if self.optimizer is not None and anchor.is_cpu and anchor.is_shared():
            anchor.data = anchor.data.clone()
            raise ArgumentError(
                "share_memory() of a layer with optimizer=: another process would not see the "
                "steps; share one without optimizer=, or use DistributedDataParallel"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None, "_ranks": None, "_accumulates": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        table = self._core.table
        if table.path is not None and table.writable:
            raise ArgumentError(
                f"{table.path} is written by this layer, and has one writer; share the layer, "
                "or call table.close(), copy the folder, and open the copy with path="
            )
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._in_table:
            return
        del destination[prefix + "_anchor"]
        if not self.in_state_dict:
            return
        weight, path = self.table.weight, self.table.path
        if path is not None and weight.size * 4 > STATE_SHARE * page_cache.memory_bytes():
            raise ArgumentError(
                f"{prefix}weight is {weight.size * 4} bytes in {path}, too many for a copy; the "
                "table is its own checkpoint: set layer.in_state_dict = False, and commit it"
            )
        destination[prefix + "weight"] = torch.from_numpy(np.array(weight))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local: Any, strict: bool, *rest: Any
    ) -> None:
        (missing_keys, unexpected_keys, error_msgs), key = rest, prefix + "weight"
        given = dict(state_dict)
        if self._in_table:
            given[prefix + "_anchor"] = self._anchor.detach()
        super()._load_from_state_dict(given, prefix, local, strict, *rest)
        if not self._in_table or not self.in_state_dict:
            return
        unexpected_keys[:] = [name for name in unexpected_keys if name != key]
        shape, weight = (self.num_embeddings, self.embedding_dim), given.get(key)
        if key not in given:
            missing_keys += [key] if strict else []
        elif not isinstance(weight, Tensor) or weight.shape != shape:
            error_msgs.append(f"size mismatch for {key}: {_kind(weight)}; expected {shape}")
        else:
            values = weight.detach().to("cpu", torch.float32)
            self._core.load_state_dict({"weight": values.numpy()})
            self._changes += 1


class Embedding(Layer):
    """`torch.nn.Embedding` over a table.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
    _weight, _freeze
        As in torch, by the rules of docs/torch-compatibility.md.
    device : "cpu" or "cuda"; with placement "device" any of torch's
        Where rows that were looked up go; "cuda" takes `optimizer`, or a frozen layer. With
        placement "device", where all rows go.
    dtype, table
        As for `pyembed.Embedding`.
    path : path-like, optional
        A table's folder; opened for reading if frozen.
    optimizer : callable, optional
        A class of `pyembed.optim`, or a `functools.partial` of one: it is called with pyembed's
        layer. Backward then updates the table, in one step for each call of the layer; for one step
        of several calls, see `Optimizer`. Without `optimizer`, `weight` is a Parameter.
    placement : {"table", "device", "auto"}
        "device" copies the rows of `path` or `table` onto `device`, as a Parameter that torch looks
        up and torch's optimizers train; `commit` copies them back. "auto", for a frozen layer:
        "device" if the rows take at most half of the memory that is free there. The attribute
        `placement` says which it is: "table" or "device".

    Examples
    --------
    >>> import functools
    >>> from pyembed import optim
    >>> layer = Embedding(10, 3, optimizer=functools.partial(optim.SGD, lr=1.0))
    >>> before = layer(torch.tensor([4]))
    >>> before.sum().backward()
    >>> (before - layer(torch.tensor([4]))).round().tolist()
    [[1.0, 1.0, 1.0]]
    """

    _core_class = embedding.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Rows: a fresh tensor of shape input.shape + (embedding_dim,)."""
        if self.placement == "table":
            return self._look_up(input, None, None)
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class EmbeddingBag(Layer):
    """`torch.nn.EmbeddingBag` over a table; torch's arguments, then those of `Embedding`."""

    _core_class = embedding_bag.EmbeddingBag
    mode, include_last_offset = map(_setting, ("mode", "include_last_offset"))

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """One row for each bag: a fresh tensor of shape (bags, embedding_dim)."""
        if self.placement == "table":
            return self._look_up(input, offsets, per_sample_weights)
        return functional.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


def _kind(value: Any) -> str:
    shape = tuple(getattr(value, "shape", ()))
    return f"{getattr(value, 'dtype', '')} {type(value).__name__} of shape {shape}".strip()


def _shared(table: Table) -> Tensor:
    """The rows of a table in memory as a tensor, without a copy; a read-only one refuses."""
    with table.writing() as weight:
        return torch.from_numpy(weight)
