"""Progress bars on stderr: one place decides when a bar is drawn and what it looks like."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class _Bar(tqdm):  # type: ignore[type-arg]  # not generic at run time
    """A bar without tqdm's own thread, which would be started for each first bar of a process."""

    monitor_interval = 0


def progress_bar(
    description: str, total: int, unit: str, progress: bool | None, *, initial: int = 0
) -> tqdm[Any]:
    """A bar that the caller updates, and closes as a context manager.

    Parameters
    ----------
    description : str
        The text in front of the bar.
    total : int
        The number of units at the end.
    unit : str
        The name of a unit, such as ``"B"`` or ``"row"``.
    progress : bool or None
        Whether the bar is drawn; None draws it if stderr is a terminal.
    initial : int
        The number of units that were done before.

    Returns
    -------
    tqdm
    """
    return _Bar(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        disable=None if progress is None else not progress,
    )


def slow_loop(items: Iterable[Item], description: str, unit: str) -> Iterable[Item]:
    """Draw a bar for a loop that takes more than a second, if stderr is a terminal.

    Parameters
    ----------
    items : iterable
    description : str
        The text in front of the bar.
    unit : str
        The name of an item.

    Returns
    -------
    iterable
        The items.
    """
    return _Bar(items, desc=description, unit=unit, disable=None, delay=1, leave=False)
