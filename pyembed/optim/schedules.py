"""Schedules: learning rates that depend on the step, for the `lr` of an optimizer.

A schedule is any callable that takes the number of steps so far (0 at the first step) and returns
the learning rate of the next one. It has no state besides the optimizer's step count. The schedules
here are dataclasses: they can be compared, pickled and printed.
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
    """The same learning rate at every step.

    Parameters
    ----------
    lr : float
        The learning rate.

    Examples
    --------
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
    """A linear rise from ``after(0) / steps`` to ``after(0)``, followed by `after`.

    Parameters
    ----------
    steps : int
        The number of steps of the warm-up.
    after : float or schedule
        The learning rate after the warm-up; a schedule counts steps from its end.

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
    """A straight line from `lr` to `end`, followed by `end`.

    Parameters
    ----------
    lr : float
        The learning rate at the beginning.
    steps : int
        The number of steps of the line.
    end : float
        The learning rate at the end.

    Examples
    --------
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
    """Half a cosine from `lr` to `end`, followed by `end`: SGDR without restarts.

    Parameters
    ----------
    lr : float
        The learning rate at the beginning.
    steps : int
        The number of steps of the half cosine.
    end : float
        The learning rate at the end.

    References
    ----------
    Loshchilov, Hutter: "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.

    Examples
    --------
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
    """Stairs: the learning rate is multiplied by `factor` every `every` steps.

    Parameters
    ----------
    lr : float
        The learning rate at the beginning.
    every : int
        The number of steps with the same learning rate.
    factor : float
        The factor between two stairs.

    Examples
    --------
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
    """The learning rate `lr` for `steps` steps, then ``lr * sqrt(steps / step)``.

    Parameters
    ----------
    lr : float
        The learning rate at the beginning.
    steps : int
        The number of steps before the decrease.

    Examples
    --------
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
