"""Lookup layers with torch's arguments: `Embedding`, `EmbeddingBag`, and both as functions.

It may import `table` and what is below, and knows no optimizer. Read `embedding` first.
"""

from pyembed.layers.bags import Bags
from pyembed.layers.embedding import Embedding
from pyembed.layers.embedding_bag import EmbeddingBag

__all__ = ["Bags", "Embedding", "EmbeddingBag"]
