"""Fixtures: every SIMD level, one to three threads, and a folder for tables."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from pyembed import Table, _core

# A shell starts jobs in the background with Ctrl-C ignored, and their children inherit that: tests
# that interrupt a child would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Fixed seeds: a run that failed can be run again. No deadline: machines are shared.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("fixed")


@pytest.fixture(params=_core.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level that this processor has."""
    before = _core.use_simd(request.param)
    yield request.param
    _core.use_simd(before)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> int:
    """One thread, as many as the smallest machine has processors, and one more."""
    return int(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a table may be made."""
    return tmp_path / "items.pyembed"


@pytest.fixture
def table(path: Path) -> Path:
    """A committed table of 4 rows with the values 0..7 and Adagrad state."""
    with Table.create(path, 4, 2, "adagrad") as t, t.writing(range(4)) as weight:
        weight[:] = np.arange(8).reshape(4, 2)
    return path
