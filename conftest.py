"""Tests and doctests of the torch room are collected only if torch is installed."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch") else ["pyembed/torch", "tests/torch"]
