"""The options that all optimizers share: what a step does beside its rule, and what is allowed.

They are checked once, when an optimizer is made; what they ask of every step is then a dict that
`_core.update` takes. What a rule has of its own (momentum, betas) is in `optim`.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from pyembed import _core
from pyembed._checks import in_range
from pyembed.errors import ArgumentError


class Options(TypedDict, total=False):
    """What any optimizer does beside its rule, if asked to.

    Attributes
    ----------
    nonfinite : {"raise", "skip_row", "allow"}
        What to do with NaN and infinity in a gradient: refuse the batch; leave the row alone whose
        summed gradient has one, and count it in `skipped`; or let them through.
    weight_decay : float
    decay_mode : {"l2", "decoupled", "lazy"}
        "l2": ``g += weight_decay * w``. "decoupled": ``w *= 1 - lr * weight_decay``. Both for the
        touched rows alone. "lazy": as decoupled, and a row also gets the decay of all steps since
        its last one, at the learning rate of now; needs the column ``last_step``.
    clip_value : float, optional
        Elements of a row's summed gradient are brought into -clip_value .. clip_value.
    clip_norm : float, optional
        The summed gradients of all rows of the batch are scaled so that their 2-norm, taken as one
        vector, is at most this (torch's clip_grad_norm_). The sums are made first: another pass.
    max_norm, norm_type : float, optional
        A touched row with a larger norm is scaled down to it after the step, see `Table.renorm`.
    frequency_power : float
        p > 0: the learning rate of a row is ``lr / count ** p``, where count is in how many steps
        the row was touched, this one included; decoupled and lazy decay stay at lr. Needs the
        column ``row_steps``, a float32 that counts up to 2**24 and stays there. FTRL takes 0 .. 1.
    """

    nonfinite: str
    weight_decay: float
    decay_mode: str
    clip_value: float | None
    clip_norm: float | None
    max_norm: float | None
    norm_type: float
    frequency_power: float


class Settings(NamedTuple):
    """Options, checked. `extras` is what they ask of every step, or None if that is nothing."""

    nonfinite: str
    weight_decay: float
    decay_mode: str | None
    clip_norm: float | None
    extras: dict[str, float] | None


def checked(
    decay_modes: tuple[str, ...],
    default_decay: float,
    *,
    nonfinite: str = "raise",
    weight_decay: float | None = None,
    decay_mode: str | None = None,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    frequency_power: float = 0.0,
) -> Settings:
    """The options of a rule that has these decay modes, the first of which is its default.

    Raises
    ------
    ArgumentError
    """
    if nonfinite not in ("raise", "skip_row", "allow"):
        allowed = "'raise', 'skip_row', 'allow'"
        raise ArgumentError(f"nonfinite = {nonfinite!r}; allowed: {allowed}")
    decay = in_range("weight_decay", default_decay if weight_decay is None else weight_decay, 0.0)
    mode = decay_modes[0] if decay_mode is None and decay_modes else decay_mode
    if mode not in decay_modes and (mode is not None or decay != 0):
        allowed = ", ".join(map(repr, decay_modes)) or "none: this rule has l1 and l2"
        raise ArgumentError(f"decay_mode = {mode!r}; allowed: {allowed}")
    if clip_value is not None and clip_norm is not None:
        raise ArgumentError("clip_value and clip_norm are both given; allowed: one of them")
    clip_norm = None if clip_norm is None else in_range("clip_norm", clip_norm, 0.0)
    extras = dict(_core.EXTRAS)
    if nonfinite == "skip_row":
        extras["skip_nonfinite"] = True
    if clip_value is not None:
        extras["clip_value"] = in_range("clip_value", clip_value, 0.0)
    if mode == "l2":
        extras["l2"] = decay
    if max_norm is not None:
        extras["max_norm"] = in_range("max_norm", max_norm, 0.0)
    if not norm_type >= 0:
        raise ArgumentError(f"norm_type = {norm_type}; allowed: 0 or more, inf included")
    extras["norm_type"] = float(norm_type)
    extras["frequency_power"] = in_range("frequency_power", frequency_power, 0.0)
    decays = decay != 0 and mode in ("decoupled", "lazy")
    asked = decays or clip_norm is not None or extras | {"norm_type": 2.0} != _core.EXTRAS
    return Settings(nonfinite, decay, mode, clip_norm, extras if asked else None)
