"""The command ``pyembed``: it turns arguments into calls of the package, and results into text.

Results go to stdout, errors and progress to stderr.

Exit status: 0 done, 1 failed or interrupted, 2 wrong arguments. No command prints a traceback.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
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
    status = 0
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=_ESCAPE)
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except KeyboardInterrupt as interrupt:
        status = _fail(str(interrupt) or "interrupted")
    except BrokenPipeError:
        status = 1  # the reader of stdout wants no more, and needs no message
    except ArgumentError as error:
        status = _fail(str(error), 2)
    except MemoryError as error:
        status = _fail(f"out of memory ({error}); free some, or raise the limit of this process")
    except (PyembedError, OSError, ImportError) as error:
        status = _fail(str(error))
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        status = _fail(
            f"{type(error).__name__}: {error}; this is a fault of pyembed: please report it, with "
            "the traceback of `python -X dev -m pyembed ...` and the output of `pyembed doctor`"
        )
    finally:
        status = _flush() or status
    return status


def _fail(message: str, status: int = 1) -> int:
    print(f"pyembed: {message}", file=sys.stderr)
    return status


def _flush() -> int:
    """Write what is left for stdout; if that fails, keep the interpreter from trying it again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _fail(f"stdout: {error}")
    return 0


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Give a token's bytes back as they were read; escape a character that stdout cannot show."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1  # its neighbours may be of the other kind
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


_ESCAPE = "pyembed.escape"
codecs.register_error(_ESCAPE, _escape)


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
    _command(commands, "doctor", "print the facts about this build and machine", _doctor, JSON)
    return parser


