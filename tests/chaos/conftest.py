"""What the chaos tests share, and how much of them is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Fixtures of the front end's tests; pytest finds them by their names here.
from tests.service.conftest import make_settings, media_directory, redis  # noqa: F401

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--malformed full`: 10,000 pictures, 1,000 videos and 5,000 requests instead of a few hundred."""
    parser.addoption("--malformed", choices=("short", "full"), default="short")
