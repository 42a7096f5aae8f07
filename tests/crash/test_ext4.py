"""A thin slice of the power cuts on a real ext4, and mutants that they must find there."""

from __future__ import annotations

import pytest

from tests.crash import hunts, torture
from tests.crash.slices import run

FEW = ("journal not synced", "rows not synced", "folder not synced")


def _run(*options: str) -> None:
    said = run(*options)
    if "skipped: " in said:
        pytest.skip(said.split("skipped: ")[1].split(" |")[0])


def test_power_cuts_on_ext4() -> None:
    """After any power cut the table holds the last commit, or the one under way, exactly."""
    _run(*(f"--cell={name}" for name in torture.TITLES if name.startswith("ext4")))


def test_power_cuts_on_ext4_notice_mutants() -> None:
    """A sync that is left out shows on a real file system; `make torture` has more of them."""
    _run(*(f"--mutant={name}{hunts.EXT4}" for name in FEW))


def test_mutants_on_ext4_are_mutants() -> None:
    """The model of a disk finds every mutant that is hunted on ext4, too."""
    assert set(hunts.ON_EXT4) <= set(hunts.HUNTS)
