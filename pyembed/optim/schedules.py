"""Learning rates that depend on the step: what an optimizer takes as its `lr` beside a number.

A schedule is any callable of the number of steps taken so far (0 at the first step) that returns
the learning rate of the next one. It keeps no state: the optimizer's step count is all there is to
store. These are the usual ones; they compare equal, pickle, and print as they were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyembed.errors import ArgumentError

Schedule = Callable[[int], float]


def _require(name: str, value: float, low: float, what: str) -> None:
    if not (math.isfinite(value) and value >= low):
        raise ArgumentError(f"{name} = {value}; allowed: {what} of at least {low:g}")


@dataclass(frozen=True)
class constant:
    """Always `lr`.

    >>> constant(0.1)(1000)
    0.1
    """

    lr: float

    def __post_init__(self) -> None:
        _require("lr", self.lr, 0, "a number")

    def __call__(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class warmup:
    """Linear from ``after(0) / steps`` up to `after` in `steps` steps; then `after` itself.

    Parameters
    ----------
    steps : int
    after : float or schedule
        A schedule counts from the end of the warm-up.

    Examples
    --------
    >>> lr = warmup(4, 1.0)
    >>> [lr(step) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    steps: int
    after: float | Schedule

    def __post_init__(self) -> None:
        _require("steps", self.steps, 1, "a number")
        if not callable(self.after):
            _require("after", self.after, 0, "a number")

    def __call__(self, step: int) -> float:
        after = self.after if callable(self.after) else constant(self.after)
        if step < self.steps:
            return after(0) * (step + 1) / self.steps
        return after(step - self.steps)


@dataclass(frozen=True)
class linear:
    """From `lr` to `end` in a straight line of `steps` steps; then `end`.

    >>> [linear(1.0, 4)(step) for step in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """

    lr: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _require("lr", self.lr, 0, "a number")
        _require("steps", self.steps, 1, "a number")
        _require("end", self.end, 0, "a number")

    def __call__(self, step: int) -> float:
        return self.lr + (self.end - self.lr) * min(step, self.steps) / self.steps


@dataclass(frozen=True)
class cosine:
    """Half a cosine from `lr` to `end` in `steps` steps; then `end`. (SGDR, without restarts.)

    >>> [round(cosine(1.0, 4)(step), 3) for step in (0, 1, 2, 4, 9)]
    [1.0, 0.854, 0.5, 0.0, 0.0]
    """

    lr: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _require("lr", self.lr, 0, "a number")
        _require("steps", self.steps, 1, "a number")
        _require("end", self.end, 0, "a number")

    def __call__(self, step: int) -> float:
        done = min(step, self.steps) / self.steps
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class steps:
    """`lr`, times `factor` after every `every` steps.

    >>> [steps(1.0, every=2, factor=0.5)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    lr: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        _require("lr", self.lr, 0, "a number")
        _require("every", self.every, 1, "a number")
        _require("factor", self.factor, 0, "a number")

    def __call__(self, step: int) -> float:
        return float(self.lr * self.factor ** (step // self.every))


@dataclass(frozen=True)
class inverse_sqrt:
    """`lr` for `steps` steps, then ``lr * sqrt(steps / step)``.

    >>> [inverse_sqrt(1.0, 4)(step) for step in (0, 4, 16, 64)]
    [1.0, 1.0, 0.5, 0.25]
    """

    lr: float
    steps: int = 1

    def __post_init__(self) -> None:
        _require("lr", self.lr, 0, "a number")
        _require("steps", self.steps, 1, "a number")

    def __call__(self, step: int) -> float:
        return self.lr * math.sqrt(self.steps / max(step, self.steps))
