"""The tables of a model as an optimizer of torch: a step is the sum of what backward gave.

Backward of their layers then accumulates. It refuses parameters that are not those of such layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyembed.errors import ArgumentError
from pyembed.optim.step import require_clip_norm, step_many
from pyembed.torch.layers import Layer


class Optimizer(torch.optim.Optimizer):
    """The optimizer, in torch's sense, of the layers with `optimizer=` of a model.

    From now on backward of these layers accumulates, and `step` updates each table once, by the
    layer's own rule, with the sum: so several lookups in one forward and several backwards are one
    step, as in torch. Without it each of them is a step of its own, and nothing is kept.

    Each layer is a group of `param_groups`, in the order of ``model.modules()``; ``group["lr"]`` is
    its learning rate, which `step` gives to ``layer.optimizer``, and torch's schedulers change.
    Dense parameters go to an optimizer of torch, which finds nothing to do in these layers. What is
    pending is no part of `state_dict`, nor of a copy of a layer, which belongs to no Optimizer.

    Parameters
    ----------
    model : torch.nn.Module
        With one layer with `optimizer=` or more, whose learning rates are numbers.
    clip_norm : float, optional
        What is pending for all tables together is scaled in a step so that its 2-norm is at most
        this, see `pyembed.optim.step_many`. Dense parameters have torch's clip_grad_norm_, and a
        norm of their own.

    Raises
    ------
    ArgumentError
        If there is no such layer, or its learning rate is a schedule of its own; if beside
        `clip_norm` its optimizer has one of its own.

    Examples
    --------
    >>> import functools, pyembed.torch
    >>> from pyembed import optim
    >>> layer = pyembed.torch.Embedding(9, 3, optimizer=functools.partial(optim.Adam, lr=0.4))
    >>> optimizer = pyembed.torch.Optimizer(layer)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    >>> optimizer.zero_grad()
    >>> (layer(torch.tensor([4])) - layer(torch.tensor([2]))).sum().backward()
    >>> layer.optimizer.steps
    0
    >>> optimizer.step()
    >>> scheduler.step()
    >>> layer.optimizer.steps, optimizer.param_groups[0]["lr"]
    (1, 0.2)
    """

    def __init__(self, model: nn.Module, clip_norm: float | None = None) -> None:
        layers = [each for each in model.modules() if isinstance(each, Layer)]
        self._layers: list[Any] = [each for each in layers if each.optimizer is not None]
        if not self._layers:
            raise ArgumentError("the model has no layer of pyembed.torch with optimizer=")
        groups: list[dict[str, Any]] = []
        for layer in self._layers:
            if layer.optimizer._schedule is not None:
                raise ArgumentError(
                    f"{layer.optimizer!r} has a schedule of its own; allowed: a number as lr, "
                    "which torch's scheduler then changes"
                )
            groups.append({"params": [layer._anchor], "lr": layer.optimizer.lr})
        self._clip_norm = require_clip_norm(clip_norm, [each.optimizer for each in self._layers])
        super().__init__(groups, {})
        self._own()

    def _own(self) -> None:
        for layer in self._layers:
            layer._accumulates = True

    def __getstate__(self) -> dict[str, Any]:
        own = {"_layers": self._layers, "_clip_norm": self._clip_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters: they would not learn."""
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if any(parameter.numel() for parameter in given):
            raise ArgumentError("these parameters would not learn; give them to torch's optimizers")
        super().add_param_group(param_group | {"params": given})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is pending. `model.zero_grad()` does not: a table has no `.grad`."""
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.optimizer.discard()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update each table with what is pending, which is then gone; returns `closure`'s loss.

        A table for which nothing is pending takes no step. All others take theirs, or none does.

        Raises
        ------
        ArgumentError, ClosedError, NonFiniteError, ReadOnlyError, TableError
            Before a row of any table is written. What was pending still is, and the layers have
            the learning rates of before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turns: dict[Any, tuple[Any, Any]] = {}  # layers may share an optimizer, which steps once
        for layer, group in zip(self._layers, self.param_groups, strict=False):
            if layer.optimizer._pending:
                turns.setdefault(layer.optimizer, (layer, group["lr"]))
        rates = {optimizer: optimizer.lr for optimizer in turns}
        try:
            for optimizer, (_, rate) in turns.items():
                optimizer.lr = float(rate)
            step_many([(optimizer, None, None) for optimizer in turns], self._clip_norm)
        except Exception:
            for optimizer, rate in rates.items():
                optimizer.lr = rate
            raise
        for layer, _ in turns.values():
            layer._changes += 1
        return loss
