"""Skip-gram: pairs, gradients, what a model learns, what a run leaves behind, and asking it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyembed import Table, init
from pyembed.errors import ArgumentError, CorpusError, FormatError
from pyembed.train import runs, skipgram
from pyembed.train.corpus import choose_vocabulary, encode_corpus, rewrite_as_rows
from pyembed.train.neighbours import Model, similar
from pyembed.train.plot import plot_words
from pyembed.train.runs import RUN, keep_probability, read_runs
from pyembed.train.skipgram import train_skipgram
from pyembed.words.vocab import Vocab

TOPICS = (
    ["apple", "pear", "plum", "grape", "melon", "cherry", "peach", "lemon"],
    ["steel", "copper", "iron", "zinc", "silver", "nickel", "cobalt", "chrome"],
)


def topics_text(folder: Path, lines: int = 400, seed: int = 0) -> Path:
    """Write lines of words that come from one topic each."""
    rng = np.random.default_rng(seed)
    text = "".join(" ".join(rng.choice(TOPICS[i % 2], size=8)) + "\n" for i in range(lines))
    path = folder / "topics.txt"
    path.write_text(text)
    return path


def train(tmp_path: Path, name: str = "model", **options: Any) -> Path:
    """Train a small model on two topics."""
    settings: dict[str, Any] = {
        "dim": 16, "epochs": 8, "lr": 0.1, "sample": 0, "buckets": 1000, "progress": False
    }  # fmt: skip
    output = tmp_path / name
    train_skipgram([topics_text(tmp_path)], output, **(settings | options))
    return output


# ---- batches and gradients


def test_runs_hold_each_pair_of_a_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With full reach, the mask's pairs are exactly those within a line and the window."""
    monkeypatch.setattr(runs, "RUNS_AT_ONCE", 2)
    lines = [[f"w{i}_{j}" for j in range(n)] for i, n in enumerate([1, 7, 0, 40, 2])]
    path = tmp_path / "t.txt"
    path.write_text("\n".join(" ".join(line) for line in lines))
    corpus = encode_corpus([path], tmp_path / "ids")
    chosen, row_of = choose_vocabulary(corpus, 1)
    names = [corpus.types[i] for i in chosen]
    assert rewrite_as_rows(corpus, row_of) == corpus.words + len(lines)
    keep = np.ones(len(chosen), np.float32)
    seen: set[tuple[str, str]] = set()
    read = 0
    for batch in read_runs(corpus.path, keep, 3, 1, 40):  # each word draws its reach anew
        run, i, j = np.nonzero(batch.mask)
        centres = [names[row] for row in batch.words[run, i]]
        contexts = [names[row] for row in batch.contexts[run, j]]
        seen.update(zip(centres, contexts, strict=True))
        read += batch.read
        assert batch.words.shape[1] == RUN
    expected = {
        (line[i], line[j])
        for line in lines
        for i in range(len(line))
        for j in range(len(line))
        if i != j and abs(i - j) <= 3
    }
    assert seen == expected
    assert read == 40 * corpus.words


def test_thinning_is_that_of_word2vec() -> None:
    """A word of frequency f is kept with probability sqrt(s / f) + s / f, at most 1."""
    keep = keep_probability(np.array([9990, 9, 1]), 1e-3)
    ratio = 1e-3 / 0.999
    assert keep.tolist() == [np.float32(ratio**0.5 + ratio), 1, 1]
    assert keep_probability(np.array([5, 3]), 0).tolist() == [1, 1]


def test_score_gradient_is_the_derivative_of_the_loss() -> None:
    """The gradient agrees with differences of the loss, and large scores do not overflow."""
    rng = np.random.default_rng(1)
    contexts, c = 6, 2
    mask = (rng.random((c, RUN, contexts)) < 0.4).astype(np.float32)
    mask[1, 3] = 0  # a word without contexts has no negatives either
    scores = rng.normal(size=(c, RUN, contexts + skipgram.SHARED)).astype(np.float32)
    pairs = float(mask.sum())
    grad, _ = skipgram._score_gradient(scores.copy(), mask, 5)
    for at in [(0, 0, 0), (1, 4, 2), (0, 5, contexts), (1, 15, contexts + 31)]:
        up, down = scores.copy(), scores.copy()
        up[at] += 0.01
        down[at] -= 0.01
        slope = [skipgram._score_gradient(s, mask, 5)[1] * pairs for s in (up, down)]
        # Second-order differences of a float32 score.
        assert grad[at] == pytest.approx((slope[0] - slope[1]) / 0.02, abs=1e-3)
    assert not grad[1, 3].any()
    grad, loss = skipgram._score_gradient(scores * np.float32(1e4), mask, 5)
    assert np.isfinite(grad).all() and np.isfinite(loss)
    grad, loss = skipgram._score_gradient(scores, mask * 0, 5)
    assert not grad.any() and np.isnan(loss)


