"""Many tables: a step of the 26 tables of a recommender, one batch of 2048 ids each.

The sizes are those of the Criteo Kaggle data set, hashed to at most a million rows: from 3 rows to
a million. pyembed takes the steps one by one, and all at once with ``step_many``. FBGEMM's module
is made for many tables, and its backward over a retained graph includes the step (see `update`).
torch steps 26 existing sparse gradients in one call of its optimizer: it sums duplicates and
updates, as the others do, but the backward that creates the gradients is not counted.

Before timing, the changed rows are compared with float64, with rtol 1e-5 and atol 1e-6 (100 times
that for torch's SGD, which rounds for every occurrence); the sums of the gradients are exact in any
order. A rule that a peer does not have, or that FBGEMM runs on one thread, is not timed. The limit
is that of `update`, over the rows of all tables as one batch, grouped in advance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import limit, peers
from bench.harness import THREADS, Array, Bar, Contender, Row, check, timed_row

QUESTION = (
    "How fast is one step of 26 tables compared with 26 single steps, with FBGEMM's one module of "
    "26 tables, and with torch's sparse optimizers?"
)
TABLE = "26 tables"
SIZES = (
    1460, 583, 1_000_000, 1_000_000, 305, 24, 12517, 633, 3, 93145, 5683, 1_000_000, 3194,
    27, 14992, 1_000_000, 10, 5652, 2173, 4, 1_000_000, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
BATCH = 2048
RULES = {  # the name of the state, and the names of the rule in FBGEMM and torch
    "SGD": ("sgd", "EXACT_SGD", "SGD"),
    "Adagrad": ("adagrad", "", "Adagrad"),
    "RowwiseAdagrad": ("rowwise_adagrad", "EXACT_ROWWISE_ADAGRAD", ""),
}
AT_ONCE, ONE_BY_ONE = "pyembed step_many", "pyembed one by one"
BARS = (
    Bar(TABLE, {}, AT_ONCE, ONE_BY_ONE, 3.0),
    Bar(TABLE, {"optimizer": ("SGD", "Adagrad")}, AT_ONCE, "torch", 5.0),
)
BATCHES = 8  # that take turns


def _oracle(rule: str, weight: Array, ids: Array, grad: Array) -> tuple[Array, Array]:
    """Return the rows of a batch, and their values after the first step, in float64."""
    rows, where = np.unique(ids, return_inverse=True)
    g = np.zeros((rows.size, grad.shape[1]))
    np.add.at(g, where, grad.astype(np.float64))
    if rule == "Adagrad":
        g = g / (np.abs(g) + 1e-8)
    if rule == "RowwiseAdagrad":
        g = g / (np.sqrt(np.mean(g * g, axis=1, keepdims=True)) + 1e-8)
    return rows, weight[rows] - peers.LR * g


def _ours(rule: str, dim: int) -> list[Any]:
    import pyembed

    start = pyembed.init.uniform(-0.1, 0.1)
    tables = [
        pyembed.Table.memory(rows, dim, RULES[rule][0], init=start, seed=at, num_threads=THREADS)
        for at, rows in enumerate(SIZES)
    ]
    return [getattr(pyembed.optim, rule)(table, lr=peers.LR) for table in tables]


def _fbgemm(rule: str, dim: int) -> Any:
    module = peers.fbgemm()
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
    )

    host, cpu = EmbeddingLocation.HOST, module.ComputeDevice.CPU
    made = module.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, host, cpu) for rows in SIZES],
        optimizer=getattr(EmbOptimType, RULES[rule][1]),
        learning_rate=peers.LR,
        eps=1e-8,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=peers.torch().device("cpu"),
    )
    made.init_embedding_weights_uniform(-0.1, 0.1)
    return made


def _backward(made: Any, batches: list[list[Array]], grads: list[Array]) -> tuple[Any, list[Any]]:
    """Return a call that takes the step, and its inputs: a retained graph for each batch."""
    torch = peers.torch()
    offsets = torch.arange(len(SIZES) * BATCH + 1)
    graphs = [made(peers.tensor(np.concatenate(ids)), offsets) for ids in batches]
    grad = peers.tensor(np.ascontiguousarray(np.concatenate(grads, axis=1)))
    return (lambda graph: graph.backward(grad, retain_graph=True)), graphs


class _Torch:
    """26 weights with one sparse optimizer, and gradients that are not coalesced."""

    def __init__(self, rule: str, dim: int) -> None:
        torch = peers.torch()
        start = np.random.default_rng(0)
        parts = [start.random((rows, dim), np.float32) for rows in SIZES]
        self.weights = [torch.nn.Parameter(peers.tensor(part)) for part in parts]
        kind = getattr(torch.optim, RULES[rule][2])
        self.optimizer = kind(self.weights, lr=peers.LR, **({"eps": 1e-8} if rule != "SGD" else {}))

    def inputs(self, batches: list[list[Array]], grads: list[Array]) -> list[list[Any]]:
        sparse = peers.torch().sparse_coo_tensor
        values = [peers.tensor(grad) for grad in grads]
        return [
            [
                sparse(peers.tensor(part[None]), value, weight.shape, check_invariants=False)
                for part, value, weight in zip(ids, values, self.weights, strict=True)
            ]
            for ids in batches
        ]

    def step(self, grads: list[Any]) -> None:
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        self.optimizer.step()


def _check(
    name: str,
    rule: str,
    weights: Callable[[], list[Array]],
    step: Callable[[], object],
    ids: list[Array],
    grads: list[Array],
) -> None:
    before = [np.array(weight, np.float64) for weight in weights()]
    step()
    for at, weight in enumerate(weights()):
        rows, wanted = _oracle(rule, before[at], ids[at], grads[at])
        loose = 100 if (name, rule) == ("torch", "SGD") else 1
        close = np.allclose(weight[rows], wanted, rtol=1e-5 * loose, atol=1e-6 * loose)
        check(f"{name} {rule}", close)


def _case(rule: str, dim: int, rounds: int) -> Row:
    import pyembed

    rng = np.random.default_rng(1)
    batches = [[rng.integers(0, rows, BATCH) for rows in SIZES] for _ in range(BATCHES)]
    shape = (BATCH, dim)
    grads = [(rng.integers(-4, 4, shape) * 2 + 1).astype(np.float32) / 64 for _ in SIZES]
    many, single = _ours(rule, dim), _ours(rule, dim)

    def at_once(ids: list[Array]) -> None:
        pyembed.optim.step_many(list(zip(many, ids, grads, strict=True)))

    def one_by_one(ids: list[Array]) -> None:
        for optimizer, batch, grad in zip(single, ids, grads, strict=True):
            optimizer.step(batch, grad)

    contenders = []
    for name, call, optimizers in (
        (AT_ONCE, at_once, many),
        (ONE_BY_ONE, one_by_one, single),
    ):
        tables = [optimizer.table for optimizer in optimizers]
        _check(
            name,
            rule,
            lambda tables=tables: [table.weight for table in tables],  # type: ignore[misc]
            lambda call=call: call(batches[0]),  # type: ignore[misc]
            batches[0],
            grads,
        )
        contenders.append(Contender(name, call, batches))
    contenders += [_fbgemm_contender(rule, dim, batches, grads)]
    contenders += [_torch_contender(rule, dim, batches, grads)]
    contenders += [_limit([optimizer.table.weight for optimizer in many], rule, batches, grads)]
    case: dict[str, object] = {"optimizer": rule, "N": f"26 × {BATCH}", "dim": dim}
    return timed_row(TABLE, case, contenders, BARS, rounds)


def _fbgemm_contender(
    rule: str, dim: int, batches: list[list[Array]], grads: list[Array]
) -> Contender:
    reason = peers.why_no_fbgemm() if RULES[rule][1] else f"has no parallel {rule}"
    if reason:
        return Contender("FBGEMM", absent=reason)
    made = _fbgemm(rule, dim)
    backward, graphs = _backward(made, batches, grads)
    weights = [weight.detach().numpy() for weight in made.split_embedding_weights()]
    _check("FBGEMM", rule, lambda: weights, lambda: backward(graphs[0]), batches[0], grads)
    return Contender("FBGEMM", backward, graphs)


def _torch_contender(
    rule: str, dim: int, batches: list[list[Array]], grads: list[Array]
) -> Contender:
    torch = peers.torch()
    reason = torch if isinstance(torch, str) else "" if RULES[rule][2] else f"has no {rule}"
    if reason:
        return Contender("torch", absent=reason)
    made = _Torch(rule, dim)
    inputs = made.inputs(batches, grads)
    weights = [weight.detach().numpy() for weight in made.weights]
    _check("torch", rule, lambda: weights, lambda: made.step(inputs[0]), batches[0], grads)
    return Contender("torch", made.step, inputs)


def _limit(
    weights: list[Array], rule: str, batches: list[list[Array]], grads: list[Array]
) -> Contender:
    """Update the rows of all tables as one batch, numbered from the start of the first table.

    The contender is absent if the tables are not a whole number of rows apart: tables begin on
    pages, but not all rows do.
    """
    stride, first = weights[0].strides[0], weights[0].ctypes.data
    apart = [divmod(weight.ctypes.data - first, stride) for weight in weights]
    if any(rest for _, rest in apart):
        return Contender("limit", absent=f"rows of {stride} bytes")
    offsets = [rows for rows, _ in apart]
    joined = [
        np.concatenate([part + at for part, at in zip(ids, offsets, strict=True)])
        for ids in batches
    ]
    columns = 1 + (rule == "Adagrad")
    kept = weights[2][batches[0][2]]
    contender = limit.update(weights[0], columns, joined, np.concatenate(grads))
    check("limit", np.array_equal(kept, weights[2][batches[0][2]]))
    return contender


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Measure every case and emit its row."""
    for rule in RULES:
        for dim in (16,) if quick else (16, 64, 128):
            emit(_case(rule, dim, rounds=3 if quick else 7))
