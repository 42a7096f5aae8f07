"""Update: gather rows, then let an optimizer change them by a gradient.

There are two tables. *gather + step*: pyembed's ``embedding(ids)`` and ``optimizer.step(ids,
grad)``; torch's forward, backward and sparse optimizer step; FBGEMM's forward and its backward,
which includes the step. *step alone*: pyembed's step with its grouping; FBGEMM's backward over a
retained graph (on the machine where it was tried, this takes as long as forward and backward minus
forward); and the limit, which moves the same bytes of rows and gradient, grouped in advance. A step
that refuses a gradient with NaN before any row changes reads the gradient twice; "skip_row" leaves
out such rows and reads it once.

FBGEMM's row-wise Adagrad keeps one number per row; Adagrad keeps one per weight. Row-wise Adagrad
is the only optimizer of FBGEMM that is parallel on a CPU, so both our Adagrad, which moves twice
the bytes, and our row-wise Adagrad are compared with it. The other rules have no peer with sparse
gradients on a CPU; they are compared with the limit. torch and FBGEMM train one array on huge
pages; torch allocates its own states.

Before timing, one step of every contender on every case is compared with float64, on up to 4096 of
the changed rows including the most frequent ones, with rtol 1e-5 and atol 1e-6. The tolerance is
100 times that for torch's SGD, which rounds for every occurrence. All other rows must not change.
Gradients are odd multiples of 1/64, whose sums are exact in any order, so that the tolerance covers
the rule and not the order of summation.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bench import limit, peers, workloads
from bench.harness import THREADS, Array, Bar, Contender, Row, aligned, check, timed_row

QUESTION = (
    "How fast is gather + optimizer step compared with torch's forward + backward + sparse step, "
    "and the step alone compared with FBGEMM and the limit of the memory?"
)
BOTH, STEP = "gather + step", "step alone"
DIM, ROWS = 64, 4_000_000
SIZES = (64, 4096, 65536, 1_000_000)
FEW = (65536, 1_000_000)  # sizes for the rules without a peer
M = (1_000_000,)


class Rule(NamedTuple):
    """An optimizer of pyembed: its class, the name of its state, and its arguments."""

    kind: str
    state: str
    columns: int  # number of columns as wide as the weight, the weight included
    arguments: Mapping[str, float] = MappingProxyType({})


RULES = {
    "SGD": Rule("SGD", "sgd", 1),
    "SGD momentum": Rule("SGD", "momentum", 2, {"momentum": 0.9}),
    "Adagrad": Rule("Adagrad", "adagrad", 2),
    "RowwiseAdagrad": Rule("RowwiseAdagrad", "rowwise_adagrad", 1),
    "RMSprop": Rule("RMSprop", "rmsprop", 2),
    "Adam": Rule("Adam", "adam", 3),
    "AdamW": Rule("AdamW", "adamw", 3, {"weight_decay": 0.1}),
    "PartialRowwiseAdam": Rule("PartialRowwiseAdam", "rowwise_adam", 2),
    "LAMB": Rule("LAMB", "lamb", 3, {"weight_decay": 0.1}),
    "LARS": Rule("LARS", "lars", 2, {"weight_decay": 0.1}),
    "FTRL": Rule("FTRL", "ftrl", 3, {"l1": 0.001, "l2": 0.1}),
}
COLUMNS = {name: rule.columns for name, rule in RULES.items()}
WITH_PEERS = ("SGD", "Adagrad", "RowwiseAdagrad", "Adam")
TORCH = {"SGD": "SGD", "Adagrad": "Adagrad", "Adam": "SparseAdam"}
TORCH_STATES = {"SGD": (), "Adagrad": ("sum",), "Adam": ("exp_avg", "exp_avg_sq")}
FBGEMM = {
    "SGD": "EXACT_SGD",
    "Adagrad": "EXACT_ROWWISE_ADAGRAD",
    "RowwiseAdagrad": "EXACT_ROWWISE_ADAGRAD",
}
OURS, SKIPPING, GROUPING = "pyembed", "pyembed skip_row", "pyembed grouping"
UNIFORM = ("uniform",)


def _bar(table: str, name: str, n: Sequence[int], ours: str, peer: str | float, x: float) -> Bar:
    where: dict[str, Any] = {"optimizer": (name,), "N": n}
    against_fbgemm = isinstance(peer, str) and peer.startswith("FBGEMM")
    return Bar(table, where if against_fbgemm else where | {"ids": UNIFORM}, ours, peer, x)


ELEMENTWISE = ("SGD", "SGD momentum", "Adagrad", "RMSprop", "Adam", "AdamW", "FTRL")
BARS = (
    *(_bar(STEP, name, FEW, OURS, "limit", 0.8) for name in ELEMENTWISE),
    *(_bar(STEP, name, (64,), OURS, 15e-6, 1.0) for name in TORCH),
    *(_bar(BOTH, name, (64,), OURS, "torch", 10.0) for name in TORCH),
    _bar(BOTH, "SGD", (65536,), OURS, "torch", 2.5),
    _bar(BOTH, "Adagrad", (65536,), OURS, "torch", 6.0),
    _bar(BOTH, "Adam", (65536,), OURS, "torch", 8.0),
    _bar(BOTH, "SGD", M, OURS, "torch", 5.0),
    _bar(BOTH, "Adagrad", M, OURS, "torch", 12.0),
    _bar(BOTH, "Adam", M, OURS, "torch", 20.0),
    _bar(STEP, "Adagrad", FEW, OURS, "FBGEMM nobag", 20.0),
    _bar(STEP, "Adagrad", FEW, OURS, "FBGEMM bag", 1.2),
    _bar(STEP, "RowwiseAdagrad", FEW, OURS, "FBGEMM nobag", 30.0),
    _bar(STEP, "RowwiseAdagrad", FEW, OURS, "FBGEMM bag", 1.5),
    _bar(STEP, "Adagrad", M, GROUPING, OURS, 1 / 0.15),  # at most 15 % of the step
    _bar(STEP, "Adagrad", M, GROUPING, 0.0032, 1.0),  # these four: a prototype in C
    _bar(STEP, "SGD", M, OURS, 0.032, 1.0),
    _bar(STEP, "Adagrad", M, OURS, 0.046, 1.0),
    _bar(STEP, "Adam", M, OURS, 0.060, 1.0),
)


# A trainer has the methods use (prepare a case and return the inputs of the next two), train
# (gather + step), apply (the step alone) and read (float64 copies of the weight and of each state
# of some rows), and the attributes rule (of the oracle) and steps (taken so far, for the bias
# correction).


class Pyembed:
    """A layer of pyembed over a table in memory."""

    name = OURS

    def __init__(self, optimizer: str) -> None:
        import pyembed

        self.rule, rule = optimizer, RULES[optimizer]
        init = pyembed.init.uniform(-1.0, 1.0)
        self.table = pyembed.Table.memory(
            ROWS, DIM, optimizer=rule.state, init=init, num_threads=THREADS
        )
        self.embedding = pyembed.Embedding.from_pretrained(self.table, freeze=False)
        kind = getattr(pyembed.optim, rule.kind)
        self.optimizer = kind(self.embedding, lr=peers.LR, **rule.arguments)
        self.skipping = kind(self.embedding, lr=peers.LR, nonfinite="skip_row", **rule.arguments)

    @property
    def steps(self) -> int:
        return int(self.optimizer.steps)

    def use(self, batches: list[Array], grad: Array) -> tuple[Sequence[Any], Sequence[Any]]:
        self.grad, self.out = grad, aligned(grad.shape)
        return batches, batches

    def train(self, x: Array) -> None:
        self.embedding(x)
        self.apply(x)

    def train_out(self, x: Array) -> None:
        self.table.gather(x, out=self.out)
        self.apply(x)

    def apply(self, x: Array) -> None:
        self.optimizer.step(x, self.grad)

    def apply_skipping(self, x: Array) -> None:
        self.skipping.step(x, self.grad)

    def read(self, rows: Array) -> list[Array]:
        return [self.table.column(c)[rows].astype(np.float64) for c in self.table.columns]


class Torch:
    """torch.nn.Embedding with a sparse gradient, over a given array."""

    name, steps = "torch", 0

    def __init__(self, optimizer: str, weight: Array) -> None:
        torch, self.rule = peers.torch(), optimizer
        layer = torch.nn.Embedding.from_pretrained
        self.embedding = layer(peers.tensor(weight), freeze=False, sparse=True)
        kind = getattr(torch.optim, TORCH[optimizer])
        self.optimizer = kind(list(self.embedding.parameters()), lr=peers.LR)

    def use(self, batches: list[Array], grad: Array) -> tuple[Sequence[Any], Sequence[Any]]:
        self.grad = peers.tensor(grad)
        return [peers.tensor(ids) for ids in batches], ()

    def train(self, x: Any) -> None:
        self.optimizer.zero_grad()
        self.embedding(x).backward(self.grad)
        self.optimizer.step()
        self.steps += 1

    def read(self, rows: Array) -> list[Array]:
        state = self.optimizer.state[self.embedding.weight]
        tensors = [self.embedding.weight.detach()]
        tensors += [state[name] for name in TORCH_STATES[self.rule] if name in state]
        parts = [tensor.numpy()[rows].astype(np.float64) for tensor in tensors]
        # SparseAdam creates its states, all zero, in the first step.
        return parts + [0 * parts[0]] * (COLUMNS[self.rule] - len(parts))


class Fbgemm:
    """FBGEMM's table over a given array; its backward is the step."""

    steps = 0

    def __init__(self, name: str, optimizer: str, weight: Array) -> None:
        self.name = name
        self.rule = {"Adagrad": "RowwiseAdagrad"}.get(optimizer, optimizer)
        self.table = peers.table(weight, FBGEMM[optimizer], peers.POOLING[name])

    def use(self, batches: list[Array], grad: Array) -> tuple[Sequence[Any], Sequence[Any]]:
        self.grad, inputs = peers.tensor(grad), peers.fbgemm_inputs(batches)
        return inputs, [self.table(*x) for x in inputs]

    def train(self, x: tuple[Any, Any]) -> None:
        self.table(*x).backward(self.grad)

    def apply(self, x: Any) -> None:
        x.backward(self.grad, retain_graph=True)

    def read(self, rows: Array) -> list[Array]:
        parts = [self.table.split_embedding_weights()[0].detach().numpy()[rows]]
        parts += [state.numpy()[rows, None] for (state,) in self.table.split_optimizer_states()]
        return [part.astype(np.float64) for part in parts]


