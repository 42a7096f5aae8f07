"""The command ``pyembed``: arguments to calls, no logic of its own.

Results go to stdout, errors and progress to stderr.

Exit status: 0 done, 1 failed or interrupted, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyembed import init
from pyembed.errors import ArgumentError, FormatError, PyembedError
from pyembed.storage import id_map
from pyembed.table import Table
from pyembed.tools import build, convert, export
from pyembed.tools.info import VERSION, show_config
from pyembed.tools.verify import verify
from pyembed.train.neighbours import Model
from pyembed.train.skipgram import SkipgramSettings, train_skipgram


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as interrupt:
        print(f"pyembed: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 1
    except ArgumentError as error:
        print(f"pyembed: {error}", file=sys.stderr)
        return 2
    except (PyembedError, OSError, ImportError, MemoryError) as error:
        print(f"pyembed: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyembed", description="Embedding tables that are larger than memory, on a CPU."
    )
    parser.add_argument("--version", action="version", version=f"pyembed {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_info(commands)
    _add_verify(commands)
    _add_recover(commands)
    _add_train(commands)
    _add_similar(commands)
    doctor = commands.add_parser("doctor", help="what this build and this machine are")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=lambda a: _show(show_config(), a.json))
    return parser


def _add_build(commands: Any) -> None:
    p = commands.add_parser("build", help="make a table, fresh or from a file of vectors")
    p.add_argument("vectors", nargs="?", help="word2vec (text, binary) or GloVe file, plain or .gz")
    p.add_argument("-o", "--output", required=True, help="folder to make; must not exist")
    p.add_argument(
        "--format", default="auto", help="of the vectors: auto, word2vec, word2vec-binary, glove"
    )
    p.add_argument("--rows", type=int, help="rows of a fresh table")
    p.add_argument("--dim", type=int, help="floats of a row")
    p.add_argument(
        "--init", default="normal", help="normal[:MEAN,STD] uniform[:LOW,HIGH] constant:V zeros"
    )
    p.add_argument("--optimizer", metavar="RULE", help="whose state the rows shall carry: adam, …")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--order", choices=["frequency"], help="rows of frequent ids together; keeps the id map"
    )
    frequency = p.add_mutually_exclusive_group()
    frequency.add_argument("--counts", help="how often each id occurs: .npy, or text, one a line")
    frequency.add_argument("--ids", help="or the ids themselves, to be counted: .npy")
    p.add_argument("--threads", type=int)
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_build, fail=p.error)


def _build(a: argparse.Namespace) -> None:
    progress = False if a.quiet else None
    if (a.order is None) != (a.counts is None and a.ids is None):
        a.fail("--order frequency needs --counts or --ids, and they need it")
    if a.vectors is not None:
        if a.order is not None:
            a.fail("--order is for a fresh table; a file of vectors keeps its own order")
        if a.rows is not None or a.dim is not None:
            a.fail("--rows and --dim are for a fresh table; a file of vectors has its own")
        build.from_vectors(
            a.output, a.vectors, format=a.format, optimizer=a.optimizer, progress=progress
        )
    elif a.rows is None or a.dim is None:
        a.fail("give a file of vectors, or --rows and --dim for a fresh table")
    else:
        build.from_initializer(
            a.output,
            a.rows,
            a.dim,
            init.parse(a.init),
            optimizer=a.optimizer,
            seed=a.seed,
            counts=_counts(a),
            num_threads=a.threads,
            progress=progress,
        )
    _info(argparse.Namespace(table=a.output, resident=False, json=False))


def _add_convert(commands: Any) -> None:
    p = commands.add_parser("convert", help="make a table with columns added or dropped")
    p.add_argument("table", help="folder of a table, or a .npy of float32 rows")
    p.add_argument("-o", "--output", required=True, help="folder to make; must not exist")
    p.add_argument("--optimizer", metavar="RULE", help="whose state the rows shall carry: adam, …")
    p.add_argument(
        "--add", action="append", default=[], metavar="NAME:WIDTH", help="a column; repeatable"
    )
    p.add_argument("--drop", action="append", default=[], metavar="NAME", help="repeatable")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_convert, fail=p.error)


def _convert(a: argparse.Namespace) -> None:
    add = {}
    for text in a.add:
        name, _, width = text.partition(":")
        if not (width.isascii() and width.isdigit()) or name in add:
            a.fail(f"--add {text}; allowed: a new NAME:WIDTH, as last_step:1")
        add[name] = int(width)
    progress = False if a.quiet else None
    convert.convert(
        a.table, a.output, optimizer=a.optimizer, add=add, drop=a.drop, progress=progress
    )
    _info(argparse.Namespace(table=a.output, json=False, resident=False))


def _add_export(commands: Any) -> None:
    p = commands.add_parser("export", help="copy a table, or what changed since a generation")
    p.add_argument("table")
    p.add_argument("-o", "--output", required=True, help="folder to make; must not exist")
    p.add_argument("--since", type=int, metavar="GENERATION", help="only rows that changed since")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_export)
    p = commands.add_parser("apply", help="bring a copy forward by what `export --since` made")
    p.add_argument("delta")
    p.add_argument("table", help="a copy at the generation that the delta goes on from")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_apply)


def _export(a: argparse.Namespace) -> None:
    export.export(a.table, a.output, since=a.since, progress=False if a.quiet else None)
    if a.since is None:
        _info(argparse.Namespace(table=a.output, json=False, resident=False))
    else:
        delta = export.read_delta(a.output)
        facts = {"since": delta.since, "generation": delta.table.generation, "rows": delta.count}
        _show({"path": a.output, **facts}, False)


def _apply(a: argparse.Namespace) -> None:
    done = export.apply(a.delta, a.table, progress=False if a.quiet else None)
    generation = export.read_delta(a.delta).table.generation
    _show({"path": a.table, "generation": generation, "changed": done}, False)
    if not done:
        print(f"{a.table} was at generation {generation} already; nothing was done")


def _counts(a: argparse.Namespace) -> NDArray[np.int64] | None:
    if a.counts is not None:
        return id_map.read_counts(a.counts)
    return None if a.ids is None else id_map.count_ids(a.ids, a.rows)


def _add_info(commands: Any) -> None:
    p = commands.add_parser("info", help="what a table is")
    p.add_argument("table")
    p.add_argument("--resident", action="store_true", help="and how much of it is in memory")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_info)


def _info(a: argparse.Namespace) -> None:
    with Table.open(a.table, "r", live=True) as table:
        facts = {
            "path": str(table.path),
            "rows": table.rows,
            "dim": table.dim,
            "columns": table.columns,
            "bytes": table.nbytes,
            "id_map": table.id_map is not None,
            "generation": table.generation,
            "state": table.state,
            "sealed": bool(table.committed.seal),
            "meta": table.meta,
        }
        if a.resident:
            stats = table.stats()
            facts |= {"resident_bytes": stats.resident_bytes, "dirty_bytes": stats.dirty_bytes}
    _show(facts, a.json)


def _add_verify(commands: Any) -> None:
    p = commands.add_parser("verify", help="is a table what its manifest says? changes nothing")
    p.add_argument("table")
    p.add_argument("--finite", action="store_true", help="and look at every row for NaN, infinity")
    p.add_argument("--json", action="store_true")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=_verify)


def _verify(a: argparse.Namespace) -> None:
    found = verify(a.table, a.finite, False if a.quiet else None)
    facts = asdict(found)
    if not a.finite:
        del facts["nonfinite_rows"]
    if found.checked_blocks is None and not a.json:
        facts["checked_blocks"] = "none: rows changed since they were written, so have no checksum"
    _show(facts, a.json)
    if found.nonfinite_rows:
        raise FormatError(f"{a.table}: {found.nonfinite_rows:,} rows are not finite")


def _add_recover(commands: Any) -> None:
    p = commands.add_parser("recover", help="bring a table back to its last commit")
    p.add_argument("table")
    p.add_argument(
        "--salvage", action="store_true", help="keep the rows as they are, as a commit of their own"
    )
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_recover)


def _recover(a: argparse.Namespace) -> None:
    with Table.open(a.table, salvage=a.salvage) as table:
        facts = {"rows": table.rows, "generation": table.generation, "meta": table.meta}
    _show(facts, a.json)


# The help of the options of `train skipgram`: one for each field of `SkipgramSettings`.
SKIPGRAM_OPTIONS: dict[str, str] = {
    "dim": "floats of a vector",
    "window": "most words between a word and its context",
    "negative": "false pairs for each true one",
    "min_count": "words that occur less often are dropped",
    "epochs": "passes over the text",
    "lr": "learning rate at the start",
    "sample": "threshold of the subsampling of frequent words, 0 for none",
    "minn": "shortest n-gram",
    "maxn": "longest n-gram",
    "buckets": "rows that the n-grams share, 0 for no n-grams",
    "seed": "of everything random",
}


def _add_train(commands: Any) -> None:
    p = commands.add_parser("train", help="train a model whose tables may be larger than memory")
    models = p.add_subparsers(dest="model", required=True, metavar="MODEL")
    s = models.add_parser("skipgram", help="word vectors from text: skip-gram, negative sampling")
    s.add_argument("corpus", nargs="+", help="files, or folders that are searched for text")
    s.add_argument("-o", "--output", required=True, help="folder to make; must not exist")
    for field in fields(SkipgramSettings):
        option, default = "--" + field.name.replace("_", "-"), field.default
        meaning = f"{SKIPGRAM_OPTIONS[field.name]} ({default})"
        s.add_argument(option, type=type(default), default=default, help=meaning)
    s.add_argument("--suffix", action="append", help="of the files to read in a folder; repeatable")
    s.add_argument("--exclude", action="append", default=[], help="pattern of names not to read")
    s.add_argument("--encoding-errors", choices=["strict", "replace"], default="strict")
    s.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="keep a checkpoint every N batches of 4096 words, in OUTPUT.partial",
    )
    s.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint: the same command"
    )
    s.add_argument("--threads", type=int)
    s.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    s.set_defaults(run=_train_skipgram)


def _train_skipgram(a: argparse.Namespace) -> None:
    settings = {name: getattr(a, name) for name in SKIPGRAM_OPTIONS}
    result = train_skipgram(
        a.corpus,
        a.output,
        **settings,
        **({"suffixes": a.suffix} if a.suffix else {}),
        exclude=a.exclude,
        encoding_errors=a.encoding_errors,
        checkpoint_every=a.checkpoint_every,
        resume=a.resume,
        num_threads=a.threads,
        progress=False if a.quiet else None,
    )
    _show(asdict(result) | {"path": str(result.path)}, False)


def _add_similar(commands: Any) -> None:
    p = commands.add_parser("similar", help="the nearest words of a trained model")
    p.add_argument("model", help="folder that `pyembed train` made")
    p.add_argument("words", nargs="+")
    p.add_argument("-n", "--topn", type=int, default=10)
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=_similar)


def _similar(a: argparse.Namespace) -> None:
    with Model(a.model) as model:
        found = dict(zip(a.words, model.similar(a.words, a.topn), strict=True))
    if a.json:
        print(json.dumps(found, indent=2))
        return
    for word, neighbours in found.items():
        print(word)
        for neighbour, cosine in neighbours:
            print(f"  {cosine:.3f}  {neighbour}")


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = f"{value:,}" if type(value) is int else value
        print(f"{name + ':':<18} {text}")
