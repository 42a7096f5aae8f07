"""The build: options of the environment that would change results."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.child import ROOT

UNSAFE = ["-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-mdaz-ftz", "-mrecip=all"]
# A command in place of the compiler that only writes down its arguments: a build of the kernels for
# each case would take minutes.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ $# -gt 0 ]; do [ "$1" = -o ] && target=$2; shift; done
: > "$target"
"""


@pytest.mark.parametrize("variable", ["CFLAGS", "LDFLAGS", "CC"])
def test_build_drops_options_that_change_results(tmp_path: Path, variable: str) -> None:
    """Neither the compiler nor the linker sees them, wherever the environment has them."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyembed" / "_kernels").mkdir(parents=True)
    (tmp_path / "pyembed" / "_core.pyx").write_text("")
    (tmp_path / "pyembed" / "_kernels" / "one.c").write_text("int one;\n")
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    environment = os.environ | {"CC": str(compiler), "PYTHONPATH": ""}
    environment["LDSHARED"] = f"{compiler} -shared"
    environment[variable] = " ".join([environment.get(variable, ""), *UNSAFE, "-DKEPT"])
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = log.read_text()
    assert "-DKEPT" in calls and "-fopenmp" in calls and "-shared" in calls
    assert not any(option in calls.split() for option in UNSAFE)
    assert "pyembed: -Ofast, " in done.stdout
