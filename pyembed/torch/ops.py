"""The ops under the layers: lookup, renorm and backward, for autograd and for torch.compile.

Ops take tensors and numbers: through them, and through a compiled graph, a layer goes as a number.
Backward of a layer over a table is its optimizer's step. It refuses double backward.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from pyembed import embedding
from pyembed.arrays import F32
from pyembed.errors import ArgumentError

_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Any) -> int:
    """The number by which ops know this layer, for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def array_of(tensor: Tensor) -> F32:
    """Its memory, if it is on the CPU; else a copy there."""
    array: F32 = tensor.detach().cpu().numpy()
    return array


_BATCH = "Tensor weight, Tensor ids, Tensor? offsets, Tensor? weights, int layer"


def _batch(core: Any, ids: Tensor, offsets: Any, weights: Any, layer: int) -> Any:
    """What pyembed's layer takes: ids, or bags."""
    if isinstance(core, embedding.Embedding):
        return array_of(ids)
    arrays = [None if given is None else array_of(given) for given in (offsets, weights)]
    return core.bags(array_of(ids), *arrays)


@torch.library.custom_op(
    "pyembed::renorm_",
    mutates_args={"weight"},
    schema="(Tensor(a!) weight, Tensor ids, int layer) -> ()",
)
def renorm(weight: Tensor, ids: Tensor, layer: int) -> None:
    owner = _layers[layer]
    owner._over(weight).table.renorm(array_of(ids), owner.max_norm, owner.norm_type)


@torch.library.custom_op("pyembed::rows", mutates_args=(), schema=f"({_BATCH}) -> Tensor")
def rows(weight: Tensor, *batch: Any) -> Tensor:
    core = _layers[batch[-1]]._over(weight)
    found = torch.from_numpy(core(_batch(core, *batch)))
    # A GPU copies from pinned memory without waiting; torch keeps that buffer until it has.
    return found.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else found


@rows.register_fake
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
    owner, values = _layers[batch[-1]], array_of(grad)
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
    found = core.backward(_batch(core, *batch), array_of(grad))
    ids, values = torch.from_numpy(found.ids), torch.from_numpy(found.values)
    return torch.sparse_coo_tensor(
        ids[None], values, weight.shape, is_coalesced=True, check_invariants=False
    )


rows.register_autograd(_differentiate, setup_context=_keep)
