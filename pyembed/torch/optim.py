"""The tables of a model as an optimizer of torch: what its learning-rate schedulers drive.

It steps nothing: backward has. It refuses parameters that are not those of such layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyembed import schedules
from pyembed.errors import ArgumentError
from pyembed.torch.layers import Layer


class _Rate:
    """The learning rate of a group, as a schedule of `pyembed.optim`; a copy stays as it is now."""

    def __init__(self, optimizer: Optimizer, group: int) -> None:
        self._optimizer, self._group = optimizer, group

    def __call__(self, step: int) -> float:
        return float(self._optimizer.param_groups[self._group]["lr"])

    def __reduce__(self) -> tuple[Any, ...]:
        return schedules.constant, (self(0),)

    def __repr__(self) -> str:
        return f"{self(0):g}"


class Optimizer(torch.optim.Optimizer):
    """What torch's learning-rate schedulers take for the layers with `optimizer=` of a model.

    Each layer is a group of `param_groups`, in the order of ``model.modules()``; ``group["lr"]`` is
    its learning rate from now on. Backward updates the tables, so `step` and `zero_grad` have
    nothing to do; to call them is what schedulers expect. Dense parameters go to an optimizer of
    torch, which finds nothing to do in these layers.

    Parameters
    ----------
    model : torch.nn.Module
        With one layer with `optimizer=` or more, whose learning rates are numbers.

    Raises
    ------
    ArgumentError
        If there is no such layer, or its learning rate is a schedule of its own.

    Examples
    --------
    >>> import functools, pyembed.torch
    >>> from pyembed import optim
    >>> layer = pyembed.torch.Embedding(9, 3, optimizer=functools.partial(optim.SGD, lr=0.4))
    >>> optimizer = pyembed.torch.Optimizer(layer)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    >>> layer(torch.tensor([4])).sum().backward()
    >>> optimizer.step()
    >>> scheduler.step()
    >>> layer.optimizer.lr
    0.2
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [each for each in model.modules() if isinstance(each, Layer)]
        found = [(each.optimizer, each._anchor) for each in layers if each.optimizer is not None]
        if not found:
            raise ArgumentError("the model has no layer of pyembed.torch with optimizer=")
        groups: list[dict[str, Any]] = []
        for optimizer, anchor in found:
            schedule = optimizer._schedule
            if schedule is not None and not isinstance(schedule, _Rate):
                raise ArgumentError(
                    f"{optimizer!r} has a schedule of its own; allowed: a number as lr, "
                    "which torch's scheduler then changes"
                )
            groups.append({"params": [anchor], "lr": optimizer.lr})
        super().__init__(groups, {})
        for at, (optimizer, _) in enumerate(found):
            optimizer.lr = _Rate(self, at)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters: they would not learn."""
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if any(parameter.numel() for parameter in given):
            raise ArgumentError("these parameters would not learn; give them to torch's optimizers")
        super().add_param_group(param_group | {"params": given})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Nothing: backward has updated the tables. Returns what `closure` gives."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()