def oracle(rule: str, parts: list[Array], g: Array, t: int) -> Array:
    """Return the float64 weights after step ``t`` (the first is 1) with summed gradients ``g``."""
    w, *states = parts
    given = RULES[rule].arguments
    lr, decay = peers.LR, given.get("weight_decay", 0.0)
    if rule == "SGD":
        change = lr * g
    elif rule == "SGD momentum":
        change = lr * (given["momentum"] * states[0] + g)
    elif rule in ("Adagrad", "RowwiseAdagrad"):
        wide = rule == "Adagrad"
        total = states[0] + (g * g if wide else np.mean(g * g, axis=1, keepdims=True))
        change = lr * g / (np.sqrt(total) + (1e-10 if wide else 1e-8))
    elif rule == "RMSprop":
        change = lr * g / (np.sqrt(0.99 * states[0] + 0.01 * g * g) + 1e-8)
    elif rule == "LARS":
        ratio = 1e-3 * _norm(w) / (_norm(g) + decay * _norm(w))
        change = 0.9 * states[0] + lr * ratio * (g + decay * w)
    elif rule == "FTRL":
        return _ftrl(w, states, g, given)
    else:
        change = _adam(rule, w, states, g, t)
    return np.subtract(w, change)


def _adam(rule: str, w: Array, states: list[Array], g: Array, t: int) -> Array:
    lr, decay = peers.LR, RULES[rule].arguments.get("weight_decay", 0.0)
    square = np.mean(g * g, axis=1, keepdims=True) if rule == "PartialRowwiseAdam" else g * g
    m, v = 0.9 * states[0] + 0.1 * g, 0.999 * states[1] + 0.001 * square
    first, second = 1 - 0.9**t, np.sqrt(1 - 0.999**t)
    if rule == "Adam":
        change = lr * second / first * m / (np.sqrt(v) + 1e-8)
    elif rule == "LAMB":
        r = m / first / (np.sqrt(v) / second + 1e-6) + decay * w
        change = lr * _norm(w) / _norm(r) * r
    else:
        change = lr * (m / first / (np.sqrt(v) / second + 1e-8) + decay * w)
    return np.asarray(change)


