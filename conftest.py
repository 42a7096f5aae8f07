"""Doctests of the torch adapter are collected where there is torch."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["pyembed/torch"]
