"""Identifiers that sort by the time at which they were drawn."""

from __future__ import annotations

import re
import secrets
import time

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str) -> str:
    """`prefix`_ and a ULID: 48 bits of Unix milliseconds and 80 random bits in 26 characters of base 32."""
    value = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return prefix + "_" + "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


def is_id(prefix: str, text: str) -> bool:
    """Whether `text` could have come from `new_id(prefix)`; only then may it become part of a key."""
    return re.fullmatch(f"{prefix}_[{_CROCKFORD}]{{26}}", text) is not None
