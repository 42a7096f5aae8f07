"""The documents: their code runs, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)
CODE = [  # tests/torch runs that of docs/torch-compatibility.md
    page
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    if BLOCK.search(page.read_text()) and page.name != "torch-compatibility.md"
]


@pytest.mark.parametrize("page", CODE, ids=lambda p: p.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of the README and of every page for users runs as it stands, top to bottom."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def headings(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", sorted(set(PAGES)), ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Every relative link leads to a file, and its fragment to a heading of that file."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            name, _, fragment = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), target
            assert not fragment or fragment in headings(linked), target


def test_architecture_cites_what_exists() -> None:
    """Every test, file and folder that ARCHITECTURE.md names exists, and it names every room."""
    cited = set(re.findall(r"`([^`\s]+)`", (ROOT / "ARCHITECTURE.md").read_text()))
    tests = "\n".join(file.read_text() for file in ROOT.glob("tests/**/test_*.py"))
    for name in cited:
        if name.startswith("test_"):
            assert f"def {name}(" in tests, name
    files = {f"/{file.relative_to(ROOT)}" for file in ROOT.glob("pyembed/**/*")}
    for name in cited:
        if re.fullmatch(r"[\w/]+(\.(py|pyx|pxi|h|c)|/)", name):
            inside = any(file.endswith("/" + name.rstrip("/")) for file in files)
            assert inside or (ROOT / name).exists(), name
    rooms = {f"{init.parent.name}/" for init in ROOT.glob("pyembed/*/__init__.py")}
    assert rooms <= cited
