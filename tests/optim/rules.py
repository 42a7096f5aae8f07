"""Every optimizer rule, with arguments that exercise it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from pyembed import optim

Make = Callable[..., optim.Optimizer]

# By the name that `Table.create` knows the rule under.
RULES: dict[str, Make] = {
    "sgd": optim.SGD,
    "momentum": partial(optim.SGD, momentum=0.9, dampening=0.3),
    "nesterov": partial(optim.SGD, momentum=0.9, nesterov=True),
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "rmsprop": optim.RMSprop,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "rowwise_adam": optim.PartialRowwiseAdam,
    "lamb": partial(optim.LAMB, weight_decay=0.1),
    "lars": partial(optim.LARS, weight_decay=0.1),
    "ftrl": partial(optim.FTRL, l1=0.01, l2=0.1),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
