"""Sparse optimizers, in order of increasing complexity: their hyper-parameters and formulas.

`optimizer` has what all of them share: the step, gradient accumulation, and the keywords that every
class takes (`Options`): nonfinite, weight_decay, decay_mode, clip_value, clip_norm, max_norm,
norm_type. `lr` is a number or one of `schedules`. See docs/optimizers.md for which one to use.

Formulas: w weight, g summed gradient of a row, t number of the step, from 1. All are exact: one
step for each row of a batch. No other row changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pyembed import _core
from pyembed._checks import in_range
from pyembed.errors import ArgumentError
from pyembed.optim.optimizer import Optimizer, Target
from pyembed.optim.options import Options
from pyembed.optim.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

ABOVE_ZERO = 1e-30  # the least divisor: float32 still holds its product with a bias correction


class SGD(Optimizer):
    """Stochastic gradient descent: w -= lr * g.

    With momentum, by torch's formula: m = momentum * m + (1 - dampening) * g, w -= lr * m; the
    first step is not dampened. Nesterov: w -= lr * (g + momentum * m).

    State: none; with momentum ``momentum_buffer``, as wide as the weight.

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    momentum, dampening : float
        In [0, 1) and [0, 1].
    nesterov : bool
        Needs a momentum and no dampening.
    lazy_momentum : bool
        Whether a row of the batch first takes the momentum of the steps that it missed, as in a
        dense optimizer, in closed form and at the current learning rate. Needs ``last_step``.
    **options
        See `Options`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyembed import Table
    >>> t = Table.memory(rows=2, dim=2)
    >>> SGD(t, lr=0.5).step([1, 1], np.ones((2, 2), np.float32))
    >>> t.gather(1)
    array([-1., -1.], dtype=float32)
    """

    rule = "sgd"

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        *,
        lazy_momentum: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.momentum = in_range("momentum", momentum, 0.0, 1.0)
        self.dampening = in_range("dampening", dampening, 0.0)
        if self.dampening > 1:
            raise ArgumentError(f"dampening = {dampening}; allowed: 0 .. 1")
        if nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ArgumentError("nesterov=True; allowed: with a momentum and without dampening")
        if lazy_momentum and self.momentum == 0:
            raise ArgumentError("lazy_momentum=True; allowed: with a momentum")
        self.nesterov, self.lazy_momentum = nesterov, lazy_momentum
        if self.momentum:
            self.rule = "nesterov" if nesterov else "momentum"
        super().__init__(target, lr, options, lazy_momentum)
        if lazy_momentum and self.decay_mode == "l2" and self.weight_decay:
            raise ArgumentError(
                "lazy_momentum with decay_mode='l2' has no closed form; allowed: 'lazy'"
            )

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        add = 1.0 if step == 1 else 1 - self.dampening
        rule.set_hyper(lr, momentum=self.momentum, one_minus_b1=add)
        if self.lazy_momentum:
            rule.missed_momentum = self.momentum
            rule.missed_lr = lr * (self.momentum if self.nesterov else 1)

    def _parameters(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"momentum": self.momentum} if self.momentum else {}
        shown |= {"dampening": self.dampening} if self.dampening else {}
        shown |= {"nesterov": True} if self.nesterov else {}
        return shown | ({"lazy_momentum": True} if self.lazy_momentum else {})


class Adagrad(Optimizer):
    """Adagrad: s += g^2; w -= lr * g / (sqrt(s) + eps).

    State: ``sum`` (s), as wide as the weight. (Duchi, Hazan, Singer: "Adaptive subgradient
    methods", JMLR 2011; eps and its place as in torch.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyembed import Table
    >>> t = Table.memory(rows=2, dim=2)
    >>> Adagrad(t, lr=0.5).step([1], np.full((1, 2), 3, np.float32))
    >>> t.gather(1)
    array([-0.5, -0.5], dtype=float32)
    """

    rule = "adagrad"

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-2,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, options)
        self.eps = in_range("eps", eps, ABOVE_ZERO)

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        rule.set_hyper(lr, eps=self.eps)

    def _parameters(self) -> dict[str, Any]:
        return {"eps": self.eps}


class RowwiseAdagrad(Adagrad):
    """Adagrad with one number a row: s += mean(g^2); w -= lr / (sqrt(s) + eps) * g.

    State: ``row_sum`` (s), one float a row. (FBGEMM's EXACT_ROWWISE_ADAGRAD, and its eps.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyembed import Table
    >>> t = Table.memory(rows=2, dim=2)
    >>> RowwiseAdagrad(t, lr=0.5).step([1], np.full((1, 2), 3, np.float32))
    >>> t.columns
    {'weight': 2, 'row_sum': 1}
    """

    rule = "rowwise_adagrad"

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-2,
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, eps, **options)


class RMSprop(Optimizer):
    """RMSprop: v += (g^2 - v)(1 - alpha); w -= lr * g / (sqrt(v) + eps).

    State: ``square_avg`` (v), as wide as the weight; rows that are not in a batch do not decay.
    (Tieleman, Hinton: Coursera lecture 6.5, 2012; torch's formula, not centered, no momentum.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    alpha : float
        In [0, 1).
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`.
    """

    rule = "rmsprop"

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, options)
        self.alpha = in_range("alpha", alpha, 0.0, 1.0)
        self.eps = in_range("eps", eps, ABOVE_ZERO)

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        rule.set_hyper(lr, eps=self.eps, one_minus_b2=1 - self.alpha)

    def _parameters(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "eps": self.eps}


class _Moments(Optimizer):
    """The base of the Adam family: two moments and their bias corrections."""

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, options)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ArgumentError(f"betas = {betas}; allowed: two numbers, each 0 <= beta < 1")
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = in_range("eps", eps, ABOVE_ZERO)

    def _corrections(self, step: int) -> tuple[float, float]:
        """1 - beta1^t and sqrt(1 - beta2^t)."""
        b1, b2 = self.betas
        return 1 - b1**step, math.sqrt(1 - b2**step)

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        # sqrt(v / c^2) + eps = (sqrt(v) + c * eps) / c: the corrections go into lr and eps.
        first, second = self._corrections(step)
        self._set_moments(rule, lr * second / first, self.eps * second)

    def _set_moments(self, rule: _core.Rule, lr: float, eps: float, **more: float) -> None:
        b1, b2 = self.betas
        rule.set_hyper(lr, eps=eps, one_minus_b1=1 - b1, one_minus_b2=1 - b2, **more)

    def _parameters(self) -> dict[str, Any]:
        return {"beta1": self.betas[0], "beta2": self.betas[1], "eps": self.eps}


class Adam(_Moments):
    """Adam on the rows of the batch alone, by the formula of torch's SparseAdam.

    m += (g - m)(1 - b1); v += (g^2 - v)(1 - b2);
    w -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps), where t counts all steps.

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (v), each as wide as the weight. Rows that are not in
    a batch do not decay. (Kingma, Ba: "Adam", ICLR 2015, the form before its section 2.1.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    betas : pair of float
        b1 and b2, each in [0, 1).
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`.

    Examples
    --------
    >>> import numpy as np
    >>> from pyembed import Table
    >>> t = Table.memory(rows=2, dim=2)
    >>> Adam(t, lr=0.5).step([1], np.full((1, 2), 3, np.float32))
    >>> t.gather(1).round(4)
    array([-0.5, -0.5], dtype=float32)
    """

    rule = "adam"

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        first, second = self._corrections(step)
        self._set_moments(rule, lr * second / first, self.eps)  # eps is added to the uncorrected v


class AdamW(_Moments):
    """Adam with decoupled weight decay, by the formula of torch's AdamW.

    w *= 1 - lr * weight_decay; m and v as in `Adam`;
    w -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    State as for `Adam`. decay_mode is "decoupled", for the rows of the batch alone, or "lazy".
    (Loshchilov, Hutter: "Decoupled weight decay regularization", ICLR 2019.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    betas : pair of float
        b1 and b2, each in [0, 1).
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`; weight_decay is 1e-2 if not given.
    """

    rule = "adamw"
    decay_modes = ("decoupled", "lazy")
    default_decay = 1e-2


class PartialRowwiseAdam(_Moments):
    """Adam whose second moment is one number a row: half of Adam's state.

    v += (mean(g^2) - v)(1 - b2); m as in `Adam`;
    w -= lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    State: ``exp_avg`` (m), as wide as the weight, and ``row_exp_avg_sq`` (v), one float a row.
    decay_mode is "decoupled" or "lazy". (FBGEMM's PARTIAL_ROWWISE_ADAM.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    betas : pair of float
        b1 and b2, each in [0, 1).
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`.
    """

    rule = "rowwise_adam"
    decay_modes = ("decoupled", "lazy")


class LAMB(_Moments):
    """LAMB on each row: Adam's direction, scaled to the norm of the row.

    m and v as in `Adam`;
    r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w; w -= lr * |w| / |r| * r.

    Where a norm is zero the ratio is 1, so that rows of zeros learn. State as for `Adam`. The decay
    is part of the rule: there is no decay_mode. (You et al.: "Large batch optimization", ICLR
    2020.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    betas : pair of float
        b1 and b2, each in [0, 1).
    eps : float
        Added to the root in the denominator; above 0.
    **options
        See `Options`.
    """

    rule = "lamb"
    decay_modes = ("rule",)

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, betas, eps, **options)

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        first, second = self._corrections(step)
        more = {"correction": second / first, "decay": self.weight_decay}
        self._set_moments(rule, lr, self.eps * second, **more)


class LARS(Optimizer):
    """LARS on each row: SGD whose step is a share of the row's norm.

    a = eta * |w| / (|g| + weight_decay * |w|);
    m = momentum * m + lr * a * (g + weight_decay * w); w -= m.

    Where a norm is zero, a is 1, so that rows of zeros learn. State: ``momentum_buffer`` (m), as
    wide as the weight. There is no decay_mode. (You, Gitman, Ginsburg: arXiv 1708.03888.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, see `pyembed.schedules`.
    momentum : float
        In [0, 1).
    eta : float
        The trust coefficient.
    **options
        See `Options`.
    """

    rule = "lars"
    decay_modes = ("rule",)

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 1e-2,
        momentum: float = 0.9,
        eta: float = 1e-3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, options)
        self.momentum = in_range("momentum", momentum, 0.0, 1.0)
        self.eta = in_range("eta", eta, 0.0)

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        decay = self.weight_decay
        rule.set_hyper(lr, momentum=self.momentum, correction=self.eta, decay=decay)

    def _parameters(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "eta": self.eta}


class FTRL(Optimizer):
    """FTRL-Proximal: a weight stays exactly zero until its summed gradients exceed `l1`.

    z += g - (sqrt(n + g^2) - sqrt(n)) / lr * w; n += g^2;
    w = 0 if |z| <= l1, else -(z - sign(z) * l1) / ((beta + sqrt(n)) / lr + l2).

    State: ``ftrl_z`` and ``ftrl_n``, each as wide as the weight. The weight follows from the state,
    so begin with rows of zeros; and there is no weight_decay, but l1 and l2. (McMahan et al.: "Ad
    click prediction", KDD 2013.)

    Parameters
    ----------
    target : Embedding, EmbeddingBag or Table
        The rows to update.
    lr : float or schedule
        The learning rate, above 0; see `pyembed.schedules`.
    beta, l1, l2 : float
        The constants of the formula above; 0 or more. The denominator is above 0 even for the
        smallest n: ``beta / lr + l2`` is at least 1e-30.
    **options
        See `Options`.
    """

    rule = "ftrl"
    decay_modes = ()
    _least_lr = ABOVE_ZERO

    def __init__(
        self,
        target: Target,
        lr: float | Schedule = 0.1,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(target, lr, options)
        self.beta = in_range("beta", beta, 0.0)
        self.l1, self.l2 = in_range("l1", l1, 0.0), in_range("l2", l2, 0.0)
        self._require_denominator(self.lr)
        if self.frequency_power > 1:  # the rule divides by the learning rate
            raise ArgumentError(f"frequency_power = {self.frequency_power}; allowed: 0 .. 1")

    def _require_denominator(self, lr: float) -> None:
        """Refuse constants that divide by zero when n is zero."""
        if self.beta / lr + self.l2 < ABOVE_ZERO:
            raise ArgumentError(
                f"beta = {self.beta:g}, l2 = {self.l2:g}, lr = {lr:g}; allowed: beta / lr + l2 of "
                f"at least {ABOVE_ZERO:g}"
            )

    def _set_hyper(self, rule: _core.Rule, step: int, lr: float) -> None:
        self._require_denominator(lr)
        rule.set_hyper(lr, beta=self.beta, l1=self.l1, l2=self.l2)

    def _parameters(self) -> dict[str, Any]:
        return {"beta": self.beta, "l1": self.l1, "l2": self.l2}
