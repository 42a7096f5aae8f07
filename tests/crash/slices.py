"""A short run of some cells or mutants, for the tests."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.child import ROOT


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
