"""Word vectors of identifiers, from the source of Python's own standard library.

The demo trains a skip-gram model with character n-grams, which have 2 million rows in addition to
those of the words, so the table is large. It prints the nearest neighbours of some identifiers and
draws a map of the most frequent ones. All files go into the folder ``demo``.

Run it with ``make demo``.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from pyembed.train import Model, plot_words, train_skipgram

HERE = Path("demo")
MODEL, PICTURE = HERE / "model", HERE / "words.png"
WORDS = ["TypeError", "socket", "sha256", "Lock", "__add__", "SIGINT", "January", "lstrip", "True"]
# Packages of others, tables of characters, and files that are badly encoded by intent.
EXCLUDE = ["site-packages", "dist-packages", "encodings", "lib2to3", "bad*.py", "encoded_modules"]


def main() -> None:
    """Train a model, print neighbours, and draw a map."""
    if MODEL.exists():
        shutil.rmtree(MODEL)
    HERE.mkdir(exist_ok=True)
    source = sysconfig.get_paths()["stdlib"]
    print(f"training on {source}")
    result = train_skipgram(
        [source], MODEL, suffixes=[".py"], exclude=EXCLUDE, encoding_errors="replace"
    )
    print(
        f"{result.vocabulary:,} words, {result.words:,} word positions at "
        f"{result.words_per_second:,.0f} a second, loss {result.loss:.3f}\n"
    )
    with Model(MODEL) as model:
        for word, neighbours in zip(WORDS, model.similar(WORDS, 8), strict=True):
            print(f"{word:>12}  {'  '.join(name for name, _ in neighbours)}")
        frequent = [word for word in list(model.vocab)[:400] if len(word) > 3][:150]
    plot_words(MODEL, frequent, PICTURE)
    print(f"\na map of the {len(frequent)} most frequent identifiers: {PICTURE}")
    print(f"more:  .venv/bin/pyembed similar {MODEL} WORD")


if __name__ == "__main__":
    main()
