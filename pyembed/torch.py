"""torch.nn layers over a `Table`: pyembed's lookups for autograd, torch.compile and nn.Module.

The only file that imports torch (2.4 or newer); no file imports this one. A layer has its rows

- in a Parameter, as torch.nn has, and torch's own optimizers update it: in memory, no `optimizer=`;
- or in a table, which backward updates at once: with `optimizer=`, or frozen. Torch gets copies of
  rows, never the table: a read-only one cannot be written, and nothing of its size is made.

It refuses double backward, and what cannot be: a Parameter in a file, a second writer of one.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from pyembed import embedding, embedding_bag, residency
from pyembed.arrays import F32
from pyembed.errors import ArgumentError, DTypeError
from pyembed.optimizer import Optimizer
from pyembed.table import Table

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Embedding", "EmbeddingBag"]

STATE_SHARE = 0.5  # of the memory: a copy of a file's weight that is larger is no part of a state
Path = str | os.PathLike[str]
MakeOptimizer = Callable[[embedding.Layer], Optimizer]

# Ops take tensors and numbers: through them, and a compiled graph, a layer goes as a number.
_layers: weakref.WeakValueDictionary[int, _Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


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


class _Layer(nn.Module):
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
        if place.type not in ("cpu", "cuda"):
            raise ArgumentError(f"device = {place}; allowed: 'cpu', 'cuda'")
        if weight is not None and getattr(weight, "type", str)() != "torch.FloatTensor":
            raise DTypeError(f"_weight is a {_kind(weight)}; allowed: a float32 Tensor on the CPU")
        fresh = weight is None and table is None and path is None
        if weight is not None:
            table = Table.from_array(_array(weight))
        elif table is None:
            table = Table.memory(*shape) if path is None else Table.open(path, mode)
        self.in_state_dict = True  # False: the table is its own checkpoint
        self._changes = 0  # so that a backward which reads rows again knows that they are others
        try:
            self._core = self._core_class(**settings, table=table)
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
        plain = table.path is None and table.writable and place.type == "cpu"
        learns = not self._core.frozen
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
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def table(self) -> Table:
        """Where the rows are; without `optimizer=`, a table over the Parameter's memory."""
        table: Table = self._over(self.weight).table
        return table

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
        return ", ".join([shape or repr(self.table), *self._core._settings(), *last])

    # --- lookups ------------------------------------------------------------------------------

    def _look_up(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        weight = self._anchor if self._in_table else self.weight
        places = ("cpu", "cuda") if self._in_table else ("cpu",)
        for given in (weight, ids, offsets, weights):
            if given is not None and not isinstance(given, Tensor):
                raise DTypeError(f"the input is a {type(given).__name__}; allowed: Tensors")
            if given is not None and given.device.type not in places:
                raise ArgumentError(
                    f"a tensor is on {given.device}; allowed: {', '.join(places)}; rows of a layer "
                    "with optimizer= and device='cuda' stay in memory, and go to the GPU as copies"
                )
        if weight.dtype != torch.float32:
            raise DTypeError(f"the layer was cast to {weight.dtype}; allowed: float32; cast rows")
        if self._core.max_norm is not None and not self._in_table:
            with torch.no_grad():
                _renorm(weight, ids, self._number)
        rows: Tensor = _rows(weight, ids, offsets, weights, self._number)
        return rows

    def _over(self, weight: Tensor) -> Any:
        """pyembed's layer, over the table or this Parameter."""
        if self._in_table:
            return self._core
        core = copy.copy(self._core)
        core.max_norm = None  # _renorm has seen to it
        core.table = Table.from_array(_array(weight))
        return core

    # --- torch's protocols --------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        if self._in_table and self.table.path is not None and self.table.writable:
            raise ArgumentError(
                f"{self.table.path} is written by this layer, and has one writer; share the layer, "
                "or call table.close(), copy the folder, and open the copy with path="
            )
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._in_table:
            return
        del destination[prefix + "_anchor"]
        if not self.in_state_dict:
            return
        weight, path = self.table.weight, self.table.path
        if path is not None and weight.size * 4 > STATE_SHARE * residency.memory_bytes():
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


class Embedding(_Layer):
    """`torch.nn.Embedding` over a table.

    Parameters
    ----------
    num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
    _weight, _freeze
        As in torch, by the rules of docs/torch-compatibility.md.
    device : "cpu" or "cuda"
        Where rows that were looked up go; "cuda" takes `optimizer`, or a frozen layer.
    dtype, table
        As for `pyembed.Embedding`.
    path : path-like, optional
        A table's folder; opened for reading if frozen.
    optimizer : callable, optional
        A class of `pyembed.optim`, or a `functools.partial` of one: it is called with pyembed's
        layer. Backward then updates the table, in one step for each call of the layer. Without it
        `weight` is a Parameter.

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
        return self._look_up(input, None, None)


class EmbeddingBag(_Layer):
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
        return self._look_up(input, offsets, per_sample_weights)


def _kind(value: Any) -> str:
    shape = tuple(getattr(value, "shape", ()))
    return f"{getattr(value, 'dtype', '')} {type(value).__name__} of shape {shape}".strip()


def _array(tensor: Tensor) -> F32:
    """Its memory, if it is on the CPU; else a copy there."""
    array: F32 = tensor.detach().cpu().numpy()
    return array


def _shared(table: Table) -> Tensor:
    """The rows of a table in memory as a tensor, without a copy; a read-only one refuses."""
    with table.writing() as weight:
        return torch.from_numpy(weight)


# --- the ops: what torch.compile sees, and calls as it is -----------------------------------------

_BATCH = "Tensor weight, Tensor ids, Tensor? offsets, Tensor? weights, int layer"


def _batch(core: Any, ids: Tensor, offsets: Any, weights: Any, layer: int) -> Any:
    """What pyembed's layer takes: ids, or bags."""
    if isinstance(core, embedding.Embedding):
        return _array(ids)
    arrays = [None if given is None else _array(given) for given in (offsets, weights)]
    return core.bags(_array(ids), *arrays)


@torch.library.custom_op(
    "pyembed::renorm_",
    mutates_args={"weight"},
    schema="(Tensor(a!) weight, Tensor ids, int layer) -> ()",
)
def _renorm(weight: Tensor, ids: Tensor, layer: int) -> None:
    owner = _layers[layer]
    owner._over(weight).table.renorm(_array(ids), owner.max_norm, owner.norm_type)


@torch.library.custom_op("pyembed::rows", mutates_args=(), schema=f"({_BATCH}) -> Tensor")
def _rows(weight: Tensor, *batch: Any) -> Tensor:
    core = _layers[batch[-1]]._over(weight)
    rows = torch.from_numpy(core(_batch(core, *batch)))
    # A GPU copies from pinned memory without waiting; torch keeps that buffer until it has.
    return rows.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else rows


@_rows.register_fake
def _(weight: Tensor, ids: Tensor, offsets: Any, weights: Any, layer: int) -> Tensor:
    core, dim = _layers[layer]._core, _layers[layer].embedding_dim
    if isinstance(core, embedding.Embedding):
        return weight.new_empty((*ids.shape, dim))
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - core.include_last_offset
    return weight.new_empty((bags, dim))


@torch.library.custom_op(
    "pyembed::backward",
    mutates_args=(),
    schema=f"({_BATCH}, Tensor grad, bool first, bool second) -> (Tensor, Tensor)",
)
def _backward(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """The gradients of the weight and of per_sample_weights; or a step of the table, after both.

    One op, so that no compiler moves the step before what reads the rows. A step has a result,
    without elements, so that none removes it.
    """
    *batch, grad, first, second = given
    owner, values = _layers[batch[-1]], _array(grad)
    core = owner._over(weight)
    ids = _batch(core, *batch)
    of_weight, of_weights = weight.new_empty(0), weight.new_empty(0)
    if second:
        dots = torch.from_numpy(core.per_sample_weights_grad(ids, values))
        of_weights = dots.reshape(batch[2].shape).to(batch[2].device)
    if first and owner._in_table:
        if owner.optimizer is None:
            raise ArgumentError("the layer has no optimizer; give optimizer=, or freeze the layer")
        owner.optimizer.step(ids, values)
        owner._changes += 1
    elif first:
        of_weight = torch.from_numpy(core.backward(ids, values))
    return of_weight, of_weights


@_backward.register_fake
def _(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    _, _, weights, _, _, first, second = given
    of_weight = weight.new_empty(weight.shape if first else 0)
    return of_weight, weights.new_empty(weights.shape) if second else weight.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, offsets, weights, number = inputs
    ctx.layer, ctx.number, ctx.weight = _layers[number], number, weight
    # Backward reads the rows again for these two, so they must be those that forward read.
    ctx.rereads = weights is not None or getattr(ctx.layer, "mode", "") == "max"
    ctx.changes = ctx.layer._changes
    ctx.save_for_backward(ids, offsets, weights, weight if ctx.rereads else None)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise ArgumentError(
            "create_graph=True: pyembed's layers have no second derivative; allowed: "
            "create_graph=False, or torch.nn.Embedding"
        )
    layer, weight = ctx.layer, ctx.weight
    ids, offsets, weights, _ = ctx.saved_tensors
    if ctx.rereads and ctx.changes != layer._changes:
        raise ArgumentError(
            "the table changed between forward and backward, which reads the rows again for "
            "mode='max' and per_sample_weights; call the layer once for each backward"
        )
    first, second = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    batch = (ids, offsets, weights, ctx.number)
    sparse = first and layer.sparse and not layer._in_table
    of_weight, of_weights = _backward(weight, *batch, grad, first and not sparse, second)
    if sparse:
        of_weight = _sparse_gradient(layer._over(weight), weight, grad, batch)
    # A step has no gradient to give, except while it is traced: there the result is the step.
    elif not first or (layer._in_table and type(of_weight) is Tensor):
        of_weight = None
    return of_weight, None, None, of_weights if second else None, None


def _sparse_gradient(core: Any, weight: Tensor, grad: Tensor, batch: tuple[Any, ...]) -> Tensor:
    found = core.backward(_batch(core, *batch), _array(grad))
    ids, values = torch.from_numpy(found.ids), torch.from_numpy(found.values)
    return torch.sparse_coo_tensor(
        ids[None], values, weight.shape, is_coalesced=True, check_invariants=False
    )


_rows.register_autograd(_differentiate, setup_context=_keep)
