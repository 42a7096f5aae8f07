"""The public names of pyembed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types

import pyembed

OPTIMIZERS = "SGD Adagrad RowwiseAdagrad RMSprop Adam AdamW PartialRowwiseAdam FTRL LAMB LARS"

# Everything that a user may rely on: a name that appears or goes is an entry in CHANGELOG.md.
PUBLIC = {
    "pyembed": "Embedding EmbeddingBag PyembedError SparseGrad Table Vocab build convert errors "
    "export functional grouping id_map init lookahead optim schedules show_config",
    "pyembed.build": "from_initializer from_vectors",
    "pyembed.convert": "convert",
    "pyembed.errors": "PyembedError IdError ArgumentError NonFiniteError DTypeError ClosedError "
    "FormatError CorpusError TableError LockedError DirtyError ReadOnlyError",
    "pyembed.export": "apply export read_delta",
    "pyembed.formats": "VectorSource open_vectors",
    "pyembed.functional": "embedding embedding_bag renorm_",
    "pyembed.grouping": "Groups SparseGrad dense_gradient group sum_duplicates",
    "pyembed.id_map": "by_frequency count_ids read_counts",
    "pyembed.init": "Initializer calculate_gain constant eye kaiming_normal kaiming_uniform normal "
    "ones orthogonal parse sparse trunc_normal uniform xavier_normal xavier_uniform zeros",
    "pyembed.layers": "Bags Embedding EmbeddingBag",
    "pyembed.optim": f"Optimizer step_many {OPTIMIZERS}",
    "pyembed.schedules": "constant cosine inverse_sqrt linear steps warmup",
    "pyembed.torch": "Embedding EmbeddingBag Optimizer",
    "pyembed.train": "Model SkipgramResult SkipgramSettings plot_words similar train_skipgram",
}
if importlib.util.find_spec("torch") is None:
    del PUBLIC["pyembed.torch"]


def public_module(name: str) -> types.ModuleType:
    """Return a module by the name that a user writes, which may be an attribute of pyembed."""
    attribute = getattr(pyembed, name.removeprefix("pyembed."), None)
    return attribute if inspect.ismodule(attribute) else importlib.import_module(name)
