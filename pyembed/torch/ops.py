"""The lookup, its renorm and its backward: for autograd in eager mode, and as ops for compilers.

`Lookup` is the lookup of eager mode: through the dispatcher the same call takes 16 µs more. The ops
take tensors and numbers: through them, and through a compiled graph, a layer goes as a number.
Backward of a layer over a table is its optimizer's step, or is kept for that of an `Optimizer`. It
refuses double backward.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyembed._checks import F32
from pyembed.errors import ArgumentError
from pyembed.layers import embedding
from pyembed.torch import distributed

# Numbers begin anywhere, so that a graph which was saved by another process names no layer here.
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(secrets.randbits(60))


def register(layer: Any) -> int:
    """The number by which ops know this layer, for as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _layer(number: int) -> Any:
    found = _layers.get(number)
    if found is None:
        raise ArgumentError(
            "the layer of this graph is gone; keep it alive while the graph is used, and compile "
            "or export again in another process: a graph has no rows of its own"
        )
    return found


def array_of(tensor: Tensor) -> F32:
    """Its memory, if it is on the CPU; else a copy there."""
    plain = tensor.is_cpu and not tensor.requires_grad
    array: F32 = (tensor if plain else tensor.detach().cpu()).numpy()
    return array


def _batch(core: Any, ids: Tensor, offsets: Any, weights: Any) -> Any:
    """What pyembed's layer takes: ids, or bags."""
    if isinstance(core, embedding.Embedding):
        return array_of(ids)
    arrays = [None if given is None else array_of(given) for given in (offsets, weights)]
    return core.bags(array_of(ids), *arrays)


# --- what is computed -----------------------------------------------------------------------------


def _look_up(layer: Any, weight: Tensor, ids: Tensor, offsets: Any, weights: Any) -> Tensor:
    if (ddp := DistributedDataParallel._active_ddp_module) is not None:
        distributed.join(layer, ddp)
    core = layer._over(weight)
    found = torch.from_numpy(core(_batch(core, ids, offsets, weights)))
    # A GPU copies from pinned memory without waiting; torch keeps that buffer until it has.
    return found.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else found


def _gradients(
    layer: Any, weight: Tensor, batch: Any, grad: Tensor, first: bool, second: bool
) -> tuple[Any, Any]:
    """The gradients of the weight and of per_sample_weights; that of a table it takes itself."""
    core, values = layer._over(weight), array_of(grad)
    ids, of_weight, of_weights = _batch(core, *batch), None, None
    if second:
        dots = torch.from_numpy(core.per_sample_weights_grad(ids, values))
        of_weights = dots.reshape(batch[2].shape).to(batch[2].device)
    if first and layer._in_table:
        if layer.optimizer is None:
            raise ArgumentError("the layer has no optimizer; give optimizer=, or freeze the layer")
        if layer._ranks is not None:
            ids, values = distributed.whole_batch(layer._ranks, ids, values)
        if layer._accumulates:
            layer.optimizer.accumulate(ids, values)
        else:
            layer.optimizer.step(ids, values)
            layer._changes += 1
    elif first:
        found = core.backward(ids, values)
        of_weight = _sparse(found, weight) if core.sparse else torch.from_numpy(found)
    return of_weight, of_weights


def _sparse(found: Any, weight: Tensor) -> Tensor:
    ids, values = torch.from_numpy(found.ids), torch.from_numpy(found.values)
    return torch.sparse_coo_tensor(
        ids[None], values, weight.shape, is_coalesced=True, check_invariants=False
    )


# --- autograd -------------------------------------------------------------------------------------


def _keep(ctx: Any, layer: Any, weight: Tensor, ids: Tensor, offsets: Any, weights: Any) -> None:
    ctx.layer, ctx.weight = layer, weight
    # Backward reads the rows again for these two, so they must be those that forward read.
    rereads = weights is not None or layer._is_max
    ctx.changes = layer._changes if rereads else None
    ctx.save_for_backward(ids, offsets, weights, weight if rereads else None)