def _ftrl(w: Array, states: list[Array], g: Array, given: Mapping[str, float]) -> Array:
    z, n = states
    root = np.sqrt(n + g * g)
    z = z + g - (root - np.sqrt(n)) / peers.LR * w
    solved = -(z - np.sign(z) * given["l1"]) / ((1 + root) / peers.LR + given["l2"])
    return np.where(np.abs(z) <= given["l1"], 0.0, solved)


def _norm(rows: Array) -> Array:
    return np.asarray(np.linalg.norm(rows, axis=1, keepdims=True))


def check_step(trainer: Any, call: Callable[[Any], None], x: Any, ids: Array, grad: Array) -> None:
    """Take one step and compare it with the oracle; ``grad`` has a row for every id."""
    rng = np.random.default_rng(2)
    unique, counts = np.unique(ids, return_counts=True)
    hot = unique[np.argsort(counts)[-64:]]
    changed = np.unique(np.append(hot, rng.choice(unique, min(4032, len(unique)), replace=False)))
    others = np.setdiff1d(rng.integers(0, ROWS, 4096), unique)
    chosen = np.flatnonzero(np.isin(ids, changed))
    g = np.zeros((len(changed), DIM))
    np.add.at(g, np.searchsorted(changed, ids[chosen]), grad[chosen].astype(np.float64))
    before, still = trainer.read(changed), trainer.read(others)
    call(x)
    wanted = oracle(trainer.rule, before, g, trainer.steps)
    # torch's SGD adds every occurrence to the weight by itself, and a hot row has 100,000 of them.
    loose = 100 if trainer.name == "torch" and trainer.rule == "SGD" else 1
    close = np.allclose(trainer.read(changed)[0], wanted, rtol=1e-5 * loose, atol=1e-6 * loose)
    check(f"{trainer.name} {trainer.rule}", close)
    same = all(map(np.array_equal, still, trainer.read(others)))
    check(f"{trainer.name} {trainer.rule} (rows outside the batch)", same)


