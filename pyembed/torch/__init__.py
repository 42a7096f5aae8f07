"""Layers of torch.nn over a `Table`: for autograd, torch.compile and torch's training loops.

Only this room imports torch (2.4 or newer), and nothing else in pyembed imports this room. It may
import everything below it: layers, optimizers, tables. Reading order: `device_copy` (rows copied to
a device and back), `distributed` (processes that step together), `rows` (where the rows of a layer
are), `ops` (for autograd and compilers), `weight` (the attribute `weight` of a layer over a table),
`layers` (the modules), `optim` (the optimizer).
"""

from pyembed.torch.layers import Embedding, EmbeddingBag
from pyembed.torch.optim import Optimizer

__all__ = ["Embedding", "EmbeddingBag", "Optimizer"]