# ---- training


@pytest.mark.parametrize("buckets", [0, 1000])
def test_neighbours_are_of_the_topic(tmp_path: Path, buckets: int) -> None:
    """Words that share lines become neighbours: all seven others of the topic come first."""
    output = train(tmp_path, buckets=buckets)
    with Model(output) as model:
        for topic in TOPICS:
            for word, found in zip(topic, model.similar(topic, topn=7), strict=True):
                assert {other for other, _ in found} == set(topic) - {word}
                cosines = [cosine for _, cosine in found]
                assert cosines == sorted(cosines, reverse=True)
                assert all(-1.001 < cosine < 1.001 for cosine in cosines)
        assert len(model.similar(["apple"], topn=99)[0]) == 15
    assert similar(output, "zinc", topn=2) == Model(output).similar(["zinc"], 2)[0]


def test_model_folder_and_result(tmp_path: Path) -> None:
    """The folder is a clean table with settings and vocabulary, and nothing else."""
    output = tmp_path / "deep" / "model"
    output.parent.mkdir()
    result = train_skipgram(
        [topics_text(tmp_path)], output, dim=8, epochs=2, buckets=100, progress=False
    )
    assert result.path == output
    assert (result.vocabulary, result.words) == (16, 2 * 3200)
    assert result.words_per_second > 0 and 0 < result.loss < 6 * np.log(2)
    files = {"lock", "manifest.json", "rows.npy", "vocab.counts.npy", "vocab.txt"}
    assert {path.name for path in output.iterdir()} == files
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    with Table.open(output, "r") as table:
        assert (table.rows, table.dim) == (16 + 100 + 16, 8)
        assert table.columns == {"weight": 8, "sum": 8}
        assert table.state == "clean"
        assert table.meta["model"] == "skipgram"
        assert table.meta["epochs"] == 2 and table.meta["words"] == 6400
        assert table.meta["progress"]["words"] == 6400
        assert table.meta["progress"]["loss"] == result.loss
    vocab = Vocab.load(output)
    assert sorted(vocab) == sorted(TOPICS[0] + TOPICS[1])
    assert vocab.counts is not None and int(vocab.counts.sum()) == 3200


