"""Initialisers: recipes for the rows of a new table.

Random values are counter-based: element (r, c) of a table with `dim` columns is value r * dim + c
of the seed's stream, for any number of threads, any SIMD level, and any pieces in which the table
is made. Therefore a table that grew by `append` equals one that was made at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyembed import _core, _threads
from pyembed._checks import F32
from pyembed.errors import ArgumentError

F64 = NDArray[np.float64]


class Initializer:
    """A recipe for the rows of a table; made by the functions of this module.

    Attributes
    ----------
    whole : bool
        Whether it makes all rows at once, in memory, and so cannot append rows.
    """

    whole = False

    def for_shape(self, rows: int, dim: int) -> Initializer:
        """The recipe for a weight of this shape; most recipes do not depend on the shape.

        Parameters
        ----------
        rows, dim : int
            The shape of the whole weight.

        Returns
        -------
        Initializer
            A recipe whose `fill` makes the rows of such a weight.
        """
        del rows, dim
        return self

    def fill(
        self, array: F32, seed: int = 0, first_row: int = 0, num_threads: int | None = None
    ) -> None:
        """Write rows first_row, first_row + 1, … of the recipe into `array`.

        Parameters
        ----------
        array : ndarray of float32, shape (rows, dim)
            Its rows may be strided; the floats in a row are contiguous.
        seed : int
            Selects the stream of random values, 0 .. 2^64 - 1.
        first_row : int
            The row number of ``array[0]`` in the table.
        num_threads : int, optional
            See `Table.create`.

        Raises
        ------
        ArgumentError
            If `seed` is out of range, or the recipe makes whole tables and `first_row` is not 0.
        """
        if not 0 <= seed < 2**64:
            raise ArgumentError(f"seed = {seed}; allowed: 0..2^64-1")
        self._fill(array, seed, first_row, num_threads)

    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class _Constant(Initializer):
    value: float

    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        array[...] = self.value


@dataclass(frozen=True)
class _Random(Initializer):
    """A stream of the kernels: "normal" with mean a and deviation b, or "uniform" in [a, b)."""

    kind: str
    a: float
    b: float

    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        num_threads = _threads.for_work(array.size, _threads.resolve(num_threads))
        b = self.b
        if self.kind == "uniform":  # the kernel wants the width
            b = float(np.float32(self.b) - np.float32(self.a))
        _core.fill(_core.Column(array), self.kind, seed, first_row, self.a, b, num_threads)


@dataclass(frozen=True)
class _TruncatedNormal(Initializer):
    mean: float
    std: float
    a: float
    b: float

    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        low, high = (_normal_cdf((x - self.mean) / self.std) for x in (self.a, self.b))
        step = max(1, _TRANSFORM_FLOATS // max(array.shape[1], 1))
        for row in range(0, array.shape[0], step):
            part = array[row : row + step]
            uniform().fill(part, seed, first_row + row, num_threads)
            u = low + (part.astype(np.float64) + 2.0**-25) * (high - low)
            part[...] = np.clip(self.mean + self.std * _normal_quantile(u), self.a, self.b)


@dataclass(frozen=True)
class _Fans(Initializer):
    """A recipe of xavier or kaiming, scaled by the shape (fan_in: dim, fan_out: rows)."""

    rule: Callable[[int, int], Initializer]

    def for_shape(self, rows: int, dim: int) -> Initializer:
        return self.rule(dim, max(rows, 1))

    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        if first_row:
            raise ArgumentError("this recipe depends on the table's shape: use for_shape first")
        self.for_shape(*array.shape).fill(array, seed, 0, num_threads)


@dataclass(frozen=True)
class _Eye(Initializer):
    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        array[...] = 0
        rows = np.arange(first_row, min(first_row + array.shape[0], array.shape[1]))
        array[rows - first_row, rows] = 1


@dataclass(frozen=True)
class _Whole(Initializer):
    """A recipe that makes a whole matrix."""

    make: Callable[[F32, int], None]
    whole = True

    def _fill(self, array: F32, seed: int, first_row: int, num_threads: int | None) -> None:
        if first_row:
            raise ArgumentError("this recipe makes a whole table; rows cannot be appended with it")
        self.make(array, seed)


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ArgumentError(f"{name} = {value}; allowed: a finite number")


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """Normal distribution, by Box-Muller; the tail reaches 6.6 standard deviations.

    Parameters
    ----------
    mean, std : float
        The mean and the standard deviation.

    Returns
    -------
    Initializer
        The recipe.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.empty((2, 3), np.float32)
    >>> normal(std=0.01).fill(rows, seed=7)
    >>> bool((abs(rows) < 0.07).all())
    True
    """
    _finite(mean=mean, std=std)
    if std < 0:
        raise ArgumentError(f"std = {std}; allowed: 0 or more")
    return _Random("normal", mean, std)


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Uniform distribution over [low, high); rounding to float32 may give `high` itself.

    Parameters
    ----------
    low, high : float
        The limits.

    Returns
    -------
    Initializer
        The recipe.
    """
    _finite(low=low, high=high)
    if high < low:
        raise ArgumentError(f"uniform({low}, {high}); allowed: low <= high")
    return _Random("uniform", low, high)


