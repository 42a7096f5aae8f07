"""The command ``pyembed``: it turns arguments into calls of the package, and results into text.

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
from pyembed.tools.info import VERSION, show_config, table_facts
from pyembed.tools.verify import verify
from pyembed.train.neighbours import Model
from pyembed.train.skipgram import SkipgramSettings, train_skipgram


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        The exit status.
    """
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
    _add_apply(commands)
    _add_info(commands)
    _add_verify(commands)
    _add_recover(commands)
    _add_train(commands)
    _add_similar(commands)
    _add_doctor(commands)
    return parser


# --- options that several commands have -----------------------------------------------------------


def _add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument("-o", "--output", required=True, help="folder to make; it must not exist")


def _add_optimizer(p: argparse.ArgumentParser) -> None:
    text = "reserve columns for the state of this optimizer: adam, adagrad, ..."
    p.add_argument("--optimizer", metavar="NAME", help=text)


def _add_threads(p: argparse.ArgumentParser) -> None:
    p.add_argument("--threads", type=int, metavar="N", help="number of threads")


def _add_quiet(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-q",
        "--quiet",
        dest="progress",
        action="store_const",
        const=False,
        help="draw no progress bar",
    )


def _add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print the result as JSON")


def _show(facts: dict[str, Any], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = f"{value:,}" if type(value) is int else value
        print(f"{name + ':':<18} {text}")


# --- one function for the options of a command, one for the command -------------------------------


def _add_build(commands: Any) -> None:
    p = commands.add_parser("build", help="make a table, fresh or from a file of vectors")
    p.add_argument(
        "vectors", nargs="?", help="file of word2vec (text or binary) or GloVe vectors, or its .gz"
    )
    _add_output(p)
    p.add_argument(
        "--format",
        default="auto",
        help="format of VECTORS: auto (default), word2vec, word2vec-binary or glove",
    )
    p.add_argument("--rows", type=int, metavar="N", help="number of rows of a fresh table")
    p.add_argument("--dim", type=int, metavar="N", help="floats per row of a fresh table")
    p.add_argument(
        "--init",
        default="normal",
        help="values of a fresh table: normal[:MEAN,STD] (default), uniform[:LOW,HIGH], "
        "constant:VALUE or zeros",
    )
    _add_optimizer(p)
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the values (default: 0)"
    )
    p.add_argument(
        "--order",
        choices=["frequency"],
        help="keep the rows of frequent ids together, and an id map with the table; needs "
        "--counts or --ids",
    )
    frequency = p.add_mutually_exclusive_group()
    frequency.add_argument(
        "--counts", metavar="FILE", help="how often each id occurs: .npy, or text with one a line"
    )
    frequency.add_argument("--ids", metavar="FILE", help="ids to count instead: .npy")
    _add_threads(p)
    _add_quiet(p)
    p.set_defaults(run=_build, fail=p.error)


def _build(a: argparse.Namespace) -> None:
    if (a.order is None) != (a.counts is None and a.ids is None):
        a.fail("--order frequency needs --counts or --ids, and they need it")
    if a.vectors is not None:
        if a.order is not None:
            a.fail("--order is for a fresh table; a file of vectors keeps its own order")
        if a.rows is not None or a.dim is not None:
            a.fail("--rows and --dim are for a fresh table; a file of vectors has its own")
        build.from_vectors(
            a.output, a.vectors, format=a.format, optimizer=a.optimizer, progress=a.progress
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
            progress=a.progress,
        )
    _show(table_facts(a.output))


def _counts(a: argparse.Namespace) -> NDArray[np.int64] | None:
    if a.counts is not None:
        return id_map.read_counts(a.counts)
    return None if a.ids is None else id_map.count_ids(a.ids, a.rows)


def _add_convert(commands: Any) -> None:
    p = commands.add_parser("convert", help="copy a table with columns added or dropped")
    p.add_argument("table", help="folder of a table, or a .npy of float32 rows")
    _add_output(p)
    _add_optimizer(p)
    p.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME:WIDTH",
        help="column of zeros to add; repeatable",
    )
    p.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="column to drop; repeatable"
    )
    _add_quiet(p)
    p.set_defaults(run=_convert, fail=p.error)


def _convert(a: argparse.Namespace) -> None:
    add = {}
    for text in a.add:
        name, _, width = text.partition(":")
        if not (width.isascii() and width.isdigit()) or name in add:
            a.fail(f"--add {text}; allowed: a new NAME:WIDTH, such as last_step:1")
        add[name] = int(width)
    convert.convert(
        a.table, a.output, optimizer=a.optimizer, add=add, drop=a.drop, progress=a.progress
    )
    _show(table_facts(a.output))


def _add_export(commands: Any) -> None:
    p = commands.add_parser(
        "export", help="copy a table, or only the rows that changed since a generation"
    )
    p.add_argument("table", help="folder of a table")
    _add_output(p)
    p.add_argument(
        "--since",
        type=int,
        metavar="GENERATION",
        help="copy only rows that changed since; the output is for `pyembed apply`",
    )
    _add_quiet(p)
    p.set_defaults(run=_export)


def _export(a: argparse.Namespace) -> None:
    export.export(a.table, a.output, since=a.since, progress=a.progress)
    if a.since is None:
        _show(table_facts(a.output))
    else:
        delta = export.read_delta(a.output)
        facts = {"since": delta.since, "generation": delta.table.generation, "rows": delta.count}
        _show({"path": a.output, **facts})


