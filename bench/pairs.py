"""Pairs: is this checkout as fast as another one? ``python -m bench.pairs NAME... --old PATH``.

Each round starts a process for each checkout, which prepare the same cases and then take turns: a
sample of the old one, a sample of the new one, and so on, so that a drift of the machine meets
both. A round's ratio is the quotient of the two medians; the table shows the median, the lowest and
the highest of the rounds' ratios. A new process for each round also varies what is fixed within a
process, such as the placement of its pages.

Both processes import the cases of this checkout (``pair_cases.py``) and their own `pyembed`. They
call the same methods the same number of times, and the first result of each case has to have the
same bits: a case whose results differ is not timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import pair_cases
from bench.harness import PAUSE, CheckFailed, progress, show_time

HERE = Path(__file__).resolve().parents[1]
BAR = 1.03  # the highest ratio that counts as equally fast
FLOOR = 0.02  # seconds that a sample lasts at least
SAMPLES = 5  # of each checkout, a case and a round


class Checkout(NamedTuple):
    """A folder with a built `pyembed`, and the interpreter that it was built for."""

    path: Path
    python: str


class Round(NamedTuple):
    """Median seconds of a call in each of the two processes of a round."""

    old: float
    new: float


class Worker:
    """A process that serves the cases of a benchmark over pipes."""

    def __init__(self, checkout: Checkout, name: str, root: Path) -> None:
        self.name = name
        self.child = subprocess.Popen(
            [checkout.python, "-m", "bench.pair_cases", name],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = Path(self._answer())
        if found != checkout.path:
            raise CheckFailed(
                f"{checkout.python} imports pyembed of {found}, not of {checkout.path}"
            )

    def ask(self, command: str) -> str:
        """Send a command and wait for its answer."""
        assert self.child.stdin is not None
        print(command, file=self.child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise CheckFailed(f"a process of {self.name} ended with status {self.child.wait()}")
        return line.strip()

    def sample(self, calls: int) -> float:
        """Return seconds a call, after a pause in which the other worker's threads fall asleep."""
        time.sleep(PAUSE)
        return float(self.ask(f"sample {calls}"))

    def close(self) -> None:
        """End the process."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


@contextmanager
def _workers(checkouts: Sequence[Checkout], name: str) -> Iterator[list[Worker]]:
    """One worker for each checkout, each of which sees that `pyembed` and this `bench`."""
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for at, checkout in enumerate(checkouts):
                root = Path(folder, str(at))
                root.mkdir()
                (root / "pyembed").symlink_to(checkout.path / "pyembed")
                (root / "bench").symlink_to(HERE / "bench")
                workers.append(Worker(checkout, name, root))
            yield workers
        finally:
            for worker in workers:
                worker.close()


def _compare(case: str, old: Worker, new: Worker) -> Round:
    """Prepare a case in both processes, compare the results, and time it in turns."""
    if len({worker.ask(f"prepare {case}") for worker in (old, new)}) != 1:
        raise CheckFailed(f"the checkouts give different results for {case!r}")
    calls = 1
    for seconds in (FLOOR / 4, FLOOR):
        calls = math.ceil(seconds / max(worker.sample(calls) for worker in (old, new)))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(SAMPLES):
        for worker, found in zip((old, new), times, strict=True):
            found.append(worker.sample(calls))
    return Round(median(times[0]), median(times[1]))


def measure(name: str, old: Checkout, new: Checkout, rounds: int) -> dict[str, list[Round]]:
    """Time every case of a benchmark in so many rounds; the checkouts take turns to be first."""
    found: dict[str, list[Round]] = {case: [] for case in pair_cases.BENCHES[name]()}
    for at in range(rounds):
        progress(f"{name}: round {at + 1} of {rounds}")
        with _workers((old, new), name) as pair:
            for case, seconds in found.items():
                if at % 2:
                    seconds.append(Round(*reversed(_compare(case, *reversed(pair)))))
                else:
                    seconds.append(_compare(case, *pair))
    return found


def report(name: str, found: dict[str, list[Round]], bar: float) -> tuple[str, bool]:
    """Return a Markdown table, and whether every case met the bar."""
    lines = ["| case | old | new | new / old | lowest | highest | |", "|---" * 7 + "|"]
    all_met = True
    for case, seconds in found.items():
        ratios = [s.new / s.old for s in seconds]
        met = median(ratios) <= bar
        all_met &= met
        cells = [case, show_time(median(s.old for s in seconds))]
        cells += [show_time(median(s.new for s in seconds))]
        cells += [f"{r:.3f}" for r in (median(ratios), min(ratios), max(ratios))]
        lines.append("| " + " | ".join([*cells, "" if met else f"**above {bar}**"]) + " |")
    return "\n".join([f"**{name}**", "", *lines, ""]), all_met


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 0 if every ratio is at most the bar, 1 if not, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.pairs", description=__doc__)
    names = [*pair_cases.BENCHES, "all"]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--old", type=Path, required=True, help="the other checkout, built")
    parser.add_argument("--old-python", help="its interpreter (default: its .venv, or this one)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bar", type=float, default=BAR, help="highest new / old that is met")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the seconds of rounds")
    options = parser.parse_args(arguments)
    path = options.old.resolve()
    own = path / ".venv" / "bin" / "python"
    python = options.old_python or (str(own) if own.exists() else sys.executable)
    old, new = Checkout(path, python), Checkout(HERE, sys.executable)
    met = True
    for name in pair_cases.BENCHES if "all" in options.names else options.names:
        try:
            found = measure(name, old, new, options.rounds)
        except CheckFailed as error:
            print(f"bench.pairs: {error}", file=sys.stderr)
            return 2
        text, all_met = report(name, found, options.bar)
        print(text, flush=True)
        met &= all_met
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"bench": name, "rounds": found}) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
