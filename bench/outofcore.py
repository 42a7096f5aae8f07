"""Out of core: a table on disk is many times larger than the memory that a process may use.

Every number comes from a new process (`outofcore_child`), alone in a memory cgroup, on a table that
was dropped from the page cache. The limit is the disk's rate of random 4 KiB reads, measured by fio
on the same file before and after. If the table is s times as large as memory, a batch of uniform
ids reads its unique pages less the part 1/s that memory can hold. Therefore

    fio / pyembed = pages to read / fio's rate / our time.

*gather* and *step*: the mean over all batches of some seconds, which includes every stall; for cold
batches, the median. A step is gather and update, with the write-back during that time.
*layout*: the hot rows of a Zipf stream are adjacent, or scattered. *lookahead*: the model computes
for as long as a step takes. *stalls*: every step of a long training. *by size*: the memory is
fixed, and the ids come from more and more of the file.

Tables are opened with durability "none", as no peer keeps a journal; `durability` measures its
cost. Peers that would take seconds for a batch get smaller ones. The cgroups require root; without
a limit nothing is measured, and every cell gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from bench import limits_disk
from bench.disk_tables import FBGEMM, FROM_FILE, LMDB, MEMMAP, OURS, ROCKS, THREE
from bench.harness import Bar, Row, Samples, Verdict, judge, progress, show_time, version
from bench.outofcore_child import Result, Spec
from bench.outofcore_runs import FULL, PLAIN, QUICK, THREE_FILES, TIMES, Measured, Run, opened

QUESTION = (
    "How fast are gather and training on a table larger than memory, compared with every peer and "
    "with the limit of the disk?"
)
GATHER, STEP, LAYOUT, LOOKAHEAD, STALLS = "gather", "step", "layout", "lookahead", "stalls"
GATHER_BY_SIZE, STEP_BY_SIZE = "gather by size", "Adagrad step by size"
FIO, PACKED, HASHED = "fio", "packed", "hashed"
PEERS = (MEMMAP, FROM_FILE, FBGEMM, LMDB, ROCKS)
COLD, STEADY = "cold", "steady"
ADAGRAD, ADAM = "Adagrad", "Adam"
HOT_MEMORY = 0.1  # memory as a part of the table, in `layout`
MAX_LOOKAHEAD = 1.15  # times the longer of step and model
MAX_STALL = 10  # times the median step
BARS = (
    Bar(GATHER, {"cache": (COLD,)}, OURS, FIO, 0.9),
    Bar(GATHER, {"cache": (STEADY,)}, OURS, FIO, 0.8),
    Bar(STEP, {"optimizer": (ADAGRAD,)}, OURS, FIO, 0.55),
    Bar(STEP, {"optimizer": (ADAGRAD,)}, OURS, MEMMAP, 40.0),
    Bar(STEP, {"optimizer": (ADAGRAD,)}, OURS, FROM_FILE, 40.0),
    Bar(STEP, {"optimizer": (ADAM,)}, OURS, THREE, 2.0),
    Bar(LAYOUT, {}, PACKED, HASHED, 1.8),
)
Emit = Callable[[Row], None]
Results = Mapping[str, Measured]  # of each contender


def facts() -> dict[str, str]:
    """Return the versions that matter here, in addition to the usual ones."""
    versions = {name: version(name) for name in ("lmdb", "rocksdict")}
    return versions | {"fio": limits_disk.fio_version()}


def _show_rate(rate: float) -> str:
    return f"{rate / 1e3:.3g} K/s"


def _at_most(what: str, value: float, bar: float) -> Verdict:
    met = value <= bar
    return f"{what} {value:.2f}× (bar at most {bar:g}×) {'met' if met else '**missed**'}", met


def _per_id(result: Result) -> float:
    """Return seconds per id: the median of cold batches, or the mean of consecutive ones."""
    middle = median if result["what"] == COLD else mean
    return float(middle(result["seconds"])) / int(result["n"])


def _report(
    table: str, case: dict[str, object], results: Results, disk: float | str, times: float = TIMES
) -> Row:
    """Return a row of rates, with the bars judged. The first of `results` is ours."""
    ours, row = next(iter(results)), Row(table, case, {})
    present = {contender: r for contender, r in results.items() if not isinstance(r, str)}
    samples: Samples = {contender: [_per_id(r)] for contender, r in present.items()}
    rates = {contender: 1 / seconds for contender, (seconds,) in samples.items()}
    for contender, result in results.items():
        row.cells[contender] = result if isinstance(result, str) else _show_rate(rates[contender])
    row.cells["limit: fio"] = disk if isinstance(disk, str) else _show_rate(disk)
    best = max(set(PEERS) & set(rates), key=lambda contender: rates[contender], default=None)
    if best and ours in rates:
        row.cells["pyembed / best peer"] = f"{rates[ours] / rates[best]:.3g}×"
    if ours in rates and not isinstance(disk, str):
        held = 1 / times if present[ours]["what"] == STEADY else 0.0
        if held < 1:
            samples[FIO] = [present[ours]["pages per id"] * (1 - held) / disk]
            row.cells["fio / pyembed"] = f"{samples[FIO][0] / samples[ours][0]:.2f}×"
    complete = all(contender in rates for contender in PEERS)
    judged = [b for b in BARS if b.applies(table, case)]
    row.verdicts = [judge(b, samples if b.ours in samples else {}, best, complete) for b in judged]
    row.data = {"rates": rates, "fio": disk}
    row.data["results"] = {contender: _summary(result) for contender, result in present.items()}
    return row


def _summary(result: Result) -> Result:
    """Reduce the thousands of times of a result to five numbers."""
    times = result["seconds"]
    middle = {"batches": len(times), "mean": mean(times), "median": median(times)}
    return result | {"seconds": middle | {"low": min(times), "high": max(times)}}


def _gather(run: Run, emit: Emit) -> None:
    size = run.size
    for cache in (COLD, STEADY):
        ours, disk = run.with_disk(run.spec(OURS, cache, "", size.n))
        results: dict[str, Measured] = {OURS: ours}
        for contender in PEERS:
            n = size.n_cold_peer if cache == COLD else size.n
            results[contender] = run.child(replace(run.spec(contender, cache, "", n), rounds=3))
        case = {"cache": cache, "N": size.n, "table / memory": TIMES, "ids": "uniform"}
        emit(_report(GATHER, case, results, disk))


def _layout(run: Run, emit: Emit) -> None:
    limit, results = int(run.size.file * HOT_MEMORY), {}
    for name in (PACKED, HASHED):
        spec = run.spec(OURS, STEADY, "", run.size.n, 1 / HOT_MEMORY, limit)
        results[name] = run.child(replace(spec, ids=f"zipf 1.05 {name}"))
    case = {"ids": "zipf 1.05", "N": run.size.n, "table / memory": round(1 / HOT_MEMORY)}
    row = _report(LAYOUT, case, results, "")
    del row.cells["limit: fio"]
    emit(row)


def _gather_by_size(run: Run, emit: Emit) -> None:
    for times in run.size.ratios:
        task = partial(_sized, run, times, "")
        ours = task(OURS)
        results = {OURS: run.child(ours)} | {
            contender: run.child(task(contender)) for contender in PEERS
        }
        emit(_report(GATHER_BY_SIZE, {"table / memory": times}, results, run.disk(ours), times))


def _sized(run: Run, times: float, optimizer: str, contender: str) -> Spec:
    """Return a task of *by size*, with so much memory that the largest table is the whole file."""
    limit = int(run.size.file / max(run.size.ratios))
    spec = run.spec(contender, STEADY, optimizer, run.size.n_by_size, times, limit)
    return replace(spec, seconds=run.size.seconds_by_size)


def _peer_steps(run: Run, optimizer: str) -> dict[str, Measured]:
    return {
        contender: run.child(run.spec(contender, STEADY, optimizer, run.size.n))
        for contender in PEERS
    }


def _step_row(run: Run, optimizer: str, results: Results, disk: float | str) -> Row:
    case = {"optimizer": optimizer, "N": run.size.n, "table / memory": TIMES, "ids": "uniform"}
    return _report(STEP, case, results, disk)


def _lookahead(run: Run, emit: Emit) -> None:
    spec = run.spec(OURS, LOOKAHEAD, ADAGRAD, run.size.n_lookahead)
    result = run.child(replace(spec, rounds=3, seconds=run.size.seconds / 2))
    case = {"optimizer": ADAGRAD, "N": run.size.n_lookahead, "table / memory": TIMES}
    row = Row(LOOKAHEAD, case, {})
    names = ("steps", "model", "in turn", "lookahead")
    if isinstance(result, str):
        row.cells = dict.fromkeys(names, result)
        row.verdicts = [("lookahead: not judged", None)]
    else:
        row.cells = {name: show_time(median(result[name])) for name in names}
        rounds = zip(*(result[name] for name in names), strict=True)
        ratio = median(ahead / max(steps, model) for steps, model, _, ahead in rounds)
        row.verdicts = [_at_most("lookahead / the longer of steps and model", ratio, MAX_LOOKAHEAD)]
        row.data["results"] = result
    emit(row)


def _stalls(run: Run, emit: Emit) -> None:
    spec = run.spec(OURS, STEADY, ADAGRAD, run.size.n_stalls)
    result = run.child(replace(spec, seconds=run.size.seconds_stalls))
    case = {"optimizer": ADAGRAD, "N": run.size.n_stalls, "table / memory": TIMES}
    names = ("steps", "p50", "p99", "p99.9", "longest")
    row = Row(STALLS, case | {"seconds": round(run.size.seconds_stalls)}, {})
    if isinstance(result, str):
        row.cells = dict.fromkeys(names, result)
        row.verdicts = [("longest step: not judged", None)]
    else:
        found = np.percentile(result["seconds"], (50, 99, 99.9, 100)).tolist()
        row.cells = {"steps": str(len(result["seconds"]))}
        row.cells |= {name: show_time(s) for name, s in zip(names[1:], found, strict=True)}
        row.verdicts = [_at_most("longest / median step", found[3] / found[0], MAX_STALL)]
        row.data["percentiles"] = dict(zip(names[1:], found, strict=True))
    emit(row)


def run(quick: bool, emit: Emit) -> None:
    """Measure every case and emit its row."""
    with opened(QUICK if quick else FULL) as r:
        if r.why:
            progress(f"nothing can be measured: {r.why}")
        with r.files(PLAIN):
            _gather(r, emit)
            _layout(r, emit)
            _gather_by_size(r, emit)
            # Adagrad first: the values that Adam leaves may be invalid as a state of Adagrad.
            adagrad = _peer_steps(r, ADAGRAD)
            sized = {
                times: {
                    contender: r.child(_sized(r, times, ADAGRAD, contender)) for contender in PEERS
                }
                for times in r.size.ratios_step
            }
            adam = _peer_steps(r, ADAM)
        with r.files(ADAGRAD):
            ours, disk = r.with_disk(r.spec(OURS, STEADY, ADAGRAD, r.size.n))
            results = {OURS: ours, THREE: "with Adam only"} | adagrad
            emit(_step_row(r, ADAGRAD, results, disk))
            for times, others in sized.items():
                spec = _sized(r, times, ADAGRAD, OURS)
                results = {OURS: r.child(spec)} | others
                case: dict[str, object] = {"table / memory": times}
                emit(_report(STEP_BY_SIZE, case, results, r.disk(spec), times))
            _lookahead(r, emit)
            _stalls(r, emit)
        with r.files(ADAM):
            ours, disk = r.with_disk(r.spec(OURS, STEADY, ADAM, r.size.n))
        with r.files(THREE_FILES):
            three = r.child(r.spec(THREE, STEADY, ADAM, r.size.n))
        emit(_step_row(r, ADAM, {OURS: ours, THREE: three} | adam, disk))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rates *by size* into a picture; its suffix chooses the format."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit(f"a plot needs matplotlib ({error}); pip install matplotlib") from error
    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    for axes, table in zip(figure.subplots(1, 2), (GATHER_BY_SIZE, STEP_BY_SIZE), strict=True):
        found = [row for row in rows if row.table == table]
        _draw(axes, table, [(row.case["table / memory"], row.data) for row in found])
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path)


def _draw(axes: Any, title: str, points: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    """Draw the rates of all contenders over table / memory, and the disk's as a dashed line."""
    for contender in (OURS, *PEERS):
        line = [
            (times, data["rates"][contender])
            for times, data in points
            if contender in data["rates"]
        ]
        if line:
            width = 2.4 if contender == OURS else 1.2
            axes.plot(*zip(*line, strict=True), marker="o", ms=4, lw=width, label=contender)
    disk = [data["fio"] for _, data in points if not isinstance(data["fio"], str)]
    if disk:
        axes.axhline(median(disk), ls="--", lw=1, color="0.4", label="disk: fio, 4 KiB pages")
    axes.axvline(1, lw=0.8, color="0.8", zorder=0)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="table / memory", ylabel="rows a second")
    ticks = [times for times, _ in points]
    axes.set_xticks(ticks, [f"{times:g}" for times in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", lw=0.4, alpha=0.6)
