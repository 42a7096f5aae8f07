"""Threads: what num_threads=None means, forks, and many callers at once."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyembed import Table, _core, _threads, build, init, lookahead, optim, show_config
from pyembed.cli import main
from pyembed.errors import ArgumentError, IdError
from tests.helpers import child
from tests.helpers.child import ROOT

Ids = NDArray[np.int64]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYEMBED_NUM_THREADS": "3", "OMP_NUM_THREADS": "7"}, 3),
        ({"OMP_NUM_THREADS": "7"}, 7),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"PYEMBED_NUM_THREADS": "", "OMP_NUM_THREADS": "4"}, 4),
    ],
)
def test_environment(variables: dict[str, str], expected: int) -> None:
    """PYEMBED_NUM_THREADS goes before OMP_NUM_THREADS."""
    assert _threads.choose(variables) == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²", "1025"])
def test_bad_environment(value: str) -> None:
    """A variable that is not a positive integer is an error, not a guess."""
    with pytest.raises(ArgumentError, match=f"PYEMBED_NUM_THREADS = '{value}'"):
        _threads.choose({"PYEMBED_NUM_THREADS": value})


def resolve_on_one_processor() -> None:
    """Restrict this process to one processor and assert that it chooses one thread."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert _threads.default_num_threads() == 1
    assert _threads.resolve(None) == 1 and _threads.resolve(2) == 2


def test_affinity() -> None:
    """Without variables, the processors that the process may run on decide."""
    child.run(resolve_on_one_processor, env={"PYEMBED_NUM_THREADS": "", "OMP_NUM_THREADS": ""})


def look_for_threads_and_frameworks() -> None:
    """Assert that this process has one thread, and none of the optional dependencies."""
    assert len(list(Path("/proc/self/task").iterdir())) == 1
    assert not {"torch", "matplotlib", "safetensors"} & set(sys.modules)


def test_import_starts_nothing() -> None:
    """Importing pyembed starts no thread and imports no framework."""
    # numpy's own BLAS starts threads unless it is told not to
    child.run(look_for_threads_and_frameworks, env={"OPENBLAS_NUM_THREADS": "1"})


def print_simd_level() -> None:
    """Print the level that this process uses."""
    print(show_config()["simd"])


def test_unknown_simd_level_in_the_environment() -> None:
    """PYEMBED_SIMD with an unknown level is an error at import, never a silent fallback."""
    run = child.run(print_simd_level, env={"PYEMBED_SIMD": "v9"}, status=1)
    assert "PYEMBED_SIMD" in run.stderr
    assert "baseline" in run.stderr


def test_simd_level_from_the_environment() -> None:
    """PYEMBED_SIMD chooses the level."""
    run = child.run(print_simd_level, env={"PYEMBED_SIMD": "baseline"})
    assert run.stdout.startswith("baseline")


def _lookup_in_child(table: Table, ids: Ids, queue: multiprocessing.Queue[float]) -> None:
    queue.put(table.gather(ids).sum())


def test_fork_after_parallel_work() -> None:
    """A child that was forked after the pool had started does not hang."""
    table = Table.memory(10_000, 64, init=init.normal(), num_threads=2)
    ids = np.arange(5000)
    expected = table.gather(ids).sum()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    forked = context.Process(target=_lookup_in_child, args=(table, ids, queue))
    forked.start()
    assert queue.get(timeout=30) == expected
    forked.join(30)
    assert forked.exitcode == 0
    assert table.gather(ids).sum() == expected  # the parent still works


def test_many_gathers_at_once() -> None:
    """Several threads may look rows up in one table at the same time."""
    table = Table.memory(5000, 32, init=init.normal(), num_threads=2)
    failures: list[int] = []

    def look(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, 5000, 3000)
        expected = table.weight[ids]
        wrong = sum(not np.array_equal(table.gather(ids), expected) for _ in range(20))
        failures.append(wrong)

    _run_all([threading.Thread(target=look, args=(i,)) for i in range(4)])
    assert failures == [0] * 4


