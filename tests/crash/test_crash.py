"""A thin slice of every sweep of the crash suite, and the mutants that it must find.

`make torture` runs the whole suite; docs/durability.md has its counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.crash import hunts, mutants, torture

ROOT = Path(__file__).parents[2]


def run(*options: str) -> str:
    """Run the suite in a new process: it forks, and a fork must find no threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.torture", "--short", *options],
        cwd=ROOT,
        env={**os.environ, "PYEMBED_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_slice_of_every_sweep() -> None:
    """After any death or failure the table holds the last commit, or the one under way, exactly."""
    run(*(f"--cell={name}" for name in torture.TITLES if not name.startswith("ext4")))


def test_the_suite_notices_every_mutant() -> None:
    """Each broken rule of the protocol leads to a bad state that a sweep finds."""
    run(*(f"--mutant={name}" for name in hunts.HUNTS))


def test_every_mutant_is_hunted() -> None:
    """No mutant is left out."""
    assert {"", *hunts.HUNTS} == set(mutants.MUTANTS)
