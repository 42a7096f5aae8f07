"""Many tables: a step of the 26 tables of a recommender, one batch of 2048 ids each.

The sizes are those of the Criteo Kaggle data set, hashed to at most a million rows: from 3 rows to
a million. pyembed takes the steps one by one, and with ``step_many`` in one go; FBGEMM's module is
made for many tables, and its backward over a retained graph holds the step (see `update`).

Checked before timing: the rows that a step touches, against float64, rtol 1e-5 and atol 1e-6, with
gradients whose sums are exact in any order. It refuses to time a rule that FBGEMM does not run in
parallel on a CPU: SGD and row-wise Adagrad are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import peers
from bench.harness import THREADS, Array, Contender, Row, check, timed_row

QUESTION = (
    "How fast is a step of 26 tables at once against their steps one by one, and against FBGEMM's "
    "one module of 26 tables?"
)
TABLE = "26 tables"
SIZES = (
    1460, 583, 1_000_000, 1_000_000, 305, 24, 12517, 633, 3, 93145, 5683, 1_000_000, 3194,
    27, 14992, 1_000_000, 10, 5652, 2173, 4, 1_000_000, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
BATCH = 2048
RULES = {
    "SGD": ("sgd", "EXACT_SGD"),
    "RowwiseAdagrad": ("rowwise_adagrad", "EXACT_ROWWISE_ADAGRAD"),
}
BATCHES = 8  # that take turns


def _oracle(rule: str, weight: Array, ids: Array, grad: Array) -> tuple[Array, Array]:
    """The touched rows, and what the first step makes of them, in float64."""
    rows, where = np.unique(ids, return_inverse=True)
    g = np.zeros((rows.size, grad.shape[1]))
    np.add.at(g, where, grad.astype(np.float64))
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
    """A call that takes the step, and its inputs: a retained graph for each batch."""
    torch = peers.torch()
    offsets = torch.arange(len(SIZES) * BATCH + 1)
    graphs = [made(peers.tensor(np.concatenate(ids)), offsets) for ids in batches]
    grad = peers.tensor(np.ascontiguousarray(np.concatenate(grads, axis=1)))
    return (lambda graph: graph.backward(grad, retain_graph=True)), graphs


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
        check(f"{name} {rule}", np.allclose(weight[rows], wanted, rtol=1e-5, atol=1e-6))


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
        ("pyembed step_many", at_once, many),
        ("pyembed one by one", one_by_one, single),
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
    reason = peers.why_no_fbgemm()
    if reason:
        contenders.append(Contender("FBGEMM", absent=reason))
    else:
        made = _fbgemm(rule, dim)
        backward, graphs = _backward(made, batches, grads)
        weights = [weight.detach().numpy() for weight in made.split_embedding_weights()]
        _check("FBGEMM", rule, lambda: weights, lambda: backward(graphs[0]), batches[0], grads)
        contenders.append(Contender("FBGEMM", backward, graphs))
    case: dict[str, object] = {"optimizer": rule, "N": f"26 × {BATCH}", "dim": dim}
    return timed_row(TABLE, case, contenders, (), rounds)


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Measure every case and emit its row."""
    for rule in RULES:
        for dim in (16,) if quick else (16, 64, 128):
            emit(_case(rule, dim, rounds=3 if quick else 7))
