"""`layer.weight` of a layer whose rows live in a table: it acts as a tensor, and is not one.

A tensor over a mapped file could be written past the rollback journal, and an optimizer of torch
would accept it without effect. This object gives an operation of torch a tensor for the length of
the call. An assignment reaches the rows, or raises an error that names the remedy.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyembed.errors import ArgumentError
from pyembed.storage import page_cache
from pyembed.torch import ops
from pyembed.torch.rows import STATE_SHARE, Rows

# Attributes that depend on the shape alone, so that they are answered without a row.
OF_SHAPE = {
    *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "element_size"),
    *("dtype", "device", "layout", "is_cpu", "is_cuda", "is_sparse", "is_leaf", "grad"),
    *("is_floating_point", "is_complex"),
}
IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
OPERATORS = (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__neg__", "__abs__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__pow__", "__matmul__", "__rmatmul__", "__float__", "__int__", "__bool__"),
    *("__len__", "__contains__"),
)


class WeightInTable:
    """The weight of a table, or a part of it, for operations of torch.

    Parameters
    ----------
    rows : Rows
        Has the table.
    anchor : Parameter or None
        While it requires grad, a gradient of the weight is an error. None for `data` and `detach`.
    index : int, slice or tuple of them
        Part of the weight.
    """

    __slots__ = ("anchor", "index", "rows")

    def __init__(self, rows: Rows, anchor: nn.Parameter | None, index: Any = ...) -> None:
        for name, value in (("rows", rows), ("anchor", anchor), ("index", index)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"<weight of {self.rows.core.table!r}>"

    def __hash__(self) -> int:
        return hash(self.rows)

    def is_same(self, other: Any) -> bool:
        """Tell whether another object is the same part of the same weight."""
        same = isinstance(other, WeightInTable) and other.rows is self.rows
        return same and bool(other.index == self.index)

    # --- access to the rows -------------------------------------------------------------------

    def _readable(self) -> Tensor:
        """Return the rows: those of a writable table in memory without a copy, others as a copy."""
        table = self.rows.core.table
        if table.path is None and table.writable:
            found = self.rows.shared()[self.index]
        else:
            part = table.weight[self.index]
            if part.size * 4 > STATE_SHARE * page_cache.memory_bytes():
                raise ArgumentError(
                    f"the weight takes {part.size * 4} bytes in {table.path}, too many for a copy; "
                    "use it in blocks: layer.weight[first:last]"
                )
            found = torch.from_numpy(np.array(part))
        if self.requires_grad and torch.is_grad_enabled():
            found = _Unreachable.apply(self.anchor, found)  # type: ignore[no-untyped-call]
        return found

    def _write(self, func: Any, args: Any, kwargs: Any) -> WeightInTable:
        if (path := self.rows.core.table.path) is not None:
            raise ArgumentError(
                f"torch would overwrite rows in {path}, which keeps them from run to run: skip the "
                "layer where the model is initialised, and set rows with layer.load_state_dict() "
                "or with layer.table.writing(row_ids)"
            )
        target = self.rows.shared()[self.index]

        def replaced(each: Any) -> Any:
            if each is self:
                return target
            return each._readable() if isinstance(each, WeightInTable) else each

        with torch.no_grad():
            func(*tree_map(replaced, args), **tree_map(replaced, kwargs))
        self.rows.version += 1
        return self

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, target = func.__name__, kwargs.get("out")
        if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, cls):
            return target._write(func, args, kwargs)
        return _read(func, args, kwargs)

    # --- the attributes of a tensor -----------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether the rows learn; an assignment freezes the layer, or unfreezes it."""
        return self.anchor is not None and self.anchor.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> WeightInTable:
        """Freeze the layer, or unfreeze it."""
        if self.anchor is None or self.index is not ...:
            raise ArgumentError("requires_grad of a part of the weight; use layer.requires_grad_()")
        self.anchor.requires_grad_(requires_grad)
        return self

    def detach(self) -> WeightInTable:
        """Return the same weight, without gradients."""
        return WeightInTable(self.rows, None, self.index)

    data = property(detach)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        elif name != "data":
            raise ArgumentError(f"weight.{name} cannot be set; allowed: data, requires_grad")
        elif not self.is_same(value):
            if value.shape != self.shape:
                raise ArgumentError(
                    f"data of shape {tuple(value.shape)}; allowed: {tuple(self.shape)}"
                )
            self.copy_(value)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)  # an AttributeError names a tensor, as users expect
        if name.startswith("__"):
            raise AttributeError(name)
        if name in OF_SHAPE:
            table = self.rows.core.table
            device = "cpu" if self.anchor is None else self.anchor.device
            shaped = torch.empty(1, device=device).expand(table.rows, table.dim)
            return getattr(shaped[self.index], name)
        if callable(attribute):
            return partial(_call, attribute, self)
        return _read(getattr, (self, name), {})

    def __getitem__(self, index: Any) -> Any:
        if self.index is ... and _is_basic(index):
            return WeightInTable(self.rows, self.anchor, index)
        ids = isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8)
        if ids and self.requires_grad and self.index is ... and not self.rows.is_bag:
            return ops.Lookup.apply(self.anchor, index, None, None, self.rows)  # type: ignore[no-untyped-call]
        return _call(Tensor.__getitem__, self, index)

    def __iter__(self) -> NoReturn:
        raise ArgumentError(
            "the weight lives in a table, which updates itself or is frozen; give torch's "
            "optimizers the other parameters, and read rows with weight[first:last]"
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.array(self.detach()._readable().numpy(), *args, **kwargs)

    # A copy is a tensor.

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    return WeightInTable.__torch_function__(func, (), args, kwargs)


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function with rows in place of the weights among its arguments."""
    copies: set[int] = set()  # of rows in files, in which a write would be lost

    def rows_of(each: Any) -> Any:
        if not isinstance(each, WeightInTable):
            return each
        found = each._readable()
        if each.rows.core.table.path is not None:
            copies.add(found.untyped_storage().data_ptr())
        return found

    def protected(each: Any) -> Any:
        if not copies or not isinstance(each, Tensor) or each.requires_grad:
            return each
        if each.untyped_storage().data_ptr() not in copies:
            return each
        with torch.inference_mode():  # torch refuses to write to this clone
            return each.clone()

    return tree_map(protected, func(*tree_map(rows_of, args), **tree_map(rows_of, kwargs)))


def _is_basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(each is ... or type(each) in (int, slice) for each in parts)


class _Unreachable(torch.autograd.Function):
    """Rows whose gradient is an error, because it would be lost."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor) -> Tensor:
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise ArgumentError(
            "a gradient reached layer.weight, but rows in a table learn from layer(ids) only: use "
            "layer.weight.detach() where they are constant, or a layer without optimizer=, whose "
            "weight is a Parameter, to tie it or to score against all rows"
        )


def _operator(name: str) -> Any:
    return lambda self, *args: _call(getattr(Tensor, name), self, *args)


for _name in (*IN_PLACE, *OPERATORS):
    setattr(WeightInTable, _name, _operator(_name))
