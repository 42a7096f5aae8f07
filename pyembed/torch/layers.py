"""`Embedding` and `EmbeddingBag` as modules of torch, and torch's protocols for them.

A layer has a `Rows`, which says where its rows live; the protocols of nn.Module ask it. A layer
cannot be made of a combination that cannot work: a Parameter over a file, a second writer of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyembed._checks import F32
from pyembed.errors import ArgumentError, DTypeError
from pyembed.layers import embedding, embedding_bag
from pyembed.optim.optimizer import Optimizer
from pyembed.table import Table
from pyembed.torch import device_copy, ops
from pyembed.torch.rows import DeviceRows, ParameterRows, Rows, TableRows, array_of
from pyembed.torch.weight import WeightInTable

PLAIN = (Tensor, nn.Parameter)
Path = str | os.PathLike[str]
Source = Tensor | F32 | Table | Path
EmbeddingT = TypeVar("EmbeddingT", bound="Embedding")
BagT = TypeVar("BagT", bound="EmbeddingBag")
MakeOptimizer = Callable[[embedding.Layer], Optimizer]


def _setting(name: str) -> Any:
    return property(lambda self: getattr(self._rows.core, name), doc=f"`{name}`; read-only.")


class Layer(nn.Module):
    """Base of both layers: construction, and torch's protocols.

    A layer is also an instance of the class of torch.nn, so that code that initialises, counts or
    replaces the embeddings of a model finds it. It does not run the constructor of that class.

    Attributes
    ----------
    in_state_dict : bool
        Whether `state_dict` includes rows that live in a table. Set False where the table is its
        own checkpoint.
    """

    padding_idx, max_norm, norm_type = map(_setting, ("padding_idx", "max_norm", "norm_type"))
    scale_grad_by_freq, sparse = map(_setting, ("scale_grad_by_freq", "sparse"))
    placement = property(lambda self: self._rows.placement, doc="'table' or 'device'.")
    optimizer = property(
        lambda self: self._rows.optimizer,
        lambda self, value: setattr(self._rows, "optimizer", value),
        doc="Optimizer of pyembed that updates the table, or None.",
    )
    num_embeddings: Any = property(lambda self: self.weight.shape[0], doc="Number of rows.")
    embedding_dim: Any = property(
        lambda self: self.weight.shape[1], doc="Number of float32 values in a row."
    )
    weight: Any = property(
        lambda self: self._weight(),
        doc="The Parameter; if the rows live in a table, an object that stands for them.",
    )
    _core_class: Any
    reset_parameters: Any  # of torch.nn: draws from N(0, 1), with zeros in the padding row

    def __init__(
        self,
        settings: dict[str, Any],
        weight: Tensor | None,
        device: Any,
        table: Table | None,
        path: Path | None,
        optimizer: MakeOptimizer | None,
        placement: str,
    ) -> None:
        nn.Module.__init__(self)
        if device is None:
            device = "cpu" if weight is not None else torch.get_default_device()
        device = torch.device(device)
        given = {"_weight": weight, "table": table, "path": path}
        _require_arguments(settings, given, optimizer is not None, placement, device)
        fresh = weight is None and table is None and path is None
        if weight is not None:
            table = Table.from_array(array_of(weight))
        elif path is not None:
            table = _opened(path, "r" if settings["_freeze"] else "r+")
        elif table is None:
            table = Table.memory(settings["num_embeddings"], settings["embedding_dim"])
        try:
            core = self._core_class(**settings, table=table)
            self._rows = _choose_rows(core, optimizer, placement, device)
            attributes = self._rows.attributes(weight, device)
        except BaseException:
            if path is not None:
                table.close()
            raise
        for name, value in attributes.items():
            setattr(self, name, value)
        self.in_state_dict = True
        if fresh:
            self.reset_parameters()

    def _weight(self) -> Any:
        if not self._rows.in_table:
            return super().__getattr__("weight")
        return WeightInTable(self._rows, self._parameters[TableRows.parameter])

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not self._rows.in_table:
            super().__setattr__(name, value)
        elif not self.weight.is_same(value):  # as in layer.weight += 1
            raise ArgumentError(
                "the weight lives in a table, so it can be neither replaced nor tied; set rows "
                "with layer.weight.data = values, or omit optimizer= to have a Parameter"
            )

    @classmethod
    def _of_rows(cls: Any, embeddings: Source, freeze: bool, options: Any) -> Any:
        """Make a layer over existing rows, for `from_pretrained`."""
        given: dict[str, Any] = {"_freeze": freeze, **options}
        if isinstance(embeddings, Tensor):
            if embeddings.dim() != 2:
                raise ArgumentError(
                    f"shape {tuple(embeddings.shape)} of embeddings; allowed: (rows, dim)"
                )
            return cls(*embeddings.shape, _weight=embeddings, **given)
        if isinstance(embeddings, Table):
            table = embeddings
        elif isinstance(embeddings, np.ndarray):
            table = Table.from_array(embeddings)
        else:
            table = _opened(embeddings, "r" if freeze else "r+")
        return cls(table.rows, table.dim, table=table, **given)

    @property
    def table(self) -> Table:
        """Table that holds the rows; with placement "device", the table that `commit` writes.

        For a layer with a Parameter in memory, a table over the Parameter's memory.
        """
        return self._rows.layer_over(self.weight).table

    def commit(self, meta: dict[str, Any] | None = None) -> None:
        """Commit the table; with placement "device", first copy rows that differ into it.

        The columns of optimizer state in the table then stay as they are: they do not belong to
        torch's optimizer.

        Parameters
        ----------
        meta : dict, optional
            Small state of the user that is committed with the rows, as JSON.

        Raises
        ------
        ArgumentError, ClosedError, DTypeError, ReadOnlyError

        Examples
        --------
        >>> table = Table.memory(rows=3, dim=2)
        >>> layer = Embedding(3, 2, table=table, placement="device")
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> layer.commit()
        >>> table.gather([2]).tolist()
        [[1.0, 1.0]]
        """
        self._rows.write_back(self.weight)
        self.table.commit(meta)

    def extra_repr(self) -> str:
        """Describe the layer as torch does; if the rows live in a table, describe the table.

        Returns
        -------
        str
            Text between the parentheses of the repr.
        """
        return ", ".join(self._rows.description(self.weight))

    # --- lookups ------------------------------------------------------------------------------

    def _look_up(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        rows: Any = self._rows
        # Module.__getattr__ takes 0.4 µs; only a parametrised weight is not among the parameters.
        weight: Any = self._parameters.get(rows.parameter)
        weight = self.weight if weight is None else weight
        for given in (weight, ids, offsets, weights):
            if given is not None and not (isinstance(given, Tensor) and given.is_cpu):
                _require_device(given, rows.devices)
        if weight.dtype != torch.float32:
            raise DTypeError(
                f"the layer was cast to {weight.dtype}; allowed: float32; cast the rows "
                "that it returns, or use torch.autocast; layer.float() undoes the cast"
            )
        if rows.renorms:
            with torch.no_grad():
                ops.renorm(weight, ids, rows.number)
        # Tensor subclasses, inside and outside of a compiler, need an op.
        if torch.compiler.is_compiling() or not (type(ids) in PLAIN and type(weight) in PLAIN):
            return ops.look_up(weight, ids, offsets, weights, rows.number)
        if rows.in_table and weight._version != rows.seen:
            rows.require_unchanged(weight)
        return ops.Lookup.apply(weight, ids, offsets, weights, rows)  # type: ignore[no-untyped-call]

    # --- torch's protocols --------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._rows.refuse_sharing(self._parameters.get(self._rows.parameter))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._rows.save(destination, prefix, self.in_state_dict)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local: Any, strict: bool, *found: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local, strict, *found)
        self._rows.load(state_dict, prefix, self.in_state_dict, strict, *found)


class Embedding(Layer, nn.Embedding):  # type: ignore[misc]
    """`torch.nn.Embedding` over a table; docs/torch-compatibility.md lists the differences.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the weight.
    padding_idx : int, optional
        Row without a gradient; a fresh one is zero. A negative number counts from the end.
    max_norm : float, optional
        Before a lookup, scale rows of the batch with a larger norm down to it.
    norm_type : float
        The p of that norm.
    scale_grad_by_freq : bool
        Divide the gradient of a row by the number of times that it occurs in the batch.
    sparse : bool
        The gradient of a Parameter is sparse, with unique ids.
    _weight : float32 Tensor of shape (num_embeddings, embedding_dim), optional
        Rows on the CPU, used without a copy.
    _freeze : bool
        The rows do not learn.
    device : "cpu" or "cuda"; with placement "device" any device of torch
        Device on which looked-up rows arrive; "cuda" needs `optimizer` or a frozen layer. With
        placement "device", the device of all rows.
    dtype : torch.dtype, optional
        float32 only.
    table : Table, optional
        Rows to use; they are not initialised.
    path : path-like, optional
        Folder of a table; opened for reading if the layer is frozen.
    optimizer : callable, optional
        A class of `pyembed.optim`, or a `functools.partial` of one; it is called with the numpy
        layer. Backward then updates the table, in one step for each call of the layer; `Optimizer`
        combines several calls in one step. Without `optimizer`, `weight` is a Parameter.
    placement : {"table", "device", "auto"}
        "device" copies the rows of `path` or `table` to `device`, into a Parameter for torch's
        kernels and optimizers; `commit` copies them back. "auto", for a frozen layer only, means
        "device" if the rows take at most half of the free memory there, else "table".

    Attributes
    ----------
    weight : Parameter of shape (num_embeddings, embedding_dim)
        If the rows live in a table, an object that operations of torch accept as a tensor. Torch
        writes to it only if the table is in memory, and no gradient reaches it.
    table : Table
    optimizer : pyembed optimizer or None
    placement : {"table", "device"}

    Raises
    ------
    ArgumentError
        If arguments contradict each other or are out of range.
    DTypeError
        If `_weight` is not a float32 tensor on the CPU, or `optimizer` makes no pyembed optimizer.
    LockedError, TableError
        If the table at `path` cannot be opened.
    ReadOnlyError
        If rows that learn come from a table that was opened for reading.

    Examples
    --------
    >>> import functools
    >>> from pyembed import optim
    >>> layer = Embedding(10, 3, optimizer=functools.partial(optim.SGD, lr=1.0))
    >>> before = layer(torch.tensor([4]))
    >>> before.sum().backward()
    >>> (before - layer(torch.tensor([4]))).round().tolist()
    [[1.0, 1.0, 1.0]]
    """

    _core_class = embedding.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        table: Table | None = None,
        path: Path | None = None,
        optimizer: MakeOptimizer | None = None,
        placement: str = "table",
    ) -> None:
        settings = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "padding_idx": padding_idx,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "scale_grad_by_freq": scale_grad_by_freq,
            "sparse": sparse,
            "_freeze": _freeze,
            "dtype": dtype,
        }
        super().__init__(settings, _weight, device, table, path, optimizer, placement)

    @classmethod
    def from_pretrained(
        cls: type[EmbeddingT],
        embeddings: Source,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **options: Any,
    ) -> EmbeddingT:
        """Make a layer over existing rows.

        Parameters
        ----------
        embeddings : Tensor or array of shape (rows, dim), Table, or path-like
            float32 rows on the CPU, which are used without a copy; a table; or a table's folder,
            which is opened for reading if `freeze` is true.
        freeze : bool
            The rows do not learn. With False a path needs `optimizer` or ``placement="device"``.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse : optional
            As for the class, in torch's order.
        **options
            `device`, `dtype`, `optimizer` or `placement` of the class.

        Returns
        -------
        Embedding
            The layer.

        Raises
        ------
        ArgumentError, DTypeError, FileNotFoundError, LockedError, TableError

        Examples
        --------
        >>> layer = Embedding.from_pretrained(torch.eye(3))
        >>> layer(torch.tensor([2])).tolist(), layer.weight.requires_grad
        ([[0.0, 0.0, 1.0]], False)
        """
        options |= {"padding_idx": padding_idx, "max_norm": max_norm, "norm_type": norm_type}
        options |= {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
        return cls._of_rows(embeddings, freeze, options)

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows.

        Parameters
        ----------
        input : integer Tensor of any shape
            Ids from 0 to num_embeddings - 1.

        Returns
        -------
        float32 Tensor of shape input.shape + (embedding_dim,)
            Fresh memory.

        Raises
        ------
        IdError
            If an id is out of range. No row has changed then.
        ArgumentError, ClosedError, DTypeError, ReadOnlyError

        Examples
        --------
        >>> Embedding(10, 3)(torch.tensor([[1, 2], [3, 4]])).shape
        torch.Size([2, 2, 3])
        """
        if self.placement == "table":
            return self._look_up(input, None, None)
        scaling = self.max_norm, self.norm_type, self.scale_grad_by_freq
        return functional.embedding(input, self.weight, self.padding_idx, *scaling, self.sparse)