def print_lost_additions() -> None:
    """Add from four threads to three rows, and print by how much the sum is too small."""
    table = Table.memory(3, 256, num_threads=2)
    ids = np.random.default_rng(0).integers(0, 3, 4000)
    # Integer-valued floats: every order of additions gives the same exact total.
    ones = np.ones((4000, 256), np.float32)

    def add() -> None:
        for _ in range(10):
            table.scatter_add(ids, ones)

    _run_all([threading.Thread(target=add) for _ in range(4)])
    lost = np.bincount(ids)[:, None] * 40.0 - table.weight
    print(int(lost.sum()))


def test_no_addition_is_lost() -> None:
    """scatter_add from four callers of two threads each on three rows loses no addition."""
    assert int(child.run(print_lost_additions).stdout) == 0


def test_the_suite_notices_a_missing_lock(tmp_path: Path) -> None:
    """Negative control: built without the row locks, the same program loses additions."""
    mutant = tmp_path / "mutant"
    shutil.copytree(ROOT / "pyembed", mutant / "pyembed", ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, mutant)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=mutant,
        env=os.environ | {"CFLAGS": "-DPYEMBED_MUTANT_NO_LOCKS -O1"},
        check=True,
        capture_output=True,
    )
    runs = (child.run(print_lost_additions, env={"PYTHONPATH": str(mutant)}) for _ in range(10))
    assert any(int(run.stdout) > 0 for run in runs)


def test_steps_take_turns() -> None:
    """Steps of several threads on one table happen one after the other: none is lost."""
    table = Table.memory(50, 64, num_threads=2)
    o = optim.SGD(table, lr=1.0)
    ids, grad = np.arange(50), np.full((50, 64), -1, np.float32)

    def steps() -> None:
        for _ in range(50):
            o.step(ids, grad)

    _run_all([threading.Thread(target=steps) for _ in range(4)])
    assert (table.weight == 200).all()


def test_threads_are_released_between_calls() -> None:
    """pause_threads ends the pool, and the next call starts it again."""
    table = Table.memory(5000, 64, init=init.normal(), num_threads=2)
    expected = table.gather(np.arange(5000))
    _core.pause_threads()
    assert np.array_equal(table.gather(np.arange(5000)), expected)


def _run_all(callers: list[threading.Thread]) -> None:
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def work_without_more_threads(folder: Path) -> None:
    """Forbid this process any more threads, and assert that all work goes on with one."""
    folder.chmod(0o777)
    os.chdir(folder)
    if os.geteuid() == 0:  # the limit does not hold for root
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threading.Thread(target=print).start()
    table = Table.memory(100_000, 32, init=init.normal(), num_threads=8)
    ids = np.arange(100_000)
    assert np.array_equal(table.gather(ids), table.weight)
    optim.Adagrad(table).step(ids, np.ones((100_000, 32), np.float32))
    build.from_initializer("t", 300_000, 32, init.normal(), seed=3, num_threads=8)
    with Table.open("t", "r", num_threads=8) as made:
        assert np.array_equal(
            made.gather(ids), Table.memory(300_000, 32, init=init.normal(), seed=3).gather(ids)
        )
    assert list(lookahead([[0, 1], [2]], table)) == [[0, 1], [2]]
    with pytest.raises(IdError):
        list(lookahead([[0], [100_000]], table))
    assert main(["build", "-o", "u", "--rows", "3000000", "--dim", "4", "-q"]) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit of Linux")
def test_fewer_threads_where_the_system_allows_no_more() -> None:
    """At the process limit lookups, steps, builds and lookahead go on with one thread."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only this user may enter
        done = child.run(work_without_more_threads, Path(folder))
    assert "libgomp" not in done.stderr
    assert "tqdm" not in done.stderr


def test_startable() -> None:
    """Without a limit as many threads can be started as are wanted, from any thread."""
    assert [_threads.startable(n) for n in (1, 2, 3)] == [1, 2, 3]
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(_threads.startable(3)))
    _run_all([thread])
    assert found == [3]
