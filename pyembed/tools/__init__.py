"""Whole tables as files: build, convert, export, verify and info, each a function of Python first.

The command line only calls what is here. The room may import `table`, `words`, `formats` and what
is below them. Read the modules in any order; only `export` builds on others, on `convert` and
`delta`.
"""
