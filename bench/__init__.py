"""Benchmarks, one written question a file; see README.md. Not part of the installed package."""
