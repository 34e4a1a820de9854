"""docs/operations.md says what `prismprune plan` says."""

from __future__ import annotations

from docs.sizes import BEGIN, END, PAGE, page


def test_the_sizes_are_current() -> None:
    """`python -m docs.sizes` was run after the last change of the planning; the rest of the page is kept."""
    text = PAGE.read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert text == page()
