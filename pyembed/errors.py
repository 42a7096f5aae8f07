"""All errors of pyembed; each is also the builtin that a caller would catch.

All are `RuntimeError`, too: torch raises it for most arguments, so code around torch catches it.

::

    PyembedError           (RuntimeError)
    ├── IdError            (IndexError)   a row id outside 0..rows-1
    ├── ArgumentError      (ValueError)   a shape, size, name or hyper-parameter that is not allowed
    │   └── NonFiniteError                a gradient with NaN or infinity
    ├── DTypeError         (TypeError)    ids that are not integers, values that are not float32, …
    ├── ClosedError        (ValueError)   a table that was used after close()
    ├── FormatError        (ValueError)   a file whose content is not what its format says
    ├── CorpusError        (OSError)      a text that cannot be read or decoded
    └── TableError         (OSError)      a table on disk that cannot be used as asked
        ├── LockedError                   another process or handle holds it
        ├── DirtyError                    its last writer ended without a commit
        └── ReadOnlyError                 a write to a table that was opened for reading

A message says what is wrong, which element, what is allowed and what to do about it. Errors of the
operating system (a missing file, a failing disk) are not wrapped: they stay `OSError`.
"""

from __future__ import annotations


class PyembedError(RuntimeError):
    """The base of all errors of pyembed."""


class IdError(PyembedError, IndexError):
    """A row id is outside ``0 .. rows-1``; nothing was read or written."""


class ArgumentError(PyembedError, ValueError):
    """An argument has a shape, size, name or value that is not allowed."""


class NonFiniteError(ArgumentError):
    """A gradient holds NaN or infinity; nothing was written."""


class DTypeError(PyembedError, TypeError):
    """An array has a dtype that is not allowed."""


class ClosedError(PyembedError, ValueError):
    """A table was used after it was closed."""


class FormatError(PyembedError, ValueError):
    """The content of a file is not what its format says."""


class CorpusError(OSError, PyembedError):
    """A text cannot be read or decoded."""


class TableError(OSError, PyembedError):
    """A table on disk cannot be used as asked."""


class LockedError(TableError):
    """Another process or handle holds the table."""


class DirtyError(TableError):
    """The last writer ended without a commit, and rows may have changed since the last commit."""


class ReadOnlyError(TableError):
    """A write to a table that was opened for reading."""