def _add_apply(commands: Any) -> None:
    p = commands.add_parser("apply", help="update a copy with the output of `export --since`")
    p.add_argument("delta", help="folder that `pyembed export --since` made")
    p.add_argument("table", help="copy, at the generation that the delta starts from")
    _add_quiet(p)
    p.set_defaults(run=_apply)


def _apply(a: argparse.Namespace) -> None:
    changed = export.apply(a.delta, a.table, progress=a.progress)
    generation = export.read_delta(a.delta).table.generation
    _show({"path": a.table, "generation": generation, "changed": changed})
    if not changed:
        print(f"{a.table} was at generation {generation} already; nothing was done")


def _add_info(commands: Any) -> None:
    p = commands.add_parser("info", help="print the facts about a table")
    p.add_argument("table", help="folder of a table, or a .npy of float32 rows")
    p.add_argument(
        "--resident", action="store_true", help="also print how much of the table is in memory"
    )
    _add_json(p)
    p.set_defaults(run=lambda a: _show(table_facts(a.table, a.resident), a.json))


def _add_verify(commands: Any) -> None:
    p = commands.add_parser("verify", help="check a table for damage; changes nothing")
    p.add_argument("table", help="folder of a table, or a .npy of float32 rows")
    p.add_argument(
        "--finite", action="store_true", help="also look for NaN and infinity in every row"
    )
    _add_json(p)
    _add_quiet(p)
    p.set_defaults(run=_verify)


def _verify(a: argparse.Namespace) -> None:
    found = verify(a.table, a.finite, a.progress)
    facts = asdict(found)
    if not a.finite:
        del facts["nonfinite_rows"]
    if found.checked_blocks is None and not a.json:
        facts["checked_blocks"] = "none; rows that changed have no checksum"
    _show(facts, a.json)
    if found.nonfinite_rows:
        raise FormatError(f"{a.table}: {found.nonfinite_rows:,} rows are not finite")


def _add_recover(commands: Any) -> None:
    p = commands.add_parser("recover", help="roll a table back to its last commit")
    p.add_argument("table", help="folder of a table")
    p.add_argument(
        "--salvage", action="store_true", help="keep the rows as they are, and commit them"
    )
    _add_json(p)
    p.set_defaults(run=_recover)


def _recover(a: argparse.Namespace) -> None:
    with Table.open(a.table, salvage=a.salvage) as table:
        facts = {"rows": table.rows, "generation": table.generation, "meta": table.meta}
    _show(facts, a.json)


# The help of the options of `train skipgram`: one for each field of `SkipgramSettings`.
SKIPGRAM_OPTIONS: dict[str, str] = {
    "dim": "floats of a vector",
    "window": "largest distance between a word and its context",
    "negative": "false pairs for each true one",
    "min_count": "words that occur less often are dropped",
    "epochs": "passes over the text",
    "lr": "learning rate at the start",
    "sample": "threshold for dropping frequent words at random; 0 drops none",
    "minn": "length of the shortest n-gram",
    "maxn": "length of the longest n-gram",
    "buckets": "rows that the n-grams share; 0 trains without n-grams",
    "seed": "seed of everything random",
}


def _add_train(commands: Any) -> None:
    p = commands.add_parser("train", help="train a model whose table may be larger than memory")
    models = p.add_subparsers(dest="model", required=True, metavar="MODEL")
    s = models.add_parser("skipgram", help="word vectors from text: skip-gram, negative sampling")
    s.add_argument("corpus", nargs="+", help="text file, or folder to search for text files")
    _add_output(s)
    for field in fields(SkipgramSettings):
        option, default = "--" + field.name.replace("_", "-"), field.default
        meaning = f"{SKIPGRAM_OPTIONS[field.name]} (default: {default})"
        s.add_argument(option, type=type(default), metavar="N", default=default, help=meaning)
    s.add_argument(
        "--suffix", action="append", help="suffix of the files to read in a folder; repeatable"
    )
    s.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="pattern of names in a folder not to read; repeatable",
    )
    s.add_argument(
        "--encoding-errors",
        choices=["strict", "replace"],
        default="strict",
        help="stop at bytes that are not UTF-8 (default), or read them as U+FFFD",
    )
    s.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="keep a checkpoint every N batches of 4096 words, in OUTPUT.partial",
    )
    s.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint; repeat the other options",
    )
    _add_threads(s)
    _add_quiet(s)
    s.set_defaults(run=_train_skipgram)


def _train_skipgram(a: argparse.Namespace) -> None:
    result = train_skipgram(
        a.corpus,
        a.output,
        **{name: getattr(a, name) for name in SKIPGRAM_OPTIONS},
        **({"suffixes": a.suffix} if a.suffix else {}),
        exclude=a.exclude,
        encoding_errors=a.encoding_errors,
        checkpoint_every=a.checkpoint_every,
        resume=a.resume,
        num_threads=a.threads,
        progress=a.progress,
    )
    _show(asdict(result) | {"path": str(result.path)})


def _add_similar(commands: Any) -> None:
    p = commands.add_parser("similar", help="print the nearest words of a trained model")
    p.add_argument("model", help="folder that `pyembed train` made")
    p.add_argument("words", nargs="+", metavar="WORD", help="word to look up")
    p.add_argument(
        "-n", "--topn", type=int, default=10, metavar="N", help="words to print (default: 10)"
    )
    _add_json(p)
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


def _add_doctor(commands: Any) -> None:
    p = commands.add_parser("doctor", help="print the facts about this build and this machine")
    _add_json(p)
    p.set_defaults(run=lambda a: _show(show_config(), a.json))
