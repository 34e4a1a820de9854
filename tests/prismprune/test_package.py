"""The package as a user meets it: its names, and that they cost nothing before they are used."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import prismprune


def test_every_public_name_is_there() -> None:
    """Each name of `__all__` can be had, those imported on use too."""
    assert [name for name in prismprune.__all__ if not hasattr(prismprune, name)] == []


def test_every_public_name_is_listed() -> None:
    """`dir()` shows the names that are not imported yet, so that completion finds them."""
    script = "import prismprune; print(set(prismprune.__all__) <= set(dir(prismprune)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = prismprune.magic


def test_the_version_is_the_distribution_s() -> None:
    """One source: the installed package's metadata."""
    assert prismprune.__version__ == version("prismprune")