def constant(value: float) -> Initializer:
    """Rows in which every element is `value`.

    Parameters
    ----------
    value : float
        A finite number.

    Returns
    -------
    Initializer
        The recipe.
    """
    _finite(value=value)
    return _Constant(value)


def zeros() -> Initializer:
    """Rows of zeros.

    Returns
    -------
    Initializer
        The recipe.
    """
    return _Constant(0.0)


def ones() -> Initializer:
    """Rows of ones.

    Returns
    -------
    Initializer
        The recipe.
    """
    return _Constant(1.0)


def eye() -> Initializer:
    """Ones on the diagonal, zeros elsewhere.

    Returns
    -------
    Initializer
        The recipe.
    """
    return _Eye()


def trunc_normal(
    mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Initializer:
    """Normal distribution cut to [a, b], by the inverse of its distribution function.

    Parameters
    ----------
    mean, std : float
        The mean and the standard deviation before the cut.
    a, b : float
        The limits: values, not multiples of `std`, as in torch.

    Returns
    -------
    Initializer
        The recipe.
    """
    _finite(mean=mean, std=std, a=a, b=b)
    if std <= 0 or a >= b:
        raise ArgumentError(f"std = {std}, a = {a}, b = {b}; allowed: std > 0 and a < b")
    return _TruncatedNormal(mean, std, a, b)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The recommended factor for a nonlinearity, from torch's table.

    Parameters
    ----------
    nonlinearity : {"linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"}
        The function that follows the layer.
    param : float, optional
        The slope of leaky_relu; 0.01 by default.

    Returns
    -------
    float
        The factor.

    Examples
    --------
    >>> calculate_gain("relu")
    1.4142135623730951
    """
    slope = 0.01 if param is None else param
    gains = {
        "linear": 1.0,
        "sigmoid": 1.0,
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + slope**2)),
        "selu": 0.75,
    }
    if nonlinearity not in gains:
        raise ArgumentError(f"nonlinearity = {nonlinearity!r}; allowed: {', '.join(gains)}")
    return gains[nonlinearity]


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Uniform within ± gain * sqrt(6 / (rows + dim)).

    Parameters
    ----------
    gain : float
        A factor, see `calculate_gain`.

    Returns
    -------
    Initializer
        The recipe.

    References
    ----------
    Glorot, Bengio: "Understanding the difficulty of training deep feedforward neural networks",
    AISTATS 2010.
    """
    _finite(gain=gain)

    def rule(fan_in: int, fan_out: int) -> Initializer:
        bound = gain * math.sqrt(6 / (fan_in + fan_out))
        return uniform(-bound, bound)

    return _Fans(rule)


def xavier_normal(gain: float = 1.0) -> Initializer:
    """Normal with standard deviation gain * sqrt(2 / (rows + dim)); see `xavier_uniform`.

    Parameters
    ----------
    gain : float
        A factor, see `calculate_gain`.

    Returns
    -------
    Initializer
        The recipe.
    """
    _finite(gain=gain)
    return _Fans(lambda fan_in, fan_out: normal(0, gain * math.sqrt(2 / (fan_in + fan_out))))


def kaiming_uniform(
    a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initializer:
    """Uniform within ± sqrt(3) * gain / sqrt(fan).

    Parameters
    ----------
    a : float
        The slope of leaky_relu, for the gain.
    mode : {"fan_in", "fan_out"}
        Whether fan is dim, or rows.
    nonlinearity : str
        The function that follows the layer, see `calculate_gain`.

    Returns
    -------
    Initializer
        The recipe.

    References
    ----------
    He et al.: "Delving Deep into Rectifiers", ICCV 2015.
    """
    gain, take = calculate_gain(nonlinearity, a), _fan(mode)

    def rule(fan_in: int, fan_out: int) -> Initializer:
        bound = math.sqrt(3) * gain / math.sqrt(take(fan_in, fan_out))
        return uniform(-bound, bound)

    return _Fans(rule)


def kaiming_normal(
    a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initializer:
    """Normal with standard deviation gain / sqrt(fan); see `kaiming_uniform`.

    Parameters
    ----------
    a : float
        The slope of leaky_relu, for the gain.
    mode : {"fan_in", "fan_out"}
        Whether fan is dim, or rows.
    nonlinearity : str
        The function that follows the layer, see `calculate_gain`.

    Returns
    -------
    Initializer
        The recipe.
    """
    gain, take = calculate_gain(nonlinearity, a), _fan(mode)
    return _Fans(lambda fan_in, fan_out: normal(0, gain / math.sqrt(take(fan_in, fan_out))))


def _fan(mode: str) -> Callable[[int, int], int]:
    if mode not in ("fan_in", "fan_out"):
        raise ArgumentError(f"mode = {mode!r}; allowed: 'fan_in', 'fan_out'")
    return lambda fan_in, fan_out: fan_in if mode == "fan_in" else fan_out


def orthogonal(gain: float = 1.0) -> Initializer:
    """A (semi-)orthogonal matrix times gain, by QR, in memory; its bits depend on numpy's LAPACK.

    Parameters
    ----------
    gain : float
        A factor, see `calculate_gain`.

    Returns
    -------
    Initializer
        The recipe.

    References
    ----------
    Saxe, McClelland, Ganguli: "Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks", ICLR 2014.
    """
    _finite(gain=gain)

    def make(array: F32, seed: int) -> None:
        tall = np.empty((max(array.shape), min(array.shape)), np.float32)
        normal().fill(tall, seed)
        q, r = np.linalg.qr(tall)
        q *= np.sign(np.diag(r))  # makes the distribution uniform
        array[...] = gain * (q if array.shape[0] >= array.shape[1] else q.T)

    return _Whole(make)


def sparse(sparsity: float, std: float = 0.01) -> Initializer:
    """Normal with zeros: in each column ceil(sparsity * rows) elements; made in memory.

    Parameters
    ----------
    sparsity : float
        The share of zeros in a column, 0 .. 1.
    std : float
        The standard deviation of the other elements.

    Returns
    -------
    Initializer
        The recipe.

    References
    ----------
    Martens: "Deep learning via Hessian-free optimization", ICML 2010.
    """
    _finite(sparsity=sparsity, std=std)
    if not 0 <= sparsity <= 1:
        raise ArgumentError(f"sparsity = {sparsity}; allowed: 0..1")

    def make(array: F32, seed: int) -> None:
        normal(0, std).fill(array, seed)
        zeros = math.ceil(sparsity * array.shape[0])
        for column in range(array.shape[1]):
            chosen = np.random.default_rng([seed, column]).permutation(array.shape[0])[:zeros]
            array[chosen, column] = 0

    return _Whole(make)


# Floats that trunc_normal transforms at a time, in float64: a few megabytes.
_TRANSFORM_FLOATS = 1 << 18


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _ratio(x: F64, above: tuple[float, ...], below: tuple[float, ...]) -> F64:
    quotient: F64 = np.polyval(above, x) / np.polyval((*below, 1.0), x)
    return quotient


def _normal_quantile(p: F64) -> F64:
    """The inverse of the normal distribution function to 7 digits.

    Formula and coefficients: Wichura, "Algorithm AS 241", Applied Statistics 37 (1988), PPND7.
    """
    q = p - 0.5
    middle = q * _ratio(
        0.180625 - q * q,
        (59.109374720, 159.29113202, 50.434271938, 3.3871327179),
        (67.187563600, 78.757757664, 17.895169469),
    )
    r = np.sqrt(-np.log(np.minimum(p, 1 - p).clip(np.finfo(np.float64).tiny)))
    near = _ratio(
        r - 1.6,
        (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777),
        (0.12021132975, 0.73700164250),
    )
    far = _ratio(
        r - 5,
        (0.017337203997, 0.42868294337, 3.0812263860, 6.6579051150),
        (0.012258202635, 0.24197894225),
    )
    tail = np.copysign(np.where(r <= 5, near, far), q)
    return np.where(np.abs(q) <= 0.425, middle, tail)


def parse(text: str) -> Initializer:
    """Parse an initialiser of the command line.

    Parameters
    ----------
    text : str
        The name of a function of this module and its arguments, such as ``"normal:0,0.01"``,
        ``"uniform:-1,1"``, ``"constant:3"`` or ``"zeros"``.

    Returns
    -------
    Initializer
        The recipe.

    Raises
    ------
    ArgumentError
        If the text is anything else.

    Examples
    --------
    >>> parse("normal:0,0.01")
    _Random(kind='normal', a=0.0, b=0.01)
    """
    makers: dict[str, Callable[..., Initializer]] = {
        "normal": normal,
        "uniform": uniform,
        "constant": constant,
        "zeros": zeros,
        "xavier_uniform": xavier_uniform,
        "xavier_normal": xavier_normal,
        "trunc_normal": trunc_normal,
    }
    name, _, rest = text.partition(":")
    try:
        return makers[name](*map(float, rest.split(",") if rest else ()))
    except (KeyError, TypeError, ArgumentError) as error:
        remedy = "normal[:MEAN,STD], uniform[:LOW,HIGH], constant:VALUE, zeros, …"
        raise ArgumentError(f"initialiser {text!r}: {error}; allowed: {remedy}") from None
    except ValueError:
        raise ArgumentError(f"initialiser {text!r}: {rest!r} is not a list of numbers") from None
