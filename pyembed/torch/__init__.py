"""pyembed for torch: layers of torch.nn over a `Table`, for autograd, torch.compile and nn.Module.

The only folder that imports torch (2.4 or newer); nothing else in pyembed imports it.
"""

from pyembed.torch.layers import Embedding, EmbeddingBag
from pyembed.torch.optim import Optimizer

__all__ = ["Embedding", "EmbeddingBag", "Optimizer"]
