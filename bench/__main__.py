"""Run a benchmark: ``python -m bench NAME [--quick] [--json FILE] [--plot FILE] [--write-readme]``.

A line on stderr announces each row once it is measured; the Markdown report goes to stdout.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench import harness

NAMES = (
    "gather",
    "update",
    "tables",
    "layers",
    "torch_step",
    "build",
    "outofcore",
    "replacement",
    "durability",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that the arguments name; return 0, or 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "list"], help="which question; list shows them")
    parser.add_argument("--quick", action="store_true", help="a few cases, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSON lines")
    parser.add_argument(
        "--write-readme", action="store_true", help="put the report into bench/README.md"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (outofcore)")
    options = parser.parse_args(arguments)
    if options.name == "list":
        for name in NAMES:
            print(f"{name:12}{importlib.import_module(f'bench.{name}').QUESTION}")
        return 0
    try:
        import pyembed  # noqa: F401
    except ImportError as error:
        print(f"bench: pyembed cannot be imported ({error}): run `make bench`", file=sys.stderr)
        return 2
    rows: list[harness.Row] = []

    def emit(row: harness.Row) -> None:
        rows.append(row)
        parts = [f"{k} {v}" for k, v in (row.case | row.cells).items()]
        harness.progress(f"{row.table}: {', '.join(parts)}")

    bench = importlib.import_module(f"bench.{options.name}")
    if options.plot and not hasattr(bench, "plot"):
        parser.error(f"{options.name} has nothing to plot")
    facts = harness.environment()
    if hasattr(bench, "facts"):
        facts |= bench.facts()
    try:
        bench.run(options.quick, emit)
    except harness.CheckFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    text = harness.markdown(bench.QUESTION, facts, rows)
    print(text)
    if options.json:
        with options.json.open("a") as file:
            harness.json_lines(file, options.name, facts, rows)
    if options.plot:
        bench.plot(rows, options.plot)
    if options.write_readme:
        harness.write_readme(options.name, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
