"""Words as sums of parts: n-gram hashes, composed vectors and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyembed import Table, init
from pyembed.errors import ArgumentError
from pyembed.train.subword import Ngrams, Parts, ngram_hashes


def slow_fnv(data: bytes) -> int:
    """FNV-1a, 32 bits, as fastText has it: a byte of 128 or more is negative."""
    value = 2166136261
    for byte in data:
        signed = byte - 256 if byte > 127 else byte
        value = (value ^ signed) % 2**32
        value = value * 16777619 % 2**32
    return value


def slow_ngrams(word: str, minn: int, maxn: int) -> list[str]:
    """The n-grams of fastText, any order."""
    text = f"<{word}>"
    return [
        text[i : i + n]
        for i in range(len(text))
        for n in range(minn, maxn + 1)
        if i + n <= len(text) and not (n == 1 and i in (0, len(text) - 1))
    ]


@pytest.mark.parametrize(
    ("data", "known"), [(b"", 0x811C9DC5), (b"a", 0xE40C292C), (b"foobar", 0xBF9CF968)]
)
def test_slow_hash_is_fnv(data: bytes, known: int) -> None:
    """The hash of this test gives the published values of FNV-1a."""
    assert slow_fnv(data) == known


@given(
    st.lists(st.text(alphabet="ab_é日😀", max_size=8), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_ngram_hashes(words: list[str], minn: int, more: int) -> None:
    """The n-grams of each word are fastText's, hashed as FNV-1a with sign-extended bytes."""
    hashes, starts = ngram_hashes(words, minn, minn + more)
    assert starts[0] == 0 and starts[-1] == len(hashes)
    for i, word in enumerate(words):
        expected = [slow_fnv(n.encode()) for n in slow_ngrams(word, minn, minn + more)]
        assert sorted(hashes[starts[i] : starts[i + 1]].tolist()) == sorted(expected)


def test_vector_is_own_row_and_mean_of_ngrams() -> None:
    """A word is a fixed share of its own row, and of the mean of its n-grams for the rest."""
    words, ngrams = ["read", "a", "reader"], Ngrams(3, 4, 50)
    table = Table.memory(rows=3 + 50, dim=5, init=init.normal(), seed=3)
    parts = Parts.of_vocabulary(words, ngrams)
    order = np.array([2, 0, 1])
    vectors = parts.compose(table, order)
    for vector, row in zip(vectors, order, strict=True):
        grams = [3 + slow_fnv(n.encode()) % 50 for n in slow_ngrams(words[row], 3, 4)]
        mean = table.weight[grams].astype(np.float64).mean(axis=0)
        expected = 0.8 * table.weight[row] + 0.2 * mean
        # The sums of both sides are rounded in another order.
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)
    unknown = Parts.of_unknown("readers", 3, ngrams).compose(table, np.array([0]))
    grams = [3 + slow_fnv(n.encode()) % 50 for n in slow_ngrams("readers", 3, 4)]
    np.testing.assert_allclose(unknown[0], table.weight[grams].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_spread_is_the_transpose_of_combine() -> None:
    """The gradient of the parts is that of a linear map: <combine(x), g> = <x, spread(g)>."""
    parts = Parts.of_vocabulary(["ab", "x", "longer_name", "abc"], Ngrams(2, 3, 40))
    batch = parts.batch(np.array([2, 0, 3]))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(len(batch.rows), 3)).astype(np.float32)
    g = rng.normal(size=(3, 3)).astype(np.float32)
    # float32 sums of some dozen terms.
    assert float((batch.combine(x) * g).sum()) == pytest.approx(
        float((x * batch.spread(g)).sum()), rel=1e-4
    )


@pytest.mark.parametrize("setting", [(0, 3, 10), (4, 3, 10), (3, 6, -1), (3, 6, 2**32)])
def test_bad_ngrams(setting: tuple[int, int, int]) -> None:
    """N-gram lengths and bucket counts that are not allowed are refused."""
    with pytest.raises(ArgumentError, match="allowed"):
        Ngrams(*setting)