def _differentiate(ctx: Any, grad: Tensor, gradients: Callable[..., Any]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise ArgumentError(
            "create_graph=True: pyembed's layers have no second derivative; allowed: "
            "create_graph=False, or torch.nn.Embedding"
        )
    *batch, _ = ctx.saved_tensors
    if ctx.changes not in (None, ctx.layer._changes):
        raise ArgumentError(
            "the table changed between forward and backward, which reads the rows again for "
            "mode='max' and per_sample_weights; call the layer once for each backward, or make a "
            "pyembed.torch.Optimizer: rows then change in its step"
        )
    first, second = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    of_weight, of_weights = gradients(ctx.layer, ctx.weight, batch, grad, first, second)
    return of_weight, None, None, of_weights, None


class Lookup(torch.autograd.Function):
    """Rows of ids, or of bags; backward gives the gradient of the weight, or steps the table."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, offsets: Any, weights: Any, layer: Any
    ) -> Tensor:
        """A fresh tensor."""
        _keep(ctx, layer, weight, ids, offsets, weights)
        return _look_up(layer, weight, ids, offsets, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """The gradient of the weight, unless it lies in a table, and of per_sample_weights."""
        return _differentiate(ctx, grad, _gradients)


# --- the ops: what torch.compile sees, and calls as it is -----------------------------------------

_BATCH = "Tensor weight, Tensor ids, Tensor? offsets, Tensor? weights, int layer"


@torch.library.custom_op(
    "pyembed::renorm_",
    mutates_args={"weight"},
    schema="(Tensor(a!) weight, Tensor ids, int layer) -> ()",
)
def renorm(weight: Tensor, ids: Tensor, layer: int) -> None:
    """`Table.renorm` of a Parameter."""
    owner = _layer(layer)
    owner._over(weight).table.renorm(array_of(ids), owner.max_norm, owner.norm_type)


@torch.library.custom_op("pyembed::rows", mutates_args=(), schema=f"({_BATCH}) -> Tensor")
def rows(weight: Tensor, *batch: Any) -> Tensor:
    """`Lookup`, for a layer by its number."""
    return _look_up(_layer(batch[-1]), weight, *batch[:-1])


@rows.register_fake
def _(weight: Tensor, ids: Tensor, offsets: Any, weights: Any, layer: int) -> Tensor:
    core, dim = _layer(layer)._core, _layer(layer).embedding_dim
    if isinstance(core, embedding.Embedding):
        return weight.new_empty((*ids.shape, dim))
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - core.include_last_offset
    return weight.new_empty((bags, dim))


@torch.library.custom_op(
    "pyembed::backward",
    mutates_args=(),
    schema=f"({_BATCH}, Tensor grad, bool first, bool second) -> (Tensor, Tensor)",
)
def backward(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """`_gradients`, for a layer by its number; what is not asked for has no elements.

    One op, so that no compiler moves the step before what reads the rows. A step has a result, so
    that none removes it.
    """
    *batch, layer, grad, first, second = given
    found = _gradients(_layer(layer), weight, batch, grad, first, second)
    of_weight, of_weights = (weight.new_empty(0) if each is None else each for each in found)
    return of_weight, of_weights


@backward.register_fake
def _(weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    _, _, weights, _, _, first, second = given
    of_weight = weight.new_empty(weight.shape if first else 0)
    return of_weight, weights.new_empty(weights.shape) if second else weight.new_empty(0)


def _keep_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *batch, ctx.number = inputs
    _keep(ctx, _layer(ctx.number), *batch)


def _differentiate_op(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    def gradients(
        layer: Any, weight: Tensor, batch: Any, grad: Tensor, first: bool, second: bool
    ) -> tuple[Any, Any]:
        if first and layer.sparse and not layer._in_table:  # no op gives a sparse tensor
            return _gradients(layer, weight, batch, grad, first, second)
        of_weight, of_weights = backward(weight, *batch, ctx.number, grad, first, second)
        # A step has no gradient to give, except while it is traced: there the result is the step.
        gives = first and not (layer._in_table and type(of_weight) is Tensor)
        return of_weight if gives else None, of_weights if second else None

    return _differentiate(ctx, grad, gradients)


rows.register_autograd(_differentiate_op, setup_context=_keep_op)
