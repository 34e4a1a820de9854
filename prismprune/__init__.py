"""PrismPrune: fewer visual tokens for vision-language models, chosen by saliency and diversity.

`import prismprune` loads neither torch nor transformers: a name that needs them is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from prismprune.budget import TokenBudget
from prismprune.errors import (
    InvalidBudgetError,
    InvalidOptionError,
    InvalidScoresError,
    MediaTooLargeError,
    PartsUnavailableError,
    PrismError,
    UndecodableMediaError,
    UnknownMethodError,
    UnknownModelError,
    UnsupportedMediaError,
)
from prismprune.quantization import Quantization
from prismprune.results import Answer, Memory, PartMap, Timings, VisualTokens

if TYPE_CHECKING:
    from prismprune.media import Clip, FrameSampling, MediaLimits, Picture, open_media
    from prismprune.pruning import Pruning, prune
    from prismprune.selection import METHODS, Scores, Selection, Selector, select, selector
    from prismprune.vlm import AnswerStream, GenerationOptions, PrunedVLM, VisualRequest

__version__ = version("prismprune")

__all__ = [
    "METHODS",
    "Answer",
    "AnswerStream",
    "Clip",
    "FrameSampling",
    "GenerationOptions",
    "InvalidBudgetError",
    "InvalidOptionError",
    "InvalidScoresError",
    "MediaLimits",
    "MediaTooLargeError",
    "Memory",
    "PartMap",
    "PartsUnavailableError",
    "Picture",
    "PrismError",
    "PrunedVLM",
    "Pruning",
    "Quantization",
    "Scores",
    "Selection",
    "Selector",
    "Timings",
    "TokenBudget",
    "UndecodableMediaError",
    "UnknownMethodError",
    "UnknownModelError",
    "UnsupportedMediaError",
    "VisualRequest",
    "VisualTokens",
    "__version__",
    "open_media",
    "prune",
    "select",
    "selector",
]

_ON_USE = {
    "prismprune.media": ("Clip", "FrameSampling", "MediaLimits", "Picture", "open_media"),
    "prismprune.pruning": ("Pruning", "prune"),
    "prismprune.selection": ("METHODS", "Scores", "Selection", "Selector", "select", "selector"),
    "prismprune.vlm": ("AnswerStream", "GenerationOptions", "PrunedVLM", "VisualRequest"),
}
_HOME = {name: module for module, names in _ON_USE.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # so that the next use is an ordinary look-up
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
