"""The tables of a model as one optimizer of torch: a step applies the sum of all backwards.

The layers then accumulate gradients in backward instead of stepping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyembed.errors import ArgumentError
from pyembed.optim.optimizer import require_clip_norm, step_many
from pyembed.torch.layers import learning_tables


class Optimizer(torch.optim.Optimizer):
    """Step the tables of a model as torch steps parameters.

    From now on, backward of the model's layers with `optimizer=` accumulates, and `step` updates
    each table once, by the rule of its layer, with the sum. So several lookups in one forward and
    several backwards are one step, as in torch. Without an `Optimizer` each of them is a step.

    Each table is a group of `param_groups`, in the order of ``model.modules()``. ``group["lr"]`` is
    its learning rate: schedulers of torch change it, and `step` gives it to ``layer.optimizer``.
    Dense parameters belong to an optimizer of torch, which finds nothing to update in these layers.
    Its `state_dict` has the learning rates, and the optimizer state of tables in memory; a table in
    a file is its own checkpoint. Pending gradients are not part of it. A copy of a layer belongs to
    no `Optimizer`.

    Parameters
    ----------
    model : torch.nn.Module
        Contains at least one layer with `optimizer=`; the learning rates are numbers.
    clip_norm : float, optional
        Scale the pending gradients of all tables together so that their 2-norm is at most this, see
        `pyembed.optim.step_many`. Dense parameters have clip_grad_norm_ of torch, a separate norm.

    Raises
    ------
    ArgumentError
        If there is no such layer, if a learning rate is a schedule, or if an optimizer has a
        `clip_norm` while `clip_norm` is given.

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
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"model is a {type(model).__name__}; allowed: the module that has the layers, not "
                "its parameters"
            )
        tables = list(learning_tables(model))
        if not tables:
            raise ArgumentError("the model has no layer of pyembed.torch with optimizer=")
        groups: list[dict[str, Any]] = []
        for rows, anchor in tables:
            if rows.optimizer.schedule is not None:
                name = repr(rows.optimizer)
                raise ArgumentError(f"{name} has a schedule of its own; allowed: a number as lr")
            groups.append({"params": [anchor], "lr": rows.optimizer.lr})
        self._tables = [rows for rows, _ in tables]
        self._clip_norm = require_clip_norm(clip_norm, [each.optimizer for each in self._tables])
        super().__init__(groups, {})
        self._accumulate()

    def _accumulate(self) -> None:
        for rows in self._tables:
            rows.accumulates = True

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rates, and copies of the optimizer state of tables in memory.

        Returns
        -------
        dict
            In torch's form: "state" has the step count and the columns of each table, by its
            position among the groups.
        """
        in_memory = [
            (at, rows.optimizer) for at, rows in enumerate(self._tables) if not _path(rows)
        ]
        return {**super().state_dict(), "state": {at: _state_of(each) for at, each in in_memory}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Parameters
        ----------
        state_dict : dict
            As in torch. The state of a table in a file may be missing: the file has it.

        Raises
        ------
        ArgumentError
            If state is missing or has other columns or shapes. Nothing is restored then.
        ClosedError, ReadOnlyError, ValueError
        """
        saved = state_dict["state"]
        for at, rows in enumerate(self._tables):
            expected = _shapes(rows.optimizer)
            found = {name: tuple(np.shape(value)) for name, value in saved.get(at, {}).items()}
            if found != expected and (found or not _path(rows)):
                raise ArgumentError(f"state {at} has the shapes {found}; allowed: {expected}")
        super().load_state_dict({**state_dict, "state": {}})
        for at, rows in enumerate(self._tables):
            if at in saved:
                _restore(rows.optimizer, saved[at])

    def __getstate__(self) -> dict[str, Any]:
        own = {"_tables": self._tables, "_clip_norm": self._clip_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._accumulate()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse parameters that have elements, because this optimizer would not train them.

        Parameters
        ----------
        param_group : dict
            As in torch.

        Raises
        ------
        ArgumentError
        """
        given = param_group["params"]
        given = [given] if isinstance(given, Tensor) else list(given)
        if any(parameter.numel() for parameter in given):
            raise ArgumentError("these parameters would not learn; give them to torch's optimizers")
        super().add_param_group(param_group | {"params": given})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the pending gradients. ``model.zero_grad()`` does not reach tables.

        Parameters
        ----------
        set_to_none : bool
            Without effect on tables.
        """
        super().zero_grad(set_to_none)
        for rows in self._tables:
            rows.optimizer.discard()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update each table with its pending gradients, and drop them.

        A table without pending gradients takes no step. Either all others take theirs, or none.

        Parameters
        ----------
        closure : callable, optional
            Called first, with gradients enabled, as in torch.

        Returns
        -------
        loss
            Result of `closure`, or None.

        Raises
        ------
        ArgumentError, ClosedError, NonFiniteError, ReadOnlyError, TableError
            Before a row of any table is written. Pending gradients and the learning rates of the
            layers are then unchanged.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turns: dict[Any, Any] = {}  # layers may share an optimizer, which steps once
        for rows, group in zip(self._tables, self.param_groups, strict=False):
            if rows.optimizer.pending:
                turns.setdefault(rows.optimizer, (rows, group["lr"], rows.optimizer.lr))
        try:
            for optimizer, (_, rate, _) in turns.items():
                optimizer.lr = float(rate)
            step_many([(optimizer, None, None) for optimizer in turns], self._clip_norm)
        except Exception:
            for optimizer, (_, _, before) in turns.items():
                optimizer.lr = before
            raise
        for rows, _, _ in turns.values():
            rows.version += 1
        return loss


def _path(rows: Any) -> Any:
    return rows.core.table.path


def _columns(optimizer: Any) -> dict[str, Any]:
    """Return the state columns of an optimizer, by name."""
    _, *columns = optimizer.table.store.columns_of(optimizer.state)
    return {name: each.array for name, each in zip(optimizer.state, columns, strict=True)}


def _shapes(optimizer: Any) -> dict[str, tuple[int, ...]]:
    return {"steps": (), **{name: each.shape for name, each in _columns(optimizer).items()}}


def _state_of(optimizer: Any) -> dict[str, Any]:
    columns = _columns(optimizer).items()
    return {"steps": optimizer.steps} | {n: torch.from_numpy(np.array(c)) for n, c in columns}


def _restore(optimizer: Any, saved: dict[str, Any]) -> None:
    store = optimizer.table.store
    with store.still():
        columns = store.begin_change(optimizer.state, np.arange(optimizer.table.rows))
        for name, column in zip(optimizer.state, columns[1:], strict=True):
            column.array[...] = saved[name].cpu().numpy()
    optimizer.steps = saved["steps"]