class EmbeddingBag(Layer, nn.EmbeddingBag):  # type: ignore[misc]
    """`torch.nn.EmbeddingBag` over a table; docs/torch-compatibility.md lists the differences.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Shape of the weight.
    max_norm, norm_type, scale_grad_by_freq : optional
        As for `Embedding`.
    mode : {"mean", "sum", "max"}
        How the rows of a bag become one row.
    sparse, _weight : optional
        As for `Embedding`.
    include_last_offset : bool
        Offsets end with the number of ids.
    padding_idx : int, optional
        Row that enters no sum, mean, count or maximum, and has no gradient.
    device, dtype, _freeze, table, path, optimizer, placement : optional
        As for `Embedding`.

    Raises
    ------
    ArgumentError, DTypeError, LockedError, ReadOnlyError, TableError
        As for `Embedding`.

    Examples
    --------
    >>> bag = EmbeddingBag(3, 2, mode="sum", _weight=torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    >>> bag(torch.tensor([0, 1, 2]), torch.tensor([0, 2])).tolist()
    [[4.0, 6.0], [5.0, 6.0]]
    """

    _core_class = embedding_bag.EmbeddingBag

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        _freeze: bool = False,
        table: Table | None = None,
        path: Path | None = None,
        optimizer: MakeOptimizer | None = None,
        placement: str = "table",
    ) -> None:
        settings = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "scale_grad_by_freq": scale_grad_by_freq,
            "mode": mode,
            "sparse": sparse,
            "include_last_offset": include_last_offset,
            "padding_idx": padding_idx,
            "_freeze": _freeze,
            "dtype": dtype,
        }
        super().__init__(settings, _weight, device, table, path, optimizer, placement)

    @classmethod
    def from_pretrained(
        cls: type[BagT],
        embeddings: Source,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        **options: Any,
    ) -> BagT:
        """Make a layer over existing rows.

        Parameters
        ----------
        embeddings, freeze : optional
            As for `Embedding.from_pretrained`.
        max_norm, norm_type, scale_grad_by_freq, mode, sparse : optional
            As for the class, in torch's order.
        include_last_offset, padding_idx : optional
            As for the class.
        **options
            `device`, `dtype`, `optimizer` or `placement` of the class.

        Returns
        -------
        EmbeddingBag
            The layer.

        Raises
        ------
        ArgumentError, DTypeError, FileNotFoundError, LockedError, TableError

        Examples
        --------
        >>> bag = EmbeddingBag.from_pretrained(torch.eye(3), mode="sum")
        >>> bag(torch.tensor([[0, 2]])).tolist()
        [[1.0, 0.0, 1.0]]
        """
        options |= {"max_norm": max_norm, "norm_type": norm_type, "mode": mode, "sparse": sparse}
        options |= {"scale_grad_by_freq": scale_grad_by_freq, "padding_idx": padding_idx}
        options |= {"include_last_offset": include_last_offset}
        return cls._of_rows(embeddings, freeze, options)

    mode, include_last_offset = map(_setting, ("mode", "include_last_offset"))

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Reduce each bag of rows to one row.

        Parameters
        ----------
        input : integer Tensor of shape (n,) or (bags, length)
            Ids; each row of a 2-D input is one bag.
        offsets : integer Tensor of shape (bags,), or (bags + 1,) with include_last_offset
            Position of each bag's first id, for a 1-D input only.
        per_sample_weights : float32 Tensor of the shape of `input`, optional
            Factor for each row, in mode "sum" only.

        Returns
        -------
        float32 Tensor of shape (bags, embedding_dim)
            Fresh memory. An empty bag gives zeros.

        Raises
        ------
        IdError
            If an id is out of range. No row has changed then.
        ArgumentError, ClosedError, DTypeError, ReadOnlyError

        Examples
        --------
        >>> EmbeddingBag(10, 3)(torch.tensor([[1, 2], [3, 4]])).shape
        torch.Size([2, 3])
        """
        if self.placement == "table":
            return self._look_up(input, offsets, per_sample_weights)
        scaling = self.max_norm, self.norm_type, self.scale_grad_by_freq
        kind = self.mode, self.sparse, per_sample_weights
        last = self.include_last_offset, self.padding_idx
        return functional.embedding_bag(input, self.weight, offsets, *scaling, *kind, *last)


def learning_tables(model: nn.Module) -> Iterator[tuple[Any, nn.Parameter]]:
    """Yield rows and anchor of each layer with `optimizer=`, in the order of `model.modules()`."""
    for module in model.modules():
        if isinstance(module, Layer) and module.optimizer is not None:
            yield module._rows, module.get_parameter(TableRows.parameter)


# --- construction ---------------------------------------------------------------------------------


def _require_arguments(
    settings: dict[str, Any], given: dict[str, Any], makes: bool, where: str, device: torch.device
) -> None:
    """Refuse arguments that contradict each other, before a table is opened."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ArgumentError("_weight, table and path name the same rows; give one of them")
    if device.type == "meta":
        raise ArgumentError(
            "device = meta: the rows exist from the start; make the layer outside of "
            "torch.device('meta'), or with device='cpu'"
        )
    exists = bool(names) and names != ["_weight"]
    device_copy.require(where, exists, makes, settings["_freeze"], device)
    weight = given["_weight"]
    if weight is None:
        if settings["dtype"] is None and torch.get_default_dtype() != torch.float32:
            raise ArgumentError(
                f"torch's default dtype is {torch.get_default_dtype()}, and rows are float32; give "
                "dtype=torch.float32, and cast the rows that the layer returns"
            )
    elif getattr(weight, "type", str)() != "torch.FloatTensor":
        found = f"{getattr(weight, 'dtype', '')} {type(weight).__name__}"
        raise DTypeError(f"_weight is a {found}; allowed: a float32 Tensor on the CPU")


