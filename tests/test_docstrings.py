"""Docstrings of everything public, checked by numpydoc's validator."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
from numpydoc.validate import validate

from tests.helpers.public import PUBLIC, public_module

CHECKS = {
    *("GL06", "GL07", "GL08"),  # a docstring, with sections that numpydoc knows, in its order
    *("SS01", "SS03"),  # a summary that ends with a period
    *("PR01", "PR02", "PR03", "PR04", "PR07", "PR10"),  # every parameter, its type and meaning
    *("RT01", "RT03", "YD01"),  # what is returned or yielded
}
# Constructors that users do not call (but `Table.create`, `open_vectors`), or that pass on torch's
# arguments as *args.
UNCHECKED_ARGUMENTS = {
    *("pyembed.Table", "pyembed.formats.VectorSource"),
    *("pyembed.torch.Embedding", "pyembed.torch.EmbeddingBag"),
}


def documented() -> Iterator[str]:
    """The path of each public function, class, method and property; an inherited one once."""
    seen = set()
    for module_name, names in PUBLIC.items():
        module = public_module(module_name)
        for name in names.split():
            member = getattr(module, name)
            if inspect.ismodule(member):
                continue
            paths = {f"{module_name}.{name}": member}
            for base in inspect.getmro(member) if inspect.isclass(member) else ():
                if base.__module__.startswith("pyembed"):
                    for each, value in vars(base).items():
                        if not each.startswith("_"):
                            paths.setdefault(f"{module_name}.{name}.{each}", value)
            for path, value in paths.items():
                value = getattr(value, "__func__", getattr(value, "fget", value))
                if getattr(value, "__name__", "<lambda>") != "<lambda>" and id(value) not in seen:
                    seen.add(id(value))
                    yield path


@pytest.mark.parametrize("path", list(documented()))
def test_docstring(path: str) -> None:
    """A public docstring has every parameter and return value, with type and meaning."""
    errors = [f"{code}: {text}" for code, text in validate(path)["errors"] if code in CHECKS]
    if path in UNCHECKED_ARGUMENTS:
        errors = [error for error in errors if not error.startswith(("PR01", "PR02"))]
    assert not errors