def test_rows_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step input vectors are those of the initialiser, output vectors zero."""
    monkeypatch.setattr(skipgram._Model, "step", lambda *arguments: 1.0)
    with Table.open(train(tmp_path, seed=7), "r") as table:
        fresh = Table.memory(16 + 1000, 16, init=init.uniform(-1 / 16, 1 / 16), seed=7)
        assert np.array_equal(table.weight[:1016], fresh.weight)
        assert table.rows == 1032 and not table.weight[1016:].any()


def test_same_seed_same_bits(tmp_path: Path) -> None:
    """A training depends on its text and settings, not on the number of threads."""
    same = [train(tmp_path, f"same{n}", num_threads=n) for n in (1, 2)]
    other = train(tmp_path, "other", seed=2)
    first, second, third = ((path / "rows.npy").read_bytes() for path in (*same, other))
    assert first == second
    assert first != third


# ---- what is refused, and what is left


@pytest.mark.parametrize(
    "setting",
    [
        {"dim": 0}, {"window": 0}, {"negative": 0}, {"epochs": 0}, {"min_count": 0},
        {"lr": 0.0}, {"lr": float("nan")}, {"sample": -1e-3}, {"sample": 1.5}, {"seed": -1},
        {"minn": 0}, {"minn": 5, "maxn": 4}, {"buckets": -1}, {"encoding_errors": "ignore"},
    ],
)  # fmt: skip
def test_bad_settings(tmp_path: Path, setting: dict[str, Any]) -> None:
    """A setting that is not allowed is refused by name, and nothing is made."""
    text = topics_text(tmp_path)
    with pytest.raises(ArgumentError, match=f"{next(iter(setting))} = .*allowed"):
        train_skipgram([text], tmp_path / "model", progress=False, **setting)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_output_that_exists(tmp_path: Path, kind: str) -> None:
    """An output that exists is refused and left as it is."""
    output = tmp_path / "model"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="model exists; give another output"):
        train(tmp_path)
    assert os.path.lexists(output)
    assert not (tmp_path / "model.partial").exists()


def test_leftover_of_a_killed_training(tmp_path: Path) -> None:
    """A partial folder is never removed unasked: the error names it."""
    (tmp_path / "model.partial").mkdir()
    with pytest.raises(ArgumentError, match=r"model\.partial exists"):
        train(tmp_path)
    assert (tmp_path / "model.partial").exists()


@pytest.mark.parametrize("data", [b"", b"1 2 3\n", b"caf\xe9\n"])
def test_bad_corpus_leaves_nothing(tmp_path: Path, data: bytes) -> None:
    """Without a word, or with bytes that are not UTF-8, nothing is made."""
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(CorpusError, match=r"bad\.txt"):
        train_skipgram([tmp_path / "bad.txt"], tmp_path / "model", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_text_without_pairs(tmp_path: Path) -> None:
    """A text whose lines have one word each has no pairs: an error, not a model of noise."""
    (tmp_path / "list.txt").write_text("one\ntwo\n" * 9)
    with pytest.raises(CorpusError, match="no line has two words that occur 5 times"):
        train_skipgram([tmp_path / "list.txt"], tmp_path / "model", buckets=0, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_interrupted_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Ctrl-C, or an error, removes the half-made model and is raised."""
    steps = []
    whole = skipgram._Model.step

    def step(*arguments: Any) -> float:
        steps.append(1)
        if len(steps) == 3:
            raise error("stop")
        return whole(*arguments)

    monkeypatch.setattr(skipgram._Model, "step", step)
    says = "model was not made" if error is KeyboardInterrupt else "stop"
    with pytest.raises(error, match=says):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["topics.txt"]


# ---- asking


def test_unknown_word(tmp_path: Path) -> None:
    """With n-grams a new word is composed; without, or without any n-gram, it is an error."""
    with Model(train(tmp_path, "ngrams")) as model:
        assert {word for word, _ in model.similar(["cobalts"], 5)[0]} < set(TOPICS[1])
        with pytest.raises(ArgumentError, match="the word '' is none of the 16 tokens"):
            model.similar([""])
        with pytest.raises(ArgumentError, match="topn = 0; allowed: 1 or more"):
            model.similar(["zinc"], 0)
    with pytest.raises(ArgumentError, match=r"'cobalts' is none .*close spellings: 'cobalt'"):
        similar(train(tmp_path, "words", buckets=0), "cobalts")


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    """A table without the model's settings, or with another vocabulary, is refused."""
    folder = tmp_path / "model"
    with Table.create(folder, 5, 2) as table:
        Vocab(["a", "b"], [2, 1]).save(folder)
    with pytest.raises(FormatError, match="not the table of a skip-gram model"):
        Model(folder)
    with Table.open(folder) as table:
        table.commit(meta={"model": "skipgram", "minn": 3, "maxn": 6, "buckets": 0})
    with pytest.raises(FormatError, match="2 words and 0 n-gram rows do not make 5 rows"):
        Model(folder)
    Table.open(folder).close()  # its lock is free


# ---- the picture


def test_plot_writes_a_png(tmp_path: Path) -> None:
    """The most frequent words, or given ones, become a picture."""
    pytest.importorskip("adjustText")
    model = train(tmp_path, epochs=1)
    plot_words(model, None, tmp_path / "all.png")
    plot_words(model, ["zinc", "iron", "plum"], tmp_path / "three.png")
    for name in ("all.png", "three.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArgumentError, match="2 words; a plot needs 3 or more"):
        plot_words(model, ["zinc", "iron"], tmp_path / "two.png")


@pytest.mark.parametrize("package", ["adjustText", "matplotlib.figure", "scipy.cluster.vq"])
def test_plot_without_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """Without one of its packages the error names the extra to install."""
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r"pyembed-tables\[plot\]"):
        plot_words(tmp_path, None, tmp_path / "p.png")
