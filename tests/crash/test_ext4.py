"""A thin slice of the power cuts on a real ext4, and mutants that they must find there."""

from __future__ import annotations

import pytest

from tests.crash import hunts, torture
from tests.crash.test_crash import run

FEW = ("journal not synced", "rows not synced", "folder not synced")


def _run(*options: str) -> None:
    said = run(*options)
    if "skipped: " in said:
        pytest.skip(said.split("skipped: ")[1].split(" |")[0])


def test_power_cuts_on_ext4() -> None:
    """Whatever the kernel finds on the disk: the last commit is there, or the one under way."""
    _run(*(f"--cell={name}" for name in torture.TITLES if name.startswith("ext4")))


def test_power_cuts_on_ext4_notice_mutants() -> None:
    """A sync that is left out shows on a real file system; `make torture` has more of them."""
    _run(*(f"--mutant={name}{hunts.EXT4}" for name in FEW))


def test_mutants_on_ext4_are_mutants() -> None:
    """Each hunt there is of one that the model finds too."""
    assert set(hunts.ON_EXT4) <= set(hunts.HUNTS)
