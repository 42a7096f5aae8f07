"""Progress bars: when they are drawn."""

from __future__ import annotations

import pytest

from pyembed._progress import progress_bar


@pytest.mark.parametrize(("progress", "drawn"), [(True, True), (False, False), (None, False)])
def test_bars_are_drawn_on_request(
    progress: bool | None, drawn: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar is drawn if asked for; None draws it on a terminal only, which a pipe is not."""
    with progress_bar("build", 3000, "B", progress) as bar:
        bar.update(3000)
    captured = capsys.readouterr()
    assert ("build: 100%" in captured.err) == drawn
    assert captured.out == ""
