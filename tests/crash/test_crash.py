"""A thin slice of every sweep of the crash suite, and the mutants that it must find.

`make torture` runs the whole suite; docs/durability.md has its counts.
"""

from __future__ import annotations

from tests.crash import hunts, mutants, torture
from tests.crash.slices import run


def test_a_slice_of_every_sweep() -> None:
    """After any death or failure the table holds the last commit, or the one under way, exactly."""
    run(*(f"--cell={name}" for name in torture.TITLES if not name.startswith("ext4")))


def test_the_suite_notices_every_mutant() -> None:
    """Each broken rule of the protocol leads to a bad state that a sweep finds."""
    run(*(f"--mutant={name}" for name in hunts.HUNTS))


def test_every_mutant_is_hunted() -> None:
    """No mutant is left out."""
    assert {"", *hunts.HUNTS} == set(mutants.MUTANTS)
