"""The torch adapter: the cost of a call, of a training step, and the memory of a step.

*one id*: an eager forward of one id with grad enabled. Its bar is the difference to nn.Embedding,
since both are pure overhead. *step*: forward, backward from a given gradient, and the optimizer;
ours steps in backward. torch: nn.Embedding(sparse=True) and its own optimizer, over an array on
huge pages, as in ``update``.

*memory*: each contender runs in a child process, which creates its table, state and ids and takes a
small step before it resets its peak (``/proc/self/clear_refs``). Steps of N ids then raise the peak
by the memory that they need in addition to the table: the rows, their gradient, which the step
creates, and the library's own buffers. torch creates its states in the first step, so they exist
by then too.

Before timing, rows are compared bit for bit, and steps with float64, as in ``update``. If the
system cannot reset a peak, the cell says so.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import peers, update, workloads
from bench.harness import (
    Array,
    Bar,
    Contender,
    Row,
    aligned,
    check,
    measure,
    show_time,
    timed_row,
)

QUESTION = (
    "What does the torch adapter cost compared with nn.Embedding: a call, a training step, and the "
    "memory of a step?"
)
CALL, STEP, MEMORY = "one id", "step", "memory"
OURS, PARAMETER, TORCH = "pyembed", "pyembed, a Parameter", "torch"
ROWS, DIM, N = update.ROWS, update.DIM, 65536
MORE_SECONDS = 5e-6  # the bar of one id: the difference to nn.Embedding
MOST_BYTES = 4 * N * DIM * 4  # in addition to the table: four times the rows of a batch
STEPS_IN_CHILD = 3
BARS = tuple(
    Bar(STEP, {"optimizer": (name,)}, OURS, TORCH, ratio)
    for name, ratio in (("SGD", 2.2), ("Adagrad", 5.0), ("Adam", 6.0))
)


def _layer(optimizer: str, table: Any) -> Any:
    import pyembed.torch

    make = partial(getattr(pyembed.optim, update.RULES[optimizer].kind), lr=peers.LR)
    return pyembed.torch.Embedding(ROWS, DIM, table=table, optimizer=make)


class Adapter(update.Pyembed):
    """The layer of pyembed.torch, whose backward is the step."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.layer = _layer(optimizer, self.table)
        self.optimizer = self.layer.optimizer

    def use(self, batches: list[Array], grad: Array) -> tuple[Any, Any]:
        """Keep the gradient as a tensor and return the ids as tensors."""
        self.gradient = peers.tensor(grad)
        return [peers.tensor(ids) for ids in batches], ()

    def train(self, x: Any) -> None:
        """Run forward and backward, and so the step."""
        self.layer(x).backward(self.gradient)


def _one_id(quick: bool) -> Row:
    import pyembed.torch

    torch = peers.torch()
    weight = torch.randn(1000, DIM)
    ours, theirs = pyembed.torch.Embedding.from_pretrained, torch.nn.Embedding.from_pretrained
    sgd = partial(pyembed.optim.SGD, lr=peers.LR)
    layers = {
        OURS: ours(weight.clone(), freeze=False, optimizer=sgd),
        PARAMETER: ours(weight.clone(), freeze=False),
        TORCH: theirs(weight.clone(), freeze=False),
    }
    inputs = list(torch.arange(64).reshape(64, 1))
    for name, layer in layers.items():
        check(name, torch.equal(layer(inputs[5]), weight[5:6]) and layer(inputs[5]).requires_grad)
    contenders = [Contender(name, layer, inputs) for name, layer in layers.items()]
    samples = measure(contenders, 11 if quick else 51)
    row = Row(CALL, {"N": 1, "dim": DIM}, {k: show_time(median(s)) for k, s in samples.items()})
    for name in (OURS, PARAMETER):
        pairs = zip(samples[name], samples[TORCH], strict=True)
        more = median(ours - theirs for ours, theirs in pairs)
        word = "met" if more <= MORE_SECONDS else "**missed**"
        bar = f"(bar {show_time(MORE_SECONDS)}) {word}"
        row.verdicts.append((f"{name} {more * 1e6:+.2f} µs {TORCH} {bar}", word == "met"))
    row.data["seconds"] = {k: {"median": median(s), "low": min(s)} for k, s in samples.items()}
    return row


