"""Initialisers: how the rows of a new table get their values.

Random values are counter-based: element (r, c) of a table with `dim` columns is value r * dim + c
of the stream that the seed names, whatever the number of threads, the SIMD level, or the pieces
in which the table is made. So a table that grew by `append` equals one that was made at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyembed import _core, threads
from pyembed.arrays import F32
from pyembed.errors import ArgumentError


@dataclass(frozen=True)
class Initializer:
    """A recipe for rows; made by the functions of this module.

    Attributes
    ----------
    kind : {"normal", "uniform", "constant"}
    a, b : float
        normal: mean and standard deviation; uniform: low and high; constant: the value and 0.
    """

    kind: str
    a: float
    b: float = 0.0

    def fill(
        self, array: F32, seed: int = 0, first_row: int = 0, num_threads: int | None = None
    ) -> None:
        """Write rows first_row, first_row + 1, … of the recipe into `array`.

        Parameters
        ----------
        array : float32 array of shape (rows, dim)
            Its rows may be strided; the floats within a row are contiguous.
        seed : int
            Names the stream, 0 .. 2^64 - 1.
        first_row : int
            The row of the table that ``array[0]`` is.
        num_threads : int, optional
        """
        if not 0 <= seed < 2**64:
            raise ArgumentError(f"seed = {seed}; allowed: 0..2^64-1")
        if self.kind == "constant":
            array[...] = self.a
            return
        workers = threads.for_work(array.size, threads.resolve(num_threads))
        b = self.b
        if self.kind == "uniform":  # the kernel wants the width
            b = float(np.float32(self.b) - np.float32(self.a))
        _core.fill(_core.Column(array), self.kind, seed, first_row, self.a, b, workers)

    def __str__(self) -> str:
        return f"{self.kind}({self.a:g}, {self.b:g})" if self.kind != "constant" else f"{self.a:g}"


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ArgumentError(f"{name} = {value}; allowed: a finite number")


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """Normal distribution, by Box-Muller; the tail reaches 6.6 standard deviations.

    >>> import numpy as np
    >>> rows = np.empty((2, 3), np.float32)
    >>> normal(std=0.01).fill(rows, seed=7)
    >>> bool((abs(rows) < 0.07).all())
    True
    """
    _finite(mean=mean, std=std)
    if std < 0:
        raise ArgumentError(f"std = {std}; allowed: 0 or more")
    return Initializer("normal", mean, std)


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Uniform distribution over [low, high); rounding to float32 may give `high` itself."""
    _finite(low=low, high=high)
    if high < low:
        raise ArgumentError(f"uniform({low}, {high}); allowed: low <= high")
    return Initializer("uniform", low, high)


def constant(value: float) -> Initializer:
    """Every element is `value`."""
    _finite(value=value)
    return Initializer("constant", value)


def zeros() -> Initializer:
    """Every element is zero."""
    return Initializer("constant", 0.0)


def parse(text: str) -> Initializer:
    """An initialiser from the command line: ``normal:0,0.01``, ``uniform:-1,1``, ``constant:3``.

    >>> parse("normal:0,0.01")
    Initializer(kind='normal', a=0.0, b=0.01)

    Raises
    ------
    ArgumentError
        If the text is not one of these.
    """
    makers: dict[str, Callable[..., Initializer]] = {
        "normal": normal,
        "uniform": uniform,
        "constant": constant,
        "zeros": zeros,
    }
    name, _, rest = text.partition(":")
    try:
        return makers[name](*map(float, rest.split(",") if rest else ()))
    except (KeyError, TypeError, ArgumentError) as error:
        remedy = "normal[:MEAN,STD], uniform[:LOW,HIGH], constant:VALUE, zeros"
        raise ArgumentError(f"initialiser {text!r}: {error}; allowed: {remedy}") from None
    except ValueError:
        raise ArgumentError(f"initialiser {text!r}: {rest!r} is not a list of numbers") from None
