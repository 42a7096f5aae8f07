"""Layers: the operations of a layer other than lookup and step; all libraries share the memory.

*renorm*: in every call, half of the rows exceed the norm. The norm falls by 0.05 % per call, so
that a row that was scaled exceeds it again; the other half stays far below. The gather of the same
ids, which reads as many rows and writes all of them, is shown for comparison.
*bags*: each bag of 20 ids becomes one row. With padding, a tenth of the ids are the padding row.
*bag step*: Adagrad, from the gradient of bags of 16 ids to changed rows, without the forward pass.
FBGEMM: its backward over a retained graph, with row-wise Adagrad (half our bytes), see ``update``.
*backward*: the gradient of a table of 1 M rows. torch: ``autograd.grad`` over a retained graph; the
sparse gradient is coalesced, since ours has unique rows.
*init*: an array of 64 M floats, filled in place again and again; the limit stores a constant.

Before timing, renorm, sums and means are compared with float64; maxima and gradients (odd multiples
of 1/64, so that sums are exact) bit for bit; bag steps as in ``update``. Random values are checked
by their mean and deviation, and that all were written. The cell of a peer that lacks an operation
says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import limit, peers, update, workloads
from bench.harness import THREADS, Array, Bar, Contender, Row, aligned, check, timed_row

QUESTION = (
    "How fast are the other operations of the layers: bags, renorm, dense and sparse backward, "
    "initialisers?"
)
RENORM, BAGS, STEP, BACKWARD, INIT = "renorm", "bags", "bag step", "backward", "init"
OURS, GATHER, TORCH, FBGEMM = "pyembed", "pyembed gather", "torch", "FBGEMM"
ROWS, DIM, N = update.ROWS, update.DIM, 65536
MILLIONS = f"{ROWS / 1e6:.3g} M"
BAGS_READ, BAGS_TRAINED = (2048, 20), (4096, 16)  # bags, ids in each
BACKWARD_ROWS, INIT_ROWS = 1_000_000, 1_000_000
PADDING, PADDED = 7, "10 %"  # the row, and its share of the ids
SUMS = ("sum", "mean")
BARS = (
    Bar(RENORM, {}, OURS, TORCH, 40.0),
    Bar(RENORM, {}, OURS, GATHER, 0.6),
    Bar(BAGS, {"mode": SUMS, "padding": ("none",)}, OURS, "best peer", 1.0),
    Bar(BAGS, {"mode": SUMS, "padding": (PADDED,)}, OURS, TORCH, 6.0),
    Bar(BAGS, {"mode": ("max",)}, OURS, TORCH, 10.0),
    Bar(STEP, {}, OURS, FBGEMM, 1.0),
    Bar(BACKWARD, {"gradient": ("dense",)}, OURS, TORCH, 2.0),
    Bar(BACKWARD, {"gradient": ("sparse",)}, OURS, TORCH, 3.0),
    Bar(INIT, {"values": ("normal",)}, OURS, TORCH, 5.0),
    Bar(INIT, {"values": ("uniform",)}, OURS, "limit", 0.9),
)
Made = tuple[Callable[[Any], Any], Sequence[Any]]  # a call and its inputs
Parts = Iterator[tuple[str, Mapping[str, object], list[Contender]]]  # table, case, contenders


def _batches(quick: bool, rows: int, n: int, dim: int = DIM) -> list[Array]:
    """Return uniform ids that together read 128 MB of rows; 64 MB if quick."""
    how_many = ((64 if quick else 128) << 20) // (4 * n * dim)
    return list(workloads.batches("uniform", rows, n, how_many))


def _tensors(batches: Sequence[Array]) -> list[Any]:
    return [peers.tensor(ids) for ids in batches]


def _weight(rows: int, dim: int = DIM) -> Array:
    weight = aligned((rows, dim))
    np.random.default_rng(0).random(dtype=np.float32, out=weight)
    return weight


def _gradient(n: int) -> Array:
    """Return odd multiples of 1/64: their sums are exact in any order."""
    odd = np.random.default_rng(3).integers(-4, 4, (n, DIM), dtype=np.int8) * 2 + 1
    return np.divide(odd, 64, out=aligned((n, DIM)))


def _torch(make: Callable[[Any], Made]) -> Contender:
    """Build the contender of torch by ``make(torch)``; without torch it is absent."""
    t = peers.torch()
    return Contender(TORCH, absent=t) if isinstance(t, str) else Contender(TORCH, *make(t))


def _renorm(quick: bool) -> Parts:
    import pyembed

    weight, out, norms = _weight(ROWS), aligned((N, DIM)), [1.0]
    weight[::2] *= 1e-3  # a norm of 0.005; that of the others is 4.6
    table = pyembed.Table.from_array(weight, num_threads=THREADS)
    batches = _batches(quick, ROWS, N)

    def norm() -> float:
        norms[0] *= 0.9995
        return norms[0]

    def torch(t: Any) -> Made:
        w = peers.tensor(weight)
        return lambda ids: t.embedding_renorm_(w, ids, norm(), 2.0), _tensors(batches)

    ours = Contender(OURS, lambda ids: table.renorm(ids, norm()), batches)
    gather = Contender(GATHER, partial(table.gather, out=out), batches)
    contenders = [ours, _torch(torch), gather]
    rows = np.unique(batches[0])
    for c in contenders[:2]:
        if c.call is None:
            continue
        before = weight[rows].astype(np.float64)
        size = np.linalg.norm(before, axis=1)
        c.call(c.inputs[0])
        check(f"{c.name} (half of the rows)", np.array_equal(size > norms[0], rows % 2 == 1))
        wanted = before * np.where(rows % 2 == 1, norms[0] / (size + 1e-7), 1)[:, None]
        check(c.name, np.allclose(weight[rows], wanted, rtol=1e-6, atol=0))
    check(GATHER, np.array_equal(table.gather(batches[0], out=out), weight[batches[0]]))
    yield RENORM, {"N": N, "dim": DIM, "rows": MILLIONS, "over the norm": "50 %"}, contenders
    check("the norm, which fell to the lower half,", norms[0] > 0.02)


def _bag_oracle(weight: Array, ids: Array, mode: str) -> Array:
    """Reduce bags in float64 without the row PADDING, which only padded bags contain."""
    rows = weight[ids].astype(np.float64).reshape(*BAGS_READ, -1)
    kept = (ids != PADDING).reshape(*BAGS_READ, 1)
    if mode == "max":
        return np.asarray(rows.max(axis=1))
    count = kept.sum(axis=1).clip(1) if mode == "mean" else 1
    return np.asarray(np.sum(rows * kept, axis=1) / count)


def _bag_contenders(
    weight: Array, mode: str, padding: int | None, batches: list[Array]
) -> list[Contender]:
    import pyembed

    bags, length = BAGS_READ
    offsets = np.arange(bags + 1) * length
    table = pyembed.Table.from_array(weight, num_threads=THREADS)
    layer = pyembed.EmbeddingBag.from_pretrained(table, mode=mode, padding_idx=padding)

    def torch(t: Any) -> Made:
        how = {"offsets": peers.tensor(offsets[:-1]), "mode": mode, "padding_idx": padding}
        reduce = t.nn.functional.embedding_bag
        return partial(reduce, weight=peers.tensor(weight), **how), _tensors(batches)

    found = [Contender(OURS, partial(layer, offsets=offsets[:-1]), batches), _torch(torch)]
    lacks = "has no max" if mode == "max" else "" if padding is None else "has no padding"
    if lacks or peers.why_no_fbgemm():
        return [*found, Contender(FBGEMM, absent=lacks or peers.why_no_fbgemm())]
    module, at = peers.table(weight, "EXACT_SGD", mode.upper()), peers.tensor(offsets)
    forward = peers.torch().no_grad()(lambda ids: module(ids, at))
    return [*found, Contender(FBGEMM, forward, _tensors(batches))]


def _bags(quick: bool) -> Parts:
    for dim in (64,) if quick else (64, 128):
        weight = _weight(ROWS, dim)
        plain = _batches(quick, ROWS, BAGS_READ[0] * BAGS_READ[1], dim)
        plain = [np.where(ids == PADDING, PADDING + 1, ids) for ids in plain]
        rng = np.random.default_rng(4)
        padded = [np.where(rng.random(ids.size) < 0.1, PADDING, ids) for ids in plain]
        for mode, padding in (*((m, None) for m in (*SUMS, "max")), *((m, PADDING) for m in SUMS)):
            batches = plain if padding is None else padded
            contenders = _bag_contenders(weight, mode, padding, batches)
            wanted = _bag_oracle(weight, batches[0], mode)
            loose = 0.0 if mode == "max" else 1e-5
            for c in contenders:
                if c.call is not None:
                    result = np.asarray(c.call(c.inputs[0]))
                    check(f"{c.name} {mode}", np.allclose(result, wanted, rtol=loose, atol=loose))
            case = {"mode": mode, "padding": "none" if padding is None else PADDED}
            case["bags"] = f"{BAGS_READ[0]} of {BAGS_READ[1]}"
            yield BAGS, case | {"dim": dim, "rows": MILLIONS}, contenders


class _OurBags(update.Pyembed):
    def __init__(self, mode: str) -> None:
        import pyembed

        super().__init__("Adagrad")
        self.layer = pyembed.EmbeddingBag.from_pretrained(self.table, freeze=False, mode=mode)
        self.optimizer = pyembed.optim.Adagrad(self.layer, lr=peers.LR)
        self.offsets = np.arange(BAGS_TRAINED[0]) * BAGS_TRAINED[1]

    def apply(self, x: Array) -> None:
        self.optimizer.step(self.layer.bags(x, self.offsets), self.grad)


class _FbgemmBags(update.Fbgemm):
    def __init__(self, mode: str, weight: Array) -> None:
        self.name, self.rule = FBGEMM, "RowwiseAdagrad"
        self.table = peers.table(weight, "EXACT_ROWWISE_ADAGRAD", mode.upper())

    def use(self, batches: list[Array], grad: Array) -> tuple[Sequence[Any], Sequence[Any]]:
        self.grad = peers.tensor(grad)
        offsets = peers.tensor(np.arange(BAGS_TRAINED[0] + 1) * BAGS_TRAINED[1])
        return (), [self.table(peers.tensor(ids), offsets) for ids in batches]


def _bag_step(quick: bool) -> Parts:
    bags, length = BAGS_TRAINED
    batches, grad, weight = _batches(quick, ROWS, bags * length), _gradient(bags), _weight(ROWS)
    reason = peers.why_no_fbgemm()
    for mode in SUMS[:1] if quick else SUMS:
        each = np.repeat(grad / (length if mode == "mean" else 1), length, axis=0)
        trainers: list[Any] = [_OurBags(mode), *([] if reason else [_FbgemmBags(mode, weight)])]
        contenders = [Contender(FBGEMM, absent=reason)] if reason else []
        for t in reversed(trainers):
            inputs = t.use(batches, grad)[1]
            update.check_step(t, t.apply, inputs[0], batches[0], each)
            contenders.insert(0, Contender(t.name, t.apply, inputs))
        case = {"optimizer": "Adagrad", "mode": mode, "bags": f"{bags} of {length}", "dim": DIM}
        yield STEP, case | {"rows": MILLIONS}, contenders


def _backward(quick: bool) -> Parts:
    import pyembed

    weight, grad, batches = _weight(BACKWARD_ROWS), _gradient(N), _batches(quick, BACKWARD_ROWS, N)
    table = pyembed.Table.from_array(weight, num_threads=THREADS)
    unique, position = np.unique(batches[0], return_inverse=True)
    wanted = np.zeros((len(unique), DIM))
    np.add.at(wanted, position, grad.astype(np.float64))
    for sparse in (False, True):
        layer = pyembed.Embedding.from_pretrained(table, freeze=False, sparse=sparse)

        def torch(t: Any, sparse: bool = sparse) -> Made:
            w, g = peers.tensor(weight).requires_grad_(), peers.tensor(grad)
            look = partial(t.nn.functional.embedding, weight=w, sparse=sparse)
            pull = partial(t.autograd.grad, inputs=w, grad_outputs=g, retain_graph=True)
            call = (lambda out: pull(out)[0].coalesce()) if sparse else (lambda out: pull(out)[0])
            return call, [look(peers.tensor(ids)) for ids in batches]

        contenders = [Contender(OURS, partial(layer.backward, grad=grad), batches), _torch(torch)]
        for c in contenders:
            result: Any = [] if c.call is None else c.call(c.inputs[0])
            if sparse and c.call is not None:
                ids, values = result if c.name == OURS else (result.indices()[0], result.values())
                check(c.name, np.array_equal(ids, unique) and np.array_equal(values, wanted))
            elif c.call is not None:
                dense = np.asarray(result)
                check(c.name, np.count_nonzero(dense) == np.count_nonzero(wanted))
                check(c.name, np.array_equal(dense[unique], wanted))
        case = {"gradient": "sparse" if sparse else "dense", "N": N, "dim": DIM}
        yield BACKWARD, case | {"rows": "1 M"}, contenders


def _init(quick: bool) -> Parts:
    import pyembed

    array = aligned((INIT_ROWS, DIM))
    for values, a, b, deviation in (("normal", 0.0, 1.0, 1.0), ("uniform", -1.0, 1.0, 3**-0.5)):
        recipe = getattr(pyembed.init, values)(a, b)

        def torch(_: Any, name: str = f"{values}_", ab: tuple[float, float] = (a, b)) -> Made:
            return lambda _: getattr(peers.tensor(array), name)(*ab), (None,)

        ours = partial(recipe.fill, array, num_threads=THREADS)
        contenders = [Contender(OURS, ours, (1,)), _torch(torch), limit.fill(array)]
        for c in contenders[:2]:
            if c.call is None:
                continue
            array.fill(np.nan)
            c.call(c.inputs[0])
            sample = array.reshape(-1)[::61].astype(np.float64)
            close = 6 * deviation / sample.size**0.5
            check(f"{c.name} {values}", not np.isnan(array.sum()) and abs(sample.mean()) < close)
            check(f"{c.name} {values}", abs(sample.std() - deviation) < close)
        if contenders[2].run is not None:
            contenders[2].run(1)
            check("limit", (array == 1).all())
        yield INIT, {"values": values, "floats": "64 M"}, contenders


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Measure every case and emit its row."""
    for part in (_renorm, _bags, _bag_step, _backward, _init):
        for table, case, contenders in part(quick):
            emit(timed_row(table, dict(case), contenders, BARS, rounds=3 if quick else 7))
        gc.collect()  # up to 3 GB of tables and states