def _shared(*flags: str, **settings: Any) -> argparse.ArgumentParser:
    """An option that several commands have."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(*flags, **settings)
    return parent


OUTPUT = _shared("-o", "--output", required=True, help="folder to make; it must not exist")
OPTIMIZER = _shared(
    "--optimizer", metavar="NAME", help="reserve columns for the state of adam, adagrad, ..."
)
THREADS = _shared("--threads", type=int, metavar="N", help="number of threads")
JSON = _shared("--json", action="store_true", help="print the result as JSON")
QUIET = _shared(
    *("-q", "--quiet"), dest="progress", action="store_const", const=False, help="draw no bars"
)
TABLE = "folder of a table, or a .npy of float32 rows"


def _command(
    commands: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], None],
    *parents: argparse.ArgumentParser,
) -> Callable[..., Any]:
    """Add a command; returns the function that adds an option to it."""
    p = commands.add_parser(name, help=help, description=help, parents=parents)
    p.set_defaults(run=run, fail=p.error)
    add: Callable[..., Any] = p.add_argument
    return add


def _show(facts: dict[str, Any], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        text = f"{value:,}" if type(value) is int else value
        print(f"{name + ':':<18} {text}")


def _add_build(commands: Any) -> None:
    text = "make a table, fresh or from a file of vectors"
    add = _command(commands, "build", text, _build, OUTPUT, OPTIMIZER, THREADS, QUIET)
    add("vectors", nargs="?", help="word2vec (text, binary) or GloVe file, or its .gz")
    formats = "format of the vectors: auto (default), word2vec, word2vec-binary, glove"
    add("--format", default="auto", help=formats)
    add("--rows", type=int, metavar="N", help="number of rows of a fresh table")
    add("--dim", type=int, metavar="N", help="floats per row of a fresh table")
    text = "normal[:MEAN,STD] (default), uniform[:LOW,HIGH], constant:VALUE or zeros"
    add("--init", default="normal", help=f"values of a fresh table: {text}")
    add("--seed", type=int, default=0, metavar="N", help="seed of the values (default: 0)")
    text = "keep the rows of frequent ids together, and an id map; needs --counts or --ids"
    add("--order", choices=["frequency"], help=text)
    text = "how often each id occurs: .npy, or text with one count a line"
    add("--counts", metavar="FILE", help=text)
    add("--ids", metavar="FILE", help="ids to count instead: .npy")


def _build(a: argparse.Namespace) -> None:
    if a.counts is not None and a.ids is not None:
        a.fail("--counts and --ids exclude each other")
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
    text = "copy a table with columns added or dropped"
    add = _command(commands, "convert", text, _convert, OUTPUT, OPTIMIZER, QUIET)
    add("table", help=TABLE)
    repeated = {"action": "append", "default": []}
    add("--add", **repeated, metavar="NAME:WIDTH", help="column of zeros to add; repeatable")
    add("--drop", **repeated, metavar="NAME", help="column to drop; repeatable")


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
    text = "copy a table, or only the rows that changed since a generation"
    add = _command(commands, "export", text, _export, OUTPUT, QUIET)
    add("table", help="folder of a table")
    text = "copy only rows that changed since; the output is for `pyembed apply`"
    add("--since", type=int, metavar="GENERATION", help=text)


def _export(a: argparse.Namespace) -> None:
    export.export(a.table, a.output, since=a.since, progress=a.progress)
    if a.since is None:
        _show(table_facts(a.output))
    else:
        delta = export.read_delta(a.output)
        facts = {"since": delta.since, "generation": delta.table.generation, "rows": delta.count}
        _show({"path": a.output, **facts})


def _add_apply(commands: Any) -> None:
    text = "update a copy with the output of `export --since`"
    add = _command(commands, "apply", text, _apply, QUIET)
    add("delta", help="folder that `pyembed export --since` made")
    add("table", help="copy, at the generation that the delta starts from")


def _apply(a: argparse.Namespace) -> None:
    changed = export.apply(a.delta, a.table, progress=a.progress)
    generation = export.read_delta(a.delta).table.generation
    _show({"path": a.table, "generation": generation, "changed": changed})
    if not changed:
        print(f"{a.table} was at generation {generation} already; nothing was done")


def _add_info(commands: Any) -> None:
    add = _command(commands, "info", "print the facts about a table", _info, JSON)
    add("table", help=TABLE)
    text = "also print how much of the table is in memory"
    add("--resident", action="store_true", help=text)


def _info(a: argparse.Namespace) -> None:
    _show(table_facts(a.table, a.resident), a.json)


def _add_verify(commands: Any) -> None:
    text = "check a table for damage; changes nothing"
    add = _command(commands, "verify", text, _verify, JSON, QUIET)
    add("table", help=TABLE)
    text = "also look for NaN and infinity in every row"
    add("--finite", action="store_true", help=text)


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
    text = "roll a table back to its last commit"
    add = _command(commands, "recover", text, _recover, JSON)
    add("table", help="folder of a table")
    add("--salvage", action="store_true", help="keep the rows as they are, and commit them")


def _recover(a: argparse.Namespace) -> None:
    with Table.open(a.table, salvage=a.salvage) as table:
        facts = {"rows": table.rows, "generation": table.generation, "meta": table.meta}
    _show(facts, a.json)


# The help of the options of `train skipgram`: one for each field of `SkipgramSettings`.
SKIPGRAM_OPTIONS = {
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
    text = "train a model whose table may be larger than memory"
    p = commands.add_parser("train", help=text, description=text)
    models = p.add_subparsers(dest="model", required=True, metavar="MODEL")
    text = "word vectors from text: skip-gram with negative sampling"
    add = _command(models, "skipgram", text, _train_skipgram, OUTPUT, THREADS, QUIET)
    add("corpus", nargs="+", help="text file, or folder to search for text files")
    for field in fields(SkipgramSettings):
        option, default = "--" + field.name.replace("_", "-"), field.default
        meaning = f"{SKIPGRAM_OPTIONS[field.name]} (default: {default})"
        add(option, type=type(default), metavar="N", default=default, help=meaning)
    text = "suffix of the files to read in a folder; repeatable"
    add("--suffix", action="append", help=text)
    text = "pattern of names in a folder not to read; repeatable"
    add("--exclude", action="append", default=[], metavar="PATTERN", help=text)
    text = "stop at bytes that are not UTF-8 (default), or read them as U+FFFD"
    add("--encoding-errors", choices=["strict", "replace"], default="strict", help=text)
    text = "keep a checkpoint every N batches of 4096 words, in OUTPUT.partial"
    add("--checkpoint-every", type=int, metavar="N", help=text)
    text = "continue from the last checkpoint; repeat the other options"
    add("--resume", action="store_true", help=text)


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
    add = _command(commands, "similar", "print the nearest words of words", _similar, JSON)
    add("model", help="folder that `pyembed train` made")
    add("words", nargs="+", metavar="WORD", help="word to look up")
    add("-n", "--topn", type=int, default=10, metavar="N", help="words to print (default: 10)")


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


def _doctor(a: argparse.Namespace) -> None:
    _show(show_config(), a.json)
