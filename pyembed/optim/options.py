"""The step options that all optimizers share: weight decay, clipping, max_norm, frequency scaling.

They are checked once, when an optimizer is made, and then become fields of its `_core.Rule`. The
hyper-parameters of each rule (momentum, betas) are in `rules`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

from pyembed._checks import in_range
from pyembed.errors import ArgumentError


class Options(TypedDict, total=False):
    """The options of a step, which every optimizer accepts in addition to its rule.

    Attributes
    ----------
    nonfinite : {"raise", "skip_row", "allow"}
        How NaN and infinity in a gradient are treated, and sums or squares that overflow float32:
        the batch is refused; a row whose summed gradient has one is left alone, and counted in
        `skipped`; or they are let through.
    weight_decay : float
    decay_mode : {"l2", "decoupled", "lazy"}
        "l2": ``g += weight_decay * w``. "decoupled": ``w *= 1 - lr * weight_decay``. Both for the
        rows of the batch alone. "lazy": as decoupled, and a row also gets the decay of all steps
        since its last one, at the current learning rate; needs the column ``last_step``.
    clip_value : float, optional
        Elements of a row's summed gradient are clamped to -clip_value .. clip_value.
    clip_norm : float, optional
        The summed gradients of all rows of the batch are scaled so that their 2-norm, taken as one
        vector, is at most this (torch's clip_grad_norm_). The sums are made first: another pass.
    max_norm, norm_type : float, optional
        A row of the batch with a larger norm is scaled down to it after the step, see
        `Table.renorm`.
    frequency_power : float
        p > 0: the learning rate of a row is ``lr / count ** p``, where count is the number of steps
        that updated the row, this one included; decoupled and lazy decay stay at lr. Needs the
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
    """Checked options, with a default number for each that was not given."""

    nonfinite: str
    weight_decay: float
    decay_mode: str | None
    clip_norm: float | None
    clip_value: float
    max_norm: float
    norm_type: float
    frequency_power: float


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
    """Check the options of a rule that has these decay modes, the first of which is its default.

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
    if not norm_type >= 0:
        raise ArgumentError(f"norm_type = {norm_type}; allowed: 0 or more, inf included")
    return Settings(
        nonfinite,
        decay,
        mode,
        None if clip_norm is None else in_range("clip_norm", clip_norm, 0.0),
        math.inf if clip_value is None else in_range("clip_value", clip_value, 0.0),
        math.inf if max_norm is None else in_range("max_norm", max_norm, 0.0),
        float(norm_type),
        in_range("frequency_power", frequency_power, 0.0),
    )