def _step(optimizer: str, weight: Array, quick: bool) -> Row:
    grad = aligned((N, DIM))
    odd = np.random.default_rng(3).integers(-4, 4, (N, DIM), dtype=np.int8) * 2 + 1
    np.divide(odd, 64, out=grad)
    batches = workloads.batches("uniform", ROWS, N, 4 if quick else 8)
    contenders = []
    trainers: list[Any] = [Adapter(optimizer), update.Torch(optimizer, weight)]
    for trainer in trainers:
        inputs = trainer.use(batches, grad)[0]
        update.check_step(trainer, trainer.train, inputs[0], batches[0], grad)
        contenders.append(Contender(trainer.name, trainer.train, inputs))
    case: dict[str, object] = {"optimizer": optimizer, "N": N, "dim": DIM}
    case["rows"] = f"{ROWS / 1e6:.3g} M"
    return timed_row(STEP, case, contenders, BARS, rounds=3 if quick else 7)


def _peak_of_child(name: str, optimizer: str) -> int | str:
    """Return the bytes by which steps raise the peak of a process, or why they are unknown."""
    command = [sys.executable, "-m", "bench.torch_step", name, optimizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return int(json.loads(done.stdout)["bytes"])


def _memory(optimizer: str) -> Row:
    case: dict[str, object] = {"optimizer": optimizer, "N": N, "dim": DIM}
    row = Row(MEMORY, case, {"the batch's rows": f"{N * DIM * 4 / 2**20:.3g} MiB"})
    for name in (OURS, TORCH):
        found = _peak_of_child(name, optimizer)
        row.data[name] = found
        row.cells[name] = found if isinstance(found, str) else f"{found / 2**20:.3g} MiB"
        if name == OURS:
            met = None if isinstance(found, str) else found <= MOST_BYTES
            word = {None: "not judged", True: "met", False: "**missed**"}[met]
            text = f"{OURS} {row.cells[OURS]} (bar {MOST_BYTES / 2**20:.3g} MiB) {word}"
            row.verdicts.append((text, met))
    return row


def _in_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0])


def child(name: str, optimizer: str) -> int:
    """Take steps, and return the bytes by which they raise the peak of this process."""
    torch = peers.torch()
    warnings.filterwarnings("ignore", message="Sparse invariant checks")
    if name == OURS:
        layer = Adapter(optimizer).layer  # with rows drawn, and its state in their pages

        def step(ids: Any) -> None:
            rows = layer(ids)
            rows.backward(torch.randn_like(rows))

    else:
        weight = aligned((ROWS, DIM))
        np.random.default_rng(0).random(dtype=np.float32, out=weight)
        trainer = update.Torch(optimizer, weight)

        def step(ids: Any) -> None:
            trainer.optimizer.zero_grad()
            rows = trainer.embedding(ids)
            rows.backward(torch.randn_like(rows))
            trainer.optimizer.step()

    step(torch.arange(64))
    if name == TORCH:
        for state in trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.numel() > N:
                    value.view(-1)[::1024] += 0.0  # maps its pages before the peak is reset
    batches = [torch.randint(ROWS, (N,)) for _ in range(STEPS_IN_CHILD)]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the current size
    before = _in_kib("VmRSS")
    for ids in batches:
        step(ids)
    return (_in_kib("VmHWM") - before) * 1024


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Measure every case and emit its row."""
    if isinstance(peers.torch(), str):
        raise SystemExit("bench torch_step: needs torch; pip install -e '.[bench]'")
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # from torch's Adagrad
    emit(_one_id(quick))
    for optimizer in update.TORCH:  # before this process has a table of its own
        emit(_memory(optimizer))
    weight = aligned((ROWS, DIM))
    np.random.default_rng(0).random(dtype=np.float32, out=weight)
    for optimizer in update.TORCH:
        emit(_step(optimizer, weight, quick))
        gc.collect()  # up to 6 GB of tables and states


if __name__ == "__main__":
    print(json.dumps({"bytes": child(sys.argv[1], sys.argv[2])}))
