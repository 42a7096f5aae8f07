"""The other libraries: import them, and build their tables over given memory.

FBGEMM's table is built over the caller's array. Its default is ``torch.zeros``, whose pages are all
one physical page until they are written, so that a gather from it would measure the cache. A
library that cannot be imported becomes a reason that the report shows.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np

from bench.harness import THREADS, Array, Contender, progress

LR = 0.01
POOLING = {"FBGEMM bag": "SUM", "FBGEMM nobag": "NONE"}  # two ways to look up one row per id


@cache
def torch() -> Any:
    """Return the torch module, set to all our threads, or the reason (a string) for its absence."""
    try:
        import torch as module
    except ImportError:
        return "not installed"
    module.set_num_threads(THREADS)
    return module


@cache
def fbgemm() -> Any:
    """Return the module of FBGEMM's tables, or the reason (a string) for its absence."""
    if isinstance(torch(), str):
        return "not installed"
    try:
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as module
    except ImportError:
        return "not installed"
    except (OSError, RuntimeError) as error:  # built for another torch
        progress(f"fbgemm_gpu: {error}")
        return "does not load"
    return module


def tensor(array: Array) -> Any:
    """Return the array's memory as a tensor; torch must be installed."""
    return torch().from_numpy(array)


def why_no_fbgemm() -> str:
    """Return the reason why FBGEMM cannot run, or an empty string."""
    module = fbgemm()
    return module if isinstance(module, str) else ""


def table(weight: Array, optimizer: str, pooling: str) -> Any:
    """Return an FBGEMM CPU table that trains ``weight`` in place; FBGEMM must be installed.

    ``optimizer`` and ``pooling`` name members of FBGEMM's ``EmbOptimType`` and ``PoolingMode``. Ids
    are int64 and all values fp32. Ids are not bounds-checked, which favours FBGEMM.
    """
    module = fbgemm()
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )

    rows, dim = weight.shape
    return module.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, module.ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, optimizer),
        pooling_mode=getattr(PoolingMode, pooling),
        learning_rate=LR,
        eps=1e-8,
        bounds_check_mode=BoundsCheckMode.NONE,
        preallocated_host_buffers={"weights": tensor(weight).view(-1)},
        device=torch().device("cpu"),
    )


def fbgemm_inputs(batches: list[Array]) -> list[tuple[Any, Any]]:
    """Return (ids, offsets) of each batch, as bags of one id."""
    offsets = torch().arange(len(batches[0]) + 1)
    return [(tensor(ids), offsets) for ids in batches]


def _unpack(call: Any, x: tuple[Any, ...]) -> Any:
    return call(*x)


def gathers(weight: Array, out: Array, batches: list[Array]) -> list[Contender]:
    """Return every peer's gather of ``weight[ids]``; those with an ``out=`` write into ``out``.

    numpy runs with mode="clip", its fast mode with ``out=`` (mode="raise" buffers the output).
    """
    take = partial(np.take, weight, axis=0, out=out, mode="clip")
    found = [Contender("numpy take(out=)", take, batches)]
    select, lookup = "torch index_select(out=)", "torch F.embedding"
    t = torch()
    if isinstance(t, str):
        found += [Contender(select, absent=t), Contender(lookup, absent=t)]
    else:
        w, o = tensor(weight), tensor(out)
        tensors = [tensor(ids) for ids in batches]
        found.append(Contender(select, lambda ids: t.index_select(w, 0, ids, out=o), tensors))
        found.append(Contender(lookup, partial(t.nn.functional.embedding, weight=w), tensors))
    reason = why_no_fbgemm()
    for name, pooling in POOLING.items():
        if reason:
            found.append(Contender(name, absent=reason))
            continue
        inputs = fbgemm_inputs(batches)
        module = table(weight, "EXACT_SGD", pooling)
        found.append(Contender(name, partial(_unpack, module), inputs))
    return found
