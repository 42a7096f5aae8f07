"""Optimizers against those of torch and FBGEMM: 200 steps end in the same place.

Tolerance 1e-4 where weights are about 1: torch fuses multiplications and additions, sums duplicates
in an unstable order, and its float32 square root is off by an ulp now and then. Over 200 steps of
size 0.05 both differ by less than 1e-5 here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from pyembed import Table, optim

torch = pytest.importorskip("torch")
assert_close = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
ROWS, DIM, LR = 300, 16, 0.05


def start() -> np.ndarray:
    return np.random.default_rng(11).standard_normal((ROWS, DIM), np.float32)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optim.SGD, torch.optim.SGD),
        (optim.Adagrad, torch.optim.Adagrad),
        (optim.Adam, torch.optim.SparseAdam),
    ],
)
def test_sparse_trajectory(ours: Any, theirs: Any) -> None:
    """Batches with duplicates, that touch some rows, by torch's sparse optimizers."""
    rng = np.random.default_rng(12)
    layer = torch.nn.Embedding.from_pretrained(torch.from_numpy(start()), freeze=False, sparse=True)
    twin = theirs(layer.parameters(), lr=LR)
    table = Table.from_array(start())
    o = ours(table, lr=LR)
    for _ in range(200):
        ids = rng.integers(0, ROWS, 100)
        grad = rng.standard_normal((100, DIM), np.float32)
        o.step(ids, grad)
        twin.zero_grad()
        layer(torch.from_numpy(ids)).backward(torch.from_numpy(grad))
        twin.step()
    assert_close(table.weight, layer.weight.detach().numpy())


DENSE = {
    "momentum": (optim.SGD, torch.optim.SGD, {"momentum": 0.9}),
    "dampening": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.4}),
    "nesterov": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "l2": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, torch.optim.Adagrad, {"weight_decay": 0.1}),
    "adam": (optim.AdamW, torch.optim.Adam, {"weight_decay": 0.0}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, torch.optim.RMSprop, {"alpha": 0.9, "weight_decay": 0.01}),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_trajectory(name: str) -> None:
    """Batches that touch every row are what a dense optimizer does, its weight decay included."""
    ours, theirs, settings = DENSE[name]
    rng = np.random.default_rng(13)
    weight = torch.nn.Parameter(torch.from_numpy(start()))
    twin = theirs([weight], lr=LR, **settings)
    table = Table.from_array(start())
    o = ours(table, lr=LR, **settings)
    for _ in range(200):
        ids = rng.permutation(ROWS)
        grad = rng.standard_normal((ROWS, DIM), np.float32)
        o.step(ids, grad)
        weight.grad = torch.from_numpy(grad[np.argsort(ids)])
        twin.step()
    assert_close(table.weight, weight.detach().numpy())


@pytest.mark.parametrize("nesterov", [False, True])
def test_lazy_momentum_is_dense_momentum(nesterov: bool) -> None:
    """Rows that catch up are where torch's dense momentum moves them, touched or not."""
    rng = np.random.default_rng(14)
    weight = torch.nn.Parameter(torch.from_numpy(start()))
    twin = torch.optim.SGD([weight], lr=LR, momentum=0.9, nesterov=nesterov)
    table = Table.from_array(start())
    o = optim.SGD(table, lr=LR, momentum=0.9, nesterov=nesterov, lazy_momentum=True)
    for step in range(200):
        ids = rng.permutation(ROWS)[:20]
        grad = rng.standard_normal((20, DIM), np.float32)
        o.step(ids, grad)
        weight.grad = torch.zeros(ROWS, DIM)
        weight.grad[ids] = torch.from_numpy(grad)
        twin.step()
        if step == 99:
            o.catch_up(ids[:10])  # that is not seen in the end
    o.catch_up()
    assert_close(table.weight, weight.detach().numpy())


def test_clip_norm_is_that_of_torch() -> None:
    """clip_norm gives clip_grad_norm_ of the dense gradient, duplicates summed."""
    rng = np.random.default_rng(15)
    ids, grad = rng.integers(0, ROWS, 400), rng.standard_normal((400, DIM), np.float32)
    for most in (0.5, 1e6):
        weight = torch.nn.Parameter(torch.from_numpy(start()))
        weight.grad = torch.zeros(ROWS, DIM).index_add_(
            0, torch.from_numpy(ids), torch.from_numpy(grad)
        )
        torch.nn.utils.clip_grad_norm_([weight], most)
        torch.optim.SGD([weight], lr=1.0).step()
        table = Table.from_array(start())
        optim.SGD(table, lr=1.0, clip_norm=most).step(ids, grad)
        np.testing.assert_allclose(table.weight, weight.detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of FBGEMM and of torch's compiler, at import
@pytest.mark.parametrize("pooling", ["SUM", "NONE"])
def test_rowwise_adagrad_is_that_of_fbgemm(pooling: str) -> None:
    """Without weight decay, which its two ways to do it on a CPU treat differently."""
    module = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    rng = np.random.default_rng(16)
    weight = start()
    twin = module.SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, module.ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        pooling_mode=getattr(PoolingMode, pooling),
        learning_rate=LR,
        eps=1e-8,
        preallocated_host_buffers={"weights": torch.from_numpy(weight).view(-1)},
        device=torch.device("cpu"),
    )
    table = Table.from_array(start())
    o = optim.RowwiseAdagrad(table, lr=LR)
    for _ in range(200):
        ids = rng.integers(0, ROWS, 100)
        grad = rng.standard_normal((100, DIM), np.float32)
        o.step(ids, grad)
        twin(torch.from_numpy(ids), torch.arange(101)).backward(torch.from_numpy(grad))
    assert_close(table.weight, weight)
    (sums,) = twin.split_optimizer_states()[0]
    np.testing.assert_allclose(table.column("row_sum")[:, 0], sums.numpy(), rtol=1e-5)


def test_clip_value_of_fbgemm() -> None:
    """clip_value clamps the summed gradient, as FBGEMM's max_gradient does."""
    table = Table.memory(1, 2)
    make = partial(optim.SGD, lr=1.0, clip_value=1.5)
    make(table).step([0, 0], np.array([[1, -3], [1, 1]], np.float32))
    assert table.gather(0).tolist() == [-1.5, 1.5]
