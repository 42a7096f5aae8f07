"""The examples run, and print what they promise. A metric is checked against its baseline.

Every example is run as a user runs it, but in this process; the library's own source is their data,
so numbers differ a little between versions of Python, and margins here are wide.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The output of ``main()`` of an example, which prints nothing to stderr."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(*[list(options)] * bool(options))
    result = capsys.readouterr()
    assert not result.err
    return result.out


def numbers(text: str, pattern: str) -> list[float]:
    """The groups of the last match."""
    return [float(group) for group in list(re.finditer(pattern, text))[-1].groups()]


def test_words_to_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    """One word is one vector, shapes are kept, unknown words and ids are typed errors."""
    out = printed("words_to_vectors", capsys)
    assert "the same word is the same vector: True" in out
    assert "ids of shape (2, 5) give vectors of shape (2, 5, 4)" in out
    assert "KeyError: tokens[2] = 'beautifull' is none of" in out and "'beautiful'\n" in out
    [wrong, largest] = numbers(out, r"IdError: ids\[1\] = (\d+) is outside 0\.\.(\d+)\n")
    assert wrong == largest + 1
    assert f"IdError: ids[0, 1] = -1 is outside 0..{largest:.0f}\n" in out


def test_pretrained(capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tuning lowers the loss and moves touched rows alone; frozen rows take no optimizer."""
    out = printed("pretrained", capsys)
    [frozen] = numbers(out, r"frozen, train: +loss (\S+),")
    [tuned] = numbers(out, r"fine-tuned, train: +loss (\S+),")
    assert tuned < frozen / 2 < 0.35
    assert "ArgumentError: the layer is frozen" in out
    assert re.search(r"rows moved, those of the training names alone: True\n", out)
    tests = re.findall(r"test: +(.*)", out)
    assert len(tests) == 2 and tests[0] == tests[1]


def test_padding(capsys: pytest.CaptureFixture[str]) -> None:
    """Padding changes no loss and no gradient, in a layer and in bags."""
    out = printed("padding", capsys)
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]  # printed to six digits
    assert len(losses) == 3 and max(losses) - min(losses) <= 1e-6 * losses[0]
    assert out.count(": True") == 4 and "False" not in out
    assert "at the padding row: 0\n" in out


def test_one_hot(capsys: pytest.CaptureFixture[str]) -> None:
    """A lookup is the product with one-hot vectors, for fewer bytes."""
    out = printed("one_hot", capsys)
    assert "forward equal:  True" in out and "backward equal: True" in out
    [times] = numbers(out, r"(\d+) times fewer")
    assert times >= 5


def test_matrix_factorisation(capsys: pytest.CaptureFixture[str]) -> None:
    """Two tables find held-out imports more often than popularity does."""
    out = printed("matrix_factorisation", capsys)
    ours, popular = numbers(out, r"two tables (\S+)%, the most imported (\S+)%")
    assert ours > popular + 5


def test_text_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    """Bags of words tell packages apart far better than the most frequent one, also in testing."""
    out = printed("text_classifier", capsys)
    train, test = numbers(out, r"train (\S+)%  test (\S+)%")
    [baseline] = numbers(out, r"always \w+: test (\S+)%")
    assert train > test > baseline + 25


def test_torch_model(capsys: pytest.CaptureFixture[str]) -> None:
    """A torch model over a file of rows is far better than the frequencies."""
    pytest.importorskip("torch")
    out = printed("torch_model", capsys)
    [baseline] = numbers(out, r"frequencies: +loss (\S+)")
    [loss] = numbers(out, r"before: +loss (\S+)")
    [length] = numbers(out, r"of length (\S+)\n")
    assert loss < baseline - 1.5 and length > 0.6  # rows began with a length of 0.4


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other in a loop, which takes long where others compute too."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def side_by_side(text: str) -> list[float]:
    """The row of the first seed: pyembed's metric, that of torch.nn, what else there is."""
    [row] = re.findall(r"^seed 0 +(.*)", text, re.M)
    return [float(value.rstrip("%")) for value in row.split()]


@pytest.mark.usefixtures("one_thread")
def test_lstm_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    """The losses of both layers begin equal; they are as often right, and more than by chance."""
    out = printed("lstm_classifier", capsys, "--quick")
    [baseline] = numbers(out, r"largest package: (\S+)%")
    ours, theirs, first, _ = side_by_side(out)
    assert first <= 1e-5
    assert abs(ours - theirs) <= 3  # of 200 functions; rounding has grown
    assert min(ours, theirs) > baseline + 10


@pytest.mark.usefixtures("one_thread")
def test_transformer_lm(capsys: pytest.CaptureFixture[str]) -> None:
    """A table in a file and one in memory learn the same; far more than the frequencies."""
    out = printed("transformer_lm", capsys, "--quick")
    [baseline] = numbers(out, r"frequencies: (\S+) bits")
    ours, theirs, first, _ = side_by_side(out)
    assert first <= 1e-3 and abs(ours - theirs) <= 0.02  # rounding grows from the first step
    assert max(ours, theirs) < baseline - 1


@pytest.mark.usefixtures("one_thread")
def test_transe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every loss is the same but for rounding; hits are many times those of chance."""
    out = printed("transe", capsys, "--wordnet", str(tmp_path))
    assert re.fullmatch(r"no WordNet in .*: apt install wordnet-base, or give --wordnet\n", out)
    out = printed("transe", capsys, "--quick")
    if out.startswith("no WordNet"):
        pytest.skip(out)
    [chance] = numbers(out, r"chance: (\S+)%")
    ours, theirs, gap = side_by_side(out)
    assert gap <= 1e-5 and abs(ours - theirs) <= 1
    assert min(ours, theirs) > 20 * chance


@pytest.mark.usefixtures("one_thread")
def test_torch_matrix_factorisation(capsys: pytest.CaptureFixture[str]) -> None:
    """Every loss is the same but for rounding; more held-out calls are found than by popularity."""
    out = printed("torch_matrix_factorisation", capsys, "--quick")
    ours, theirs, popular, gap = side_by_side(out)
    assert gap <= 1e-5 and abs(ours - theirs) <= 1
    assert min(ours, theirs) > popular + 3


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_explained(path: Path) -> None:
    """An example says at its top how to run it, and has a test here unless it is the demo."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""') and "Run it with" in text.split('"""')[1]
    assert path.stem == "demo" or f"test_{path.stem}" in globals()
