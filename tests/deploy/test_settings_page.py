"""docs/settings.md says what the settings classes say."""

from __future__ import annotations

import pytest

from docs.settings_page import PAGE, page
from tests.deploy.conftest import variables


def test_the_page_is_current() -> None:
    """`python -m docs.settings_page` was run after the last change of a setting."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("component", ["service", "worker"])
def test_every_setting_is_on_the_page(component: str) -> None:
    """Each variable has a row of its own."""
    text = page()
    assert all(f"| `{name}` |" in text for name in variables(component))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("PRISM_MEDIA_URL", "**required**"),
        ("PRISM_METRICS_PORT", "whole number ≥ 0 ≤ 65535"),
        ("PRISM_REQUIRE_DURABLE_BROKER", "`true` or `false`"),
        ("PRISM_DEFAULT_TOKEN_BUDGET", "whole number ≥ 1 ≤ 16384 or `all`"),
        ("PRISM_CACHE_DIR", "per user"),
    ],
)
def test_defaults_and_bounds_are_in_words(name: str, shown: str) -> None:
    """One of each kind."""
    rows = [line for line in page().splitlines() if line.startswith(f"| `{name}` |")]
    assert rows
    assert all(shown in row for row in rows)
