"""Sparse optimizers over a table: SGD … FTRL, one step for one table or for many.

It may import `table` and what is below, and knows neither files nor layers. Read `rules` (the
formulas), then `optimizer` (what all rules share), then `step` (one path for one table or many).
"""

from pyembed.optim.optimizer import Optimizer, step_many
from pyembed.optim.rules import (
    FTRL,
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    PartialRowwiseAdam,
    RMSprop,
    RowwiseAdagrad,
)

__all__ = [
    "FTRL",
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Optimizer",
    "PartialRowwiseAdam",
    "RMSprop",
    "RowwiseAdagrad",
    "step_many",
]