def _opened(path: Path, mode: Literal["r", "r+"]) -> Table:
    try:
        return Table.open(path, mode)
    except FileNotFoundError as error:
        text = f"no table at {os.fspath(path)}; make one with pyembed.Table.create(path, rows, dim)"
        raise FileNotFoundError(error.errno, text) from error


def _choose_rows(core: Any, make: MakeOptimizer | None, where: str, device: torch.device) -> Rows:
    """Decide where the rows of this numpy layer live."""
    table = core.table
    if device_copy.decide(where, table, device) == "device":
        return DeviceRows(core)
    optimizer = None if make is None else _made(make, core)
    if device.type not in TableRows.devices:
        raise ArgumentError(f"device = {device}; allowed: 'cpu', 'cuda', or placement='device'")
    if optimizer is None and table.path is None and table.writable and device.type == "cpu":
        return ParameterRows(core)
    if optimizer is None and not core.frozen:
        raise ArgumentError(
            f"table {table.path or 'in memory'}, device = {device}: without optimizer= only a "
            "writable table in memory learns, on the CPU; give optimizer=functools.partial("
            "pyembed.optim.Adagrad, lr=0.05), freeze the layer, or use placement='device'"
        )
    return TableRows(core, optimizer)


def _made(make: MakeOptimizer, core: Any) -> Optimizer:
    kind = getattr(make, "func", make)  # the class in a functools.partial
    of_torch = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    made = make(core) if callable(make) and not of_torch else None
    if not isinstance(made, Optimizer):
        raise DTypeError(
            f"optimizer = {make!r}; allowed: a class or functools.partial of pyembed.optim. To use "
            "an optimizer of torch, omit optimizer= and give it layer.parameters()"
        )
    return made


def _require_device(given: Any, devices: tuple[str, ...]) -> None:
    if not isinstance(given, Tensor):
        kind = type(given).__name__
        remedy = "use torch.as_tensor(input)"
        if kind == "Proxy":
            remedy = "use torch.export, or a Tracer of torch.fx whose leaves are these layers"
        raise DTypeError(f"the input is a {kind}; allowed: a Tensor; {remedy}")
    if given.device.type not in devices:
        raise ArgumentError(
            f"a tensor is on {given.device}; allowed: {', '.join(devices)}. For tensors on a GPU "
            "make the layer with optimizer= and device='cuda', or with placement='device'"
        )
