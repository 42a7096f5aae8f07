"""Child processes that run a function of a test module, and writers that are killed.

The child is a fresh interpreter, not a fork, so it inherits no thread and no lock of the test. It
imports the module of the function, which therefore has to be a function at module level:

    def add(table: Table) -> None:
        table.scatter_add([0], np.ones((1, 2), np.float32))

    kill_writer(path, add)  # the table at `path` is dirty now

Arguments travel as a pickle. A child that ends with another exit status than the expected one fails
the test with what it printed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pyembed import Table

ROOT = Path(__file__).parents[2]
Function = Callable[..., object]


def run(
    function: Function,
    *arguments: object,
    status: int | None = 0,
    flags: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Call ``function(*arguments)`` in a child and return its exit status and output.

    Parameters
    ----------
    status
        The expected exit status, negative for a signal; None allows any.
    flags
        Flags of the interpreter, such as ``("-W", "error")``.
    env
        Environment variables to add to those of this process.
    """
    command = _command(function, arguments, flags)
    done = subprocess.run(
        command,
        env=_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if status is not None and done.returncode != status:
        raise AssertionError(
            f"{function.__qualname__} ended with {done.returncode} instead of {status}:\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def start(function: Function, *arguments: object) -> subprocess.Popen[str]:
    """Start ``function(*arguments)`` in a child whose stdout is a pipe, and do not wait for it."""
    command = _command(function, arguments, ())
    return subprocess.Popen(command, env=_environment(None), stdout=subprocess.PIPE, text=True)


def kill_writer(
    path: Path, change: Function, *arguments: object, flags: tuple[str, ...] = (), **options: Any
) -> None:
    """Change the table at ``path`` in a child that is killed before it can commit.

    The child opens the table with ``options``, calls ``change(table, *arguments)``, and kills
    itself by SIGKILL, unless `change` has called `die` already.
    """
    run(_write_and_die, path, change, arguments, options, status=-signal.SIGKILL, flags=flags)


def die() -> NoReturn:
    """Kill this process by SIGKILL: no exception, no exit handler, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL returned")


def _write_and_die(
    path: Path, change: Function, arguments: tuple[object, ...], options: Mapping[str, Any]
) -> NoReturn:
    table = Table.open(path, **options)
    change(table, *arguments)
    die()


def _command(
    function: Function, arguments: tuple[object, ...], flags: tuple[str, ...]
) -> list[str]:
    payload = pickle.dumps((function, arguments)).hex()
    return [sys.executable, *flags, "-m", "tests.helpers.child", payload]


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Add ``more`` to this environment, and the root of the tests at the end of the path."""
    environment = os.environ | (more or {}) | {"PYTHONSAFEPATH": "1"}
    path = [environment.get("PYTHONPATH", ""), str(ROOT)]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


if __name__ == "__main__":
    _function, _arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
    _function(*_arguments)
