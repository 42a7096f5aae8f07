"""Build the one extension module, pyembed._core. Metadata and tool settings are in pyproject.toml.

PYEMBED_NO_OPENMP=1   build without OpenMP (everything runs on one thread)
PYEMBED_DEBUG=1       bounds checks, C assertions, -O1 -g: for sanitizers and debuggers
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("PYEMBED_DEBUG") == "1"
OPENMP = os.environ.get("PYEMBED_NO_OPENMP") != "1"

# No contraction of a*b+c, and never -ffast-math: every SIMD level must give the same bits. Never
# -march=native: the build must run on other machines.
NUMERICS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Options of CFLAGS, LDFLAGS or CC that change results. Those of the first two lines also make the
# whole process flush denormal numbers to zero, if the linker sees them.
UNSAFE = {
    *("-Ofast", "-ffast-math", "-funsafe-math-optimizations", "-mdaz-ftz"),
    *("--fast-math", "-ffp-model=fast", "-ffp-model=aggressive"),
    *("-ffinite-math-only", "-fassociative-math", "-freciprocal-math", "-fno-signed-zeros"),
    *("-fno-honor-nans", "-fno-honor-infinities", "-fapprox-func", "-fsingle-precision-constant"),
    *("-mrecip", "-mfpmath=387", "-mfpmath=both", "-mfpmath=sse+387", "-mfpmath=sse,387"),
}
OPTIMISE = ["-O1", "-g", "-fno-omit-frame-pointer"] if DEBUG else ["-O3", "-DNDEBUG"]
OPENMP_FLAGS = {"darwin": (["-Xpreprocessor", "-fopenmp"], ["-lomp"])}.get(
    sys.platform, (["-fopenmp"], ["-fopenmp"])
)

PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
NO_COMPILER = """
pyembed: no working C compiler ({reason}).
  Debian, Ubuntu:  apt install build-essential python3-dev
  macOS:           xcode-select --install
"""
NO_OPENMP = """
pyembed: the C compiler cannot build and link an OpenMP program.
  Debian, Ubuntu:  apt install gcc libgomp1      (with clang: libomp-dev)
  macOS:           brew install libomp, then export CFLAGS=-I$(brew --prefix libomp)/include \\
                   LDFLAGS=-L$(brew --prefix libomp)/lib
  or build a version that runs on one thread:  PYEMBED_NO_OPENMP=1 pip install .
The compiler said:
{reason}
"""


def safe(flags: list[str]) -> list[str]:
    """Those of some options that cannot change results."""
    return [flag for flag in flags if flag not in UNSAFE and not flag.startswith("-mrecip=")]


class BuildCore(build_ext):
    """Probe the compiler that the build uses for OpenMP, then build."""

    def build_extensions(self) -> None:
        self._drop_unsafe_flags()
        compile_flags, link_flags = OPENMP_FLAGS if OPENMP else ([], [])
        self._probe("int main(void) { return 0; }\n", [], [], NO_COMPILER)
        if OPENMP:
            self._probe(PROBE, compile_flags, link_flags, NO_OPENMP)
        for extension in self.extensions:
            extension.extra_compile_args = [*OPTIMISE, *NUMERICS, *compile_flags]
            extension.extra_link_args = link_flags
        super().build_extensions()

    def _drop_unsafe_flags(self) -> None:
        """Remove them from the commands that compile and link, and say so."""
        dropped = set()
        for name in self.compiler.executables:
            command = getattr(self.compiler, name, None) or []
            if kept := safe(command):
                dropped |= set(command) - set(kept)
                self.compiler.set_executable(name, kept)
        if dropped:
            print(f"pyembed: {', '.join(sorted(dropped))} would change results; not used")

    def _probe(
        self, program: str, compile_flags: list[str], link_flags: list[str], message: str
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            command = [*self.compiler.compiler_so, *compile_flags, "-o", str(Path(folder, "probe"))]
            command += [str(source), *safe(os.environ.get("LDFLAGS", "").split()), *link_flags]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                sys.exit(NO_COMPILER.format(reason=f"{error.filename} not found"))
            except subprocess.CalledProcessError as error:
                sys.exit(message.format(reason=error.stderr.strip()))


core = Extension(
    "pyembed._core",
    sources=["pyembed/_core.pyx", *map(str, sorted(Path("pyembed/_kernels").glob("*.c")))],
    depends=[
        *map(str, sorted(Path("pyembed/_kernels").glob("*.h"))),
        *map(str, sorted(Path("pyembed/_core_parts").glob("*.pxi"))),
    ],
    include_dirs=["pyembed", numpy.get_include()],
    define_macros=[
        ("_GNU_SOURCE", None),
        ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
        ("NPY_TARGET_VERSION", "NPY_1_22_API_VERSION"),
    ],
)

setup(
    ext_modules=cythonize(
        [core],
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "embedsignature": True,
        },
    ),
    cmdclass={"build_ext": BuildCore},
)
