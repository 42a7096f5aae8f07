"""The lookup, its renorm and its backward: for autograd in eager mode, and as ops for compilers.

`Lookup` serves eager mode: the same call through torch's dispatcher takes 16 µs more. The ops
receive tensors and numbers; they refer to the rows of a layer by the number of its `Rows`.
Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyembed.errors import ArgumentError
from pyembed.torch.rows import Rows, array_of, numbered

# --- computation ----------------------------------------------------------------------------------


def _look_up(rows: Rows, weight: Tensor, ids: Tensor, offsets: Any, weights: Any) -> Tensor:
    if (ddp := DistributedDataParallel._active_ddp_module) is not None:
        rows.join(ddp)
    found = torch.from_numpy(rows.layer_over(weight)(rows.batch(ids, offsets, weights)))
    # A GPU copies from pinned memory asynchronously; torch keeps the buffer until the copy is done.
    return found.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else found


def _gradients(rows: Rows, weight: Tensor, given: Any, grad: Tensor, needs: Any) -> Any:
    """Return the gradients of the weight and of per_sample_weights; None where not needed."""
    core, values, batch = rows.layer_over(weight), array_of(grad), rows.batch(*given)
    of_weights = None
    if needs[1]:
        products = torch.from_numpy(core.per_sample_weights_grad(batch, values))
        of_weights = products.reshape(given[2].shape).to(given[2].device)
    return rows.gradient(core, batch, values) if needs[0] else None, of_weights


# --- autograd -------------------------------------------------------------------------------------


def _keep(ctx: Any, rows: Rows, weight: Tensor, ids: Tensor, offsets: Any, weights: Any) -> None:
    ctx.rows, ctx.weight = rows, weight
    # Backward reads the rows again in these two cases, and must find those that forward read.
    rereads = weights is not None or rows.rereads
    ctx.version = rows.version if rereads else None
    ctx.save_for_backward(ids, offsets, weights, weight if rereads else None)


def _differentiate(ctx: Any, grad: Tensor, gradients: Callable[..., Any]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise ArgumentError("create_graph=True needs a second derivative; use torch.nn.Embedding")
    *batch, _ = ctx.saved_tensors
    if ctx.version not in (None, ctx.rows.version):
        raise ArgumentError(
            "the table changed between forward and backward, which reads rows again for mode='max' "
            "or per_sample_weights; make a pyembed.torch.Optimizer: rows change in its step only"
        )
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    of_weight, of_weights = gradients(ctx.rows, ctx.weight, batch, grad, needs)
    return of_weight, None, None, of_weights, None


class Lookup(torch.autograd.Function):
    """Look up rows or bags; backward returns the gradient of the weight, or steps the table."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, offsets: Any, weights: Any, rows: Rows
    ) -> Tensor:
        """Return a fresh tensor."""
        _keep(ctx, rows, weight, ids, offsets, weights)
        return _look_up(rows, weight, ids, offsets, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of the weight (None if it lives in a table) and of the weights."""
        return _differentiate(ctx, grad, _gradients)


# --- the ops, which torch.compile calls without tracing into them ---------------------------------

_BATCH = "Tensor weight, Tensor ids, Tensor? offsets, Tensor? weights, int layer"


@torch.library.custom_op(
    "pyembed::renorm_",
    mutates_args={"weight"},
    schema="(Tensor(a!) weight, Tensor ids, int layer) -> ()",
)
def renorm(weight: Tensor, ids: Tensor, layer: int) -> None:
    """Scale the rows of a Parameter, as `Table.renorm` does."""
    rows = numbered(layer)
    core = rows.core
    rows.layer_over(weight).table.renorm(array_of(ids), core.max_norm, core.norm_type)


@torch.library.custom_op("pyembed::rows", mutates_args=(), schema=f"({_BATCH}) -> Tensor")
def look_up(weight: Tensor, *batch: Any) -> Tensor:
    """Do what `Lookup` does, for a layer by its number."""
    return _look_up(numbered(batch[-1]), weight, *batch[:-1])


@look_up.register_fake
def _(weight: Tensor, ids: Tensor, offsets: Any, weights: Any, layer: int) -> Tensor:
    rows = numbered(layer)
    dim = rows.core.table.dim if rows.in_table else weight.shape[1]
    if not rows.is_bag:
        return weight.new_empty((*ids.shape, dim))
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - rows.core.include_last_offset
    return weight.new_empty((bags, dim))


@torch.library.custom_op(
    "pyembed::backward",
    mutates_args=(),
    schema=f"({_BATCH}, Tensor grad, bool first, bool second) -> (Tensor, Tensor)",
)
def backward(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Return both gradients, for a layer by its number; one that is not asked for is empty.

    Both come from one op, so that no compiler moves the step of a table before the reading of its
    rows. A step has a result, so that no compiler removes it.
    """
    *batch, layer, grad, first, second = given
    found = _gradients(numbered(layer), weight, batch, grad, (first, second))
    of_weight, of_weights = (weight.new_empty(0) if each is None else each for each in found)
    return of_weight, of_weights


@backward.register_fake
def _(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    _, _, weights, _, _, first, second = given
    of_weight = weight.new_empty(weight.shape if first else 0)
    return of_weight, weights.new_empty(weights.shape) if second else weight.new_empty(0)


def _keep_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *batch, number = inputs
    _keep(ctx, numbered(number), *batch)


def _gradients_by_op(rows: Rows, weight: Tensor, batch: Any, grad: Tensor, needs: Any) -> Any:
    if needs[0] and rows.sparse:  # an op cannot return a sparse tensor
        return _gradients(rows, weight, batch, grad, needs)
    of_weight, of_weights = backward(weight, *batch, rows.number, grad, *needs)
    # A step has no gradient, except while it is traced: the graph then needs its result.
    has_gradient = needs[0] and not (rows.in_table and type(of_weight) is Tensor)
    return of_weight if has_gradient else None, of_weights if needs[1] else None


def _differentiate_op(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _differentiate(ctx, grad, _gradients_by_op)


look_up.register_autograd(_differentiate_op, setup_context=_keep_op)