def _grouping(batches: list[Array]) -> Contender:
    import pyembed

    rows, starts, order = pyembed.grouping.group(batches[0], ROWS, THREADS)
    unique, counts = np.unique(batches[0], return_counts=True)
    same = np.array_equal(rows, unique) and np.array_equal(np.diff(starts), counts)
    check(GROUPING, same and np.array_equal(order, np.argsort(batches[0], kind="stable")))
    return Contender(GROUPING, lambda ids: pyembed.grouping.group(ids, ROWS, THREADS), batches)


def _peers(optimizer: str, weight: Array) -> list[Any]:
    """Return trainers for torch and for both ways of FBGEMM; an absent one gives the reason."""
    if optimizer not in WITH_PEERS:
        return []
    torch = peers.torch()
    reason = torch if isinstance(torch, str) else ""
    reason = reason if optimizer in TORCH else f"has no {optimizer}"
    found: list[Any] = [Contender("torch", absent=reason) if reason else Torch(optimizer, weight)]
    for name in ("FBGEMM bag", "FBGEMM nobag"):
        reason = peers.why_no_fbgemm() if optimizer in FBGEMM else f"has no {optimizer}"
        found.append(Contender(name, absent=reason) if reason else Fbgemm(name, optimizer, weight))
    return found


def _case(
    case: dict[str, object], ours: Pyembed, others: list[Any], batches: list[Array], rounds: int
) -> list[Row]:
    ids, n = batches[0], len(batches[0])
    odd = np.random.default_rng(3).integers(-4, 4, (n, DIM), dtype=np.int8) * 2 + 1
    grad = aligned((n, DIM))
    np.divide(odd, 64, out=grad)
    both, alone = [], []
    for t in (ours, *others):
        if isinstance(t, Contender):  # absent
            both.append(t)
            alone += [t] if t.name != "torch" else []
            continue
        trained, applied = t.use(batches, grad)
        check_step(t, t.train, trained[0], ids, grad)
        both.append(Contender(t.name, t.train, trained))
        if applied:
            check_step(t, t.apply, applied[0], ids, grad)
            alone.append(Contender(t.name, t.apply, applied))
    both.insert(1, Contender("pyembed out=", ours.train_out, batches))
    check_step(ours, ours.apply_skipping, batches[0], ids, grad)
    alone.insert(1, Contender(SKIPPING, ours.apply_skipping, batches))
    alone.insert(2, _grouping(batches))
    kept = ours.read(ids[:4096])
    alone.append(limit.update(ours.table.weight, COLUMNS[ours.rule], batches, grad))
    check("limit", all(map(np.array_equal, kept, ours.read(ids[:4096]))))
    rows = [timed_row(BOTH, case, both, BARS, rounds), timed_row(STEP, case, alone, BARS, rounds)]
    seconds: Any = rows[1].data["seconds"]
    share = seconds[GROUPING]["median"] / seconds[OURS]["median"]
    rows[1].cells["grouping / step"] = f"{share:.1%}"
    most = seconds["limit"]["median"] / seconds[SKIPPING]["median"] if "limit" in seconds else None
    rows[1].cells["limit / skip_row"] = f"{most:.2f}×" if most else ""
    return rows


def run(quick: bool, emit: Callable[[Row], None]) -> None:
    """Measure every case and emit its rows."""
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # torch's own Adagrad
    weight = aligned((ROWS, DIM))
    rows = f"{ROWS / 1e6:.3g} M"
    np.random.default_rng(0).random(dtype=np.float32, out=weight)
    for optimizer in ("SGD", "Adagrad", "Adam") if quick else RULES:
        ours, others = Pyembed(optimizer), _peers(optimizer, weight)
        known = optimizer in WITH_PEERS
        for n in (65536,) if quick else SIZES if known else FEW:
            how_many = min(512, max(1, ((64 if quick else 128) << 20) // (n * DIM * 4)))
            for stream in (*UNIFORM, "zipf 1.05 hashed") if known and not quick else UNIFORM:
                batches = workloads.batches(stream, ROWS, n, how_many)
                case: dict[str, object] = {"optimizer": optimizer, "N": n, "dim": DIM}
                case |= {"rows": rows, "ids": stream}
                for row in _case(case, ours, others, batches, rounds=3 if quick else 5):
                    emit(row)
        del ours, others
        gc.collect()  # up to 6 GB of tables and states
