"""What counts as a number where a caller gives one: Python's and numpy's, but neither True nor False."""

from __future__ import annotations

from numbers import Integral, Real


def is_whole(value: object) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, or NaN, which is in no range."""
    return isinstance(value, Real) and not isinstance(value, bool)
